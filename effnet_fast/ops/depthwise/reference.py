"""depthwise_conv_bn_act in plain PyTorch."""

from __future__ import annotations

import torch
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
    pieces: int,
) -> tuple[Tensor, Tensor]:
    norm = Norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps)
    y = conv_norm_act(x, weight, norm, stride, padding, weight.shape[0], activation, None)
    total = accumulator(x.dtype)
    partial = y.new_zeros((y.shape[0], pieces, y.shape[1]), dtype=total)
    if pieces:
        torch.sum(y, (2, 3), dtype=total, out=partial[:, 0])  # one piece is the image; others that are asked for are empty
    return y, partial
