"""depthwise_conv_bn_act in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from effnet_fast.ops.common import Norm, accumulator, conv_norm_act


def depthwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor,
    norm_var: Tensor,
    norm_eps: float,
    stride: int,
    padding: list[int],
    activation: str,
    squeeze: bool,
) -> tuple[Tensor, Tensor]:
    norm = Norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps)
    y = conv_norm_act(x, weight, norm, stride, padding, weight.shape[0], activation, None)
    total = accumulator(x.dtype)
    if not squeeze:
        return y, y.new_empty((y.shape[0], 0, y.shape[1]), dtype=total)
    return y, y.sum((2, 3), dtype=total).unsqueeze(1)
