"""pointwise_conv_bn_act in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from effnet_fast.ops.common import Norm, conv_norm_act


def pointwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor,
    norm_var: Tensor,
    norm_eps: float,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    if gate is not None:
        x = x * gate.to(x.dtype)[:, :, None, None]
    norm = Norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps)
    return conv_norm_act(x, weight, norm, 1, (0, 0, 0, 0), 1, activation, residual)
