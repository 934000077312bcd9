"""conv_bn_act in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.ops.common import Norm, conv_norm_act


def normalised(x: Tensor, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of uint8 ``x`` [N, C, H, W]: ``x * pixels[0] + pixels[1]`` of the channel."""
    scale, shift = pixels[:, :, None, None]
    return (x * scale + shift).to(dtype)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor,
    norm_var: Tensor,
    norm_eps: float,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
    activation: str,
    pixels: Tensor | None,
) -> Tensor:
    if pixels is not None:
        x = normalised(x, pixels, weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last)  # an image is smaller than what a stem makes of it
    norm = Norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps)
    return conv_norm_act(x, weight, norm, stride, padding, 1, activation, residual)
