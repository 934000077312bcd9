"""What training's ops refuse, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effnet_fast.ops.common import (
    DTYPES,
    INTEGERS,
    accumulator,
    check_activation,
    check_integer,
    check_strided,
    check_tensor,
    either,
    output_size,
)


def check_images(op: str, name: str, x: Tensor) -> None:
    check_strided(op, name, x)
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{op}: {name} is {tuple(x.shape)}; [N, C, H, W] of 1 and more would do")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} is {x.dtype}; {either(DTYPES)} would do")


def check_norm(op: str, name: str, norm: Tensor, x: Tensor) -> None:
    check_tensor(op, name, norm, (3, x.shape[1]), (accumulator(x.dtype),), x.device)


def check_read(op: str, name: str, x: Tensor, norm: Tensor | None, activation: str, gate: Tensor | None) -> None:
    """Refuse an ``x``, so named, that is not images, and what it is not read with."""
    check_images(op, name, x)
    check_activation(op, activation)
    if norm is not None:
        check_norm(op, "norm", norm, x)
    elif activation != "identity" or gate is not None:
        raise ValueError(f"{op}: norm is None beside activation {activation!r} or a gate; they come after a norm")
    if gate is not None:
        check_tensor(op, "gate", gate, tuple(x.shape[:2]), (accumulator(x.dtype),), x.device)


def check_vectors(op: str, name: str, tensor: Tensor, rows: tuple[int, ...]) -> None:
    """Refuse what is not ``rows`` of K numbers, none where that is ()."""
    check_strided(op, name, tensor)
    if tensor.dim() != len(rows) + 1 or tensor.shape[:-1] != rows or tensor.shape[-1] < 1:
        raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}; [{', '.join(map(str, (*rows, 'K')))}] with K >= 1 would do")
    if tensor.dtype != accumulator(tensor.dtype):
        raise TypeError(f"{op}: {name} is {tensor.dtype}; torch.float32 or torch.float64 would do")


def check_weight(op: str, weight: Tensor) -> None:
    check_strided(op, "weight", weight)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"{op}: weight is {tuple(weight.shape)}; [K, C / groups, k, k] of 1 and more would do")


def check_conv(op: str, kind: str, x: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> tuple[int, int, int, int]:
    """Refuse a convolution of x that is not of that kind, or of no image; return y's shape."""
    check_weight(op, weight)
    images, channels, height, width = x.shape
    outs = channels if kind == "depthwise" else weight.shape[0]
    if weight.shape[:2] != (outs, 1 if kind == "depthwise" else channels):
        expected = f"[{channels}, 1, k, k]" if kind == "depthwise" else f"[K, {channels}, k, k]"
        raise ValueError(f"{op}: weight is {tuple(weight.shape)}; {expected} would do")
    check_integer(op, "stride", stride, 1)
    fits = isinstance(padding, (tuple, list)) and len(padding) == 4
    if not fits or not all(isinstance(side, INTEGERS) and side >= 0 for side in padding):
        raise ValueError(f"{op}: padding is {padding!r}; four integers >= 0 (top, bottom, left, right) would do")
    rows, columns = weight.shape[2:]
    if kind == "pointwise" and (rows, columns, stride, tuple(padding)) != (1, 1, 1, (0, 0, 0, 0)):
        raise ValueError(f"{op}: kernel {rows}x{columns}, stride {stride}, padding {tuple(padding)}; 1x1, 1 and none would do")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{op}: weight is {weight.dtype}; {either(DTYPES)} would do")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device}; {x.device}, where x is, would do")
    top, bottom, left, right = padding
    made = output_size(height, rows, stride, top, bottom), output_size(width, columns, stride, left, right)
    if made[0] < 1 or made[1] < 1:
        raise ValueError(f"{op}: kernel {rows}x{columns} is larger than the padded x, {height}x{width} and {tuple(padding)}")
    return images, outs, *made
