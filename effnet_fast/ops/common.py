"""What the ops share: the norm that travels with a convolution, the activations, and the checks made before any kernel starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "relu", "relu6", "identity")
NORM_SCHEMA = "Tensor? norm_weight, Tensor? norm_bias, Tensor norm_mean, Tensor norm_var, float norm_eps"


class Norm(NamedTuple):
    """A frozen batch norm over C channels: ``(y - mean) / sqrt(var + eps) * weight + bias``, each [C]; folded inside the kernel."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums, statistics and gates are fp32 (fp64 for fp64 storage)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_size(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Pixels that a convolution gives along one side."""
    return (size + before + after - kernel) // stride + 1


def activate_(y: Tensor, activation: str) -> Tensor:
    """The activation, in place: for reference kernels, on a tensor they own."""
    if activation == "silu":
        return F.silu(y, inplace=True)
    if activation == "relu":
        return F.relu(y, inplace=True)
    return F.relu6(y, inplace=True) if activation == "relu6" else y


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    stride: int,
    padding: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """The reference of every convolution op: what PyTorch's own modules compute, channels_last out."""
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    y = F.conv2d(x, weight.to(x.dtype), stride=stride, padding=(top, left), groups=groups)
    y = activate_(F.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps), activation)
    if residual is not None:
        y += residual
    return y.contiguous(memory_format=torch.channels_last)


def empty_output(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> Tensor:
    """The fake of every convolution op's y: [N, K, H', W'], channels_last, in x's dtype."""
    top, bottom, left, right = padding
    height = output_size(x.shape[2], weight.shape[2], stride, top, bottom)
    width = output_size(x.shape[3], weight.shape[3], stride, left, right)
    return torch.empty(
        (x.shape[0], weight.shape[0], height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def conv_flops(x_shape: Sequence[int], weight_shape: Sequence[int], y_shape: Sequence[int]) -> int:
    """2 * N * H' * W' * (elements of the weight): padding taps count, as in PyTorch's own FLOP counter."""
    images, _, height, width = y_shape
    elements = 1
    for size in weight_shape:
        elements *= size
    return 2 * images * height * width * elements


def check_no_gradient(op: str, *tensors: Tensor | None) -> None:
    """Refuse silently losing a gradient: the inference ops have none."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{op}: it has no gradient; torch.no_grad() or the modules of effnet_fast.nn, which train, would do")


def check_conv(op: str, x: Tensor, weight: Tensor, norm: Norm, activation: str, channels: int) -> None:
    """Refuse what no kernel takes, by name. ``channels``: input channels that the weight expects."""
    check_no_gradient(op, x, weight, *norm[:4])
    if x.dim() != 4:
        raise ValueError(f"{op}: x has {x.dim()} dimensions; an image batch [N, C, H, W] would do")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x is {x.dtype}; float32, bfloat16, float16 or float64 would do")
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight has {weight.dim()} dimensions; [K, C/groups, k, k] would do")
    if channels != x.shape[1]:
        raise ValueError(f"{op}: weight has {channels} channels, x has {x.shape[1]}")
    if norm.mean.shape[0] != weight.shape[0]:
        raise ValueError(f"{op}: the norm has {norm.mean.shape[0]} channels, the weight gives {weight.shape[0]}")
    if norm.mean.dtype != x.dtype and not (norm.mean.dtype == torch.float32 and x.element_size() == 2):
        raise TypeError(f"{op}: the norm is {norm.mean.dtype} and x {x.dtype}; the same dtype, or float32 beside half x, would do")
    if weight.device != x.device or norm.mean.device != x.device:
        raise ValueError(f"{op}: x is on {x.device}, weight on {weight.device}, norm on {norm.mean.device}; one device would do")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; one of {', '.join(ACTIVATIONS)} would do")


def check_window(op: str, x: Tensor, kernel: Sequence[int], stride: int, padding: Sequence[int]) -> None:
    """Refuse a window that does not fit the padded input."""
    if len(padding) != 4 or any(side < 0 for side in padding):
        raise ValueError(f"{op}: padding is {tuple(padding)}; four numbers >= 0 (top, bottom, left, right) would do")
    if stride < 1:
        raise ValueError(f"{op}: stride is {stride}; 1 or more would do")
    top, bottom, left, right = padding
    if x.shape[2] + top + bottom < kernel[0] or x.shape[3] + left + right < kernel[1]:
        raise ValueError(f"{op}: kernel {tuple(kernel)} is larger than the padded input {tuple(x.shape[2:])} + {tuple(padding)}")


def check_like_output(op: str, name: str, tensor: Tensor | None, shape: Sequence[int], x: Tensor) -> None:
    """Refuse a residual or gate of another shape or device, or with a gradient."""
    check_no_gradient(op, tensor)
    if tensor is not None and (tensor.shape != torch.Size(shape) or tensor.device != x.device):
        raise ValueError(f"{op}: {name} is {tuple(tensor.shape)} on {tensor.device}; {tuple(shape)} on {x.device} would do")
