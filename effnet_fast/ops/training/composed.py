"""Training's convolutions made of PyTorch's own and of passes over what surrounds it: the reference, and what runs where no kernel
does all in one. What is activated and the gradient of y exist in memory meanwhile, and are not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Passes(NamedTuple):
    """The ops of :mod:`effnet_fast.ops.training.normalization`, on one backend."""

    norm_act: Callable[..., Tensor]
    norm_act_image_sums: Callable[..., Tensor]
    norm_act_backward: Callable[..., tuple[Tensor, Tensor]]
    norm_gradient: Callable[..., Tensor]


def _activated(passes: Passes, x: Tensor, norm: Tensor | None, activation: str, gate: Tensor | None) -> Tensor:
    if norm is None:
        return x.contiguous(memory_format=torch.channels_last)
    return passes.norm_act(x, norm, activation, gate, None)


def _zeros(padding: Sequence[int]) -> tuple[list[int], bool]:
    """What a convolution of PyTorch's pads by, and whether others come before it: it knows symmetric ones alone."""
    top, bottom, left, right = padding
    return ([0, 0], True) if (top, left) != (bottom, right) else ([top, left], False)


def _padded(a: Tensor, padding: Sequence[int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(a, (left, right, top, bottom)).contiguous(memory_format=torch.channels_last)


def forward(
    passes: Passes,
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    activation: str,
    gate: Tensor | None,
    stride: int,
    padding: Sequence[int],
) -> Tensor:
    """y of :func:`effnet_fast.ops.training.conv_stats`."""
    a, (zeros, before) = _activated(passes, x, norm, activation, gate), _zeros(padding)
    y = F.conv2d(_padded(a, padding) if before else a, weight.to(a.dtype), None, stride, zeros, 1, x.shape[1] // weight.shape[1])
    return y.contiguous(memory_format=torch.channels_last)


def backward(
    passes: Passes,
    grad: Tensor,
    y: Tensor,
    y_norm: Tensor,
    y_coefficients: Tensor,
    y_activation: str,
    y_gate: Tensor | None,
    y_pool: Tensor | None,
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: Sequence[int],
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`effnet_fast.ops.training.conv_backward`."""
    g = passes.norm_gradient(grad, y, y_norm, y_coefficients, y_activation, y_gate, y_pool)
    a, (zeros, before) = _activated(passes, x, norm, activation, gate), _zeros(padding)
    arguments: Any = (None, [stride] * 2, zeros, [1, 1], False, [0, 0], x.shape[1] // weight.shape[1], [need_x, need_weight, False])
    z, grad_weight, _ = torch.ops.aten.convolution_backward(g, _padded(a, padding) if before else a, weight.to(a.dtype), *arguments)
    # Flat between: the strides of sizes of one, which a channels_last 1x1 has, would cost whoever wants a parameter's a copy.
    grad_weight = grad_weight.reshape(-1).view(weight.shape).to(weight.dtype) if need_weight else weight.new_empty(0)
    sums = y_norm.new_empty(0)
    if not need_x:
        return x.new_empty(0), grad_weight, sums
    if before:
        top, _, left, _ = padding
        z = z[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    if norm is not None and gate is None:
        grad_x, sums = passes.norm_act_backward(z, x, norm, activation, residual)
        return grad_x, grad_weight, sums
    if norm is not None:
        sums = passes.norm_act_image_sums(z, x, norm, activation)
    grad_x = z if residual is None else z + residual
    return grad_x.contiguous(memory_format=torch.channels_last), grad_weight, sums


def implementations(passes: Passes, batch_stats: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Callable, Callable]:
    """``conv_stats`` and ``conv_backward`` of these passes."""

    def conv_stats(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        y = forward(passes, *args)
        return y, *batch_stats(y)

    def conv_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return backward(passes, *args)

    return conv_stats, conv_backward
