"""How a convolution pads: symmetrically, or as TensorFlow's SAME from the run-time size."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

PADDINGS = ("symmetric", "same")


def same_sides(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that the output has ceil(size / stride) pixels; the odd one goes after.

    For kernel >= stride the total is never negative, so no ``max`` is needed and a traced size stays symbolic; in this form the
    output's size simplifies to (size - 1) // stride + 1, as with symmetric padding.
    """
    total = stride * ((size - 1) // stride) + kernel - size if stride > 1 else kernel - 1
    return total // 2, total - total // 2


def same_zeros(kernel: int, stride: int, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of SAME padding over an image of ``shape`` [N, C, H, W]."""
    return *same_sides(shape[2], kernel, stride), *same_sides(shape[3], kernel, stride)


def sides(conv: nn.Conv2d, padding: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of ``conv`` over an image of ``shape`` [N, C, H, W]; ``conv.padding`` says it for "symmetric"."""
    if padding == "symmetric":
        assert not isinstance(conv.padding, str)  # "valid" and "same" never come here
        top, left = conv.padding
        return top, top, left, left
    return same_zeros(conv.kernel_size[0], conv.stride[0], shape)


def pad(conv: nn.Module, kernel: int, stride: int, padding: str, x: Tensor) -> Tensor:
    """``x`` with the zeros that a convolution built with this kernel size, stride and padding does not add itself.

    ``conv`` may stand in its place: a wrapper, or one with zeros of its own, which gets no others.
    """
    if padding == "symmetric" or getattr(conv, "padding", (0, 0)) not in ((0, 0), 0):
        return x
    top, bottom, left, right = same_zeros(kernel, stride, x.shape)
    return F.pad(x, (left, right, top, bottom))


def check_padding(who: str, padding: str) -> None:
    if padding not in PADDINGS:
        raise ValueError(f"{who}: padding is {padding!r}; one of {', '.join(PADDINGS)} would do")
