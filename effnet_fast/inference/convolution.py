"""A dense convolution of many channels, its norm folded into the weight: what a plan leaves to oneDNN between its native calls.

It is bound by multiplications, of which oneDNN does more in a second than our kernel where there are many channels, where 16
outputs leave half of what that one sums up at once empty, and in bfloat16, by products that ours does not use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.ops import Norm
from effnet_fast.ops.common import activate_
from effnet_fast.ops.conv import is_stem

MANY, FEW = 128, 16  # input channels from which on, output channels up to which


def is_folded(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether a dense convolution of ``x`` [N, C, H, W] on the CPU is one of these, where oneDNN has instructions for its dtype."""
    if is_stem(weight, stride) or x.dtype != weight.dtype:
        return False
    if x.dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return x.dtype == torch.float32 and (weight.shape[1] >= MANY or weight.shape[0] <= FEW)


class FoldedConvolution:
    """``activation(norm(conv(x))) + residual``, as :func:`effnet_fast.ops.conv_bn_act`; of ``x`` [N, C, H, W] of any N.

    The weight is packed for the shape of the first ``x``, which suits others.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, padding: Sequence[int], activation: str) -> None:
        self.nbytes = weight.nbytes + bias.nbytes
        self._weight: Tensor | None = weight
        self._bias, self._stride, self._padding, self._activation = bias, [stride, stride], padding, activation
        self._convolve: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        top, bottom, left, right = self._padding
        padding = [top, left]
        if padding != [bottom, right]:
            x, padding = F.pad(x, (left, right, top, bottom)), [0, 0]
        x = x.contiguous(memory_format=torch.channels_last)
        if self._convolve is None:
            self._convolve = self._packed(list(x.shape), padding)
        y = activate_(self._convolve(x).contiguous(memory_format=torch.channels_last), self._activation)
        return y if residual is None else y.add_(residual)

    def _packed(self, shape: list[int], padding: list[int]) -> Callable[[Tensor], Tensor]:
        weight, bias, stride = self._weight, self._bias, self._stride
        assert weight is not None
        onednn = torch.ops.mkldnn
        if not (
            torch.backends.mkldnn.is_available()
            and hasattr(onednn, "_convolution_pointwise")
            and hasattr(onednn, "_reorder_convolution_weight")
        ):
            return lambda x: F.conv2d(x, weight, bias, stride, padding)
        packed = onednn._reorder_convolution_weight(weight, padding, stride, [1, 1], 1, shape)
        self._weight = None  # for the packed one
        return lambda x: onednn._convolution_pointwise(x, packed, bias, padding, stride, [1, 1], 1, "none", [], "")


class Folding:
    """Makes FoldedConvolutions, equal ones once: a network's plans for images of several shapes have the same."""

    def __init__(self) -> None:
        self._made: WeakValueDictionary[tuple, FoldedConvolution] = WeakValueDictionary()

    def __call__(self, weight: Tensor, norm: Norm, stride: int, padding: Sequence[int], activation: str) -> FoldedConvolution:
        scale = (norm.var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        folded = (weight * scale[:, None, None, None]).to(weight.dtype).contiguous(memory_format=torch.channels_last)
        shift = shift.to(weight.dtype)
        digest = hashlib.sha256()
        for tensor in (folded.permute(0, 2, 3, 1), shift):
            digest.update(tensor.view(torch.uint8).numpy().data)
        key = digest.digest(), folded.shape, folded.dtype, stride, tuple(padding), activation
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = FoldedConvolution(folded, shift, stride, padding, activation)
        return made

    def nbytes(self) -> int:
        return sum(convolution.nbytes for convolution in self._made.values())
