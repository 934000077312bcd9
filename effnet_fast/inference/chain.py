"""A network of few images on CUDA with the kernels that follow one another started as one (csrc/chain).

Stems, depthwise and 1x1 convolutions, squeeze-excite gates, the mean and the classifier wait, whichever backend would have run
them, until an operator comes that is none of them and no view; then all that wait are one launch, on the stream that is current by
then. Their results have their memory at once, and as they run in the order in which they came, what has gone by then may be where
another is, as on a stream: memory that nobody else may be given meanwhile, a CUDA graph's pool. On the CPU nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.inference.recording import Convolution, Joining
from effnet_fast.ops import backends, native
from effnet_fast.ops.common import output_size
from effnet_fast.ops.depthwise import KERNELS, STRIDES
from effnet_fast.ops.depthwise.launch import multiprocessors
from effnet_fast.ops.library import define_native

define_native("chain_begin(Tensor barrier) -> ()")
define_native("chain_launch() -> ()")
define_native("chain_end() -> int")
_OPS = torch.ops.effnet_fast

HALVES = (torch.bfloat16, torch.float16)
GROUP, STEM = 32, 128  # channels that a block convolves depthwise at once; that a stem has at most
_EMPTY = torch.ops.aten.empty.memory_format
_OVERLOADS = {*backends.BACKENDS, "default", "dim"}  # that return what they make


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why nothing would wait there, or None."""
    if device.type != "cuda":
        return f"it is for CUDA, not for {device.type}"
    if dtype not in HALVES:
        return f"it is for {HALVES[0]} and {HALVES[1]}, not for {dtype}"
    return native.REASON or native.why_no_cuda(device)


class Chaining(Joining):
    """Runs a pass as :class:`Joining` does, but for what waits.

    barrier    [1] int32 where the images are, zero before its first use, of no two passes at the same time
    blocks     multiprocessors of that GPU
    constants  zeros and ones of each number of classes, which further passes find again
    waited     of how many kernels those were that waited together, so far
    launches   that CUDA made of them: one, or a few where there are many. They are known after the pass
    """

    def __init__(
        self, barrier: Tensor, blocks: int, constants: dict[int, tuple[Tensor, Tensor]], pixels: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__(pixels, dtype)
        self._barrier, self._blocks, self._constants, self._waiting = barrier, blocks, constants, 0
        self._taken: dict[str, Callable[..., Callable[[], Any] | None]] = {
            "effnet_fast::conv_bn_act": self._stem,
            "effnet_fast::depthwise_conv_bn_act": self._depthwise,
            "effnet_fast::squeeze_excite_gate": self._gate,
            "effnet_fast::pointwise_conv_bn_act": self._pointwise,
            "aten::mean": self._mean,
            "aten::linear": self._linear,
            "aten::addmm": lambda bias, x, weight: self._linear(x, weight.t(), bias),
            "aten::mm": lambda x, weight: self._linear(x, weight.t()),
        }
        self.waited: list[int] = []
        self.launches = 0

    def joined(self, model: Callable[[Tensor], Any], image: Tensor) -> Any:
        """Raises RuntimeError where new memory is written at once, or another backend than native is asked for."""
        fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # but by the stub
        if torch.are_deterministic_algorithms_enabled() and fills:
            raise RuntimeError("new memory is filled, which kernels that wait may still read: use_deterministic_algorithms")
        if (asked := backends.requested()[0]) not in (None, "native"):
            raise RuntimeError(f"backend {asked!r} is asked for")
        _OPS.chain_begin(self._barrier)
        try:
            return super().joined(model, image)
        finally:
            self._end()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.is_view or torch.Tag.inplace_view in func.tags or func is _EMPTY:  # reads and writes no memory
            return super().run(func, args, kwargs)
        taken = None if kwargs or func._overloadname not in _OVERLOADS else self._taken.get(func._schema.name)
        call = None if taken is None else taken(*args)
        if call is None:
            self._launch()
            return super().run(func, args, kwargs)
        self._waiting += 1
        return call()

    def computed(self, convolution: Convolution) -> Tensor:
        if convolution.norm is None:  # no op of ours
            self._launch()
            return super().computed(convolution)
        with self:
            return super().computed(convolution)

    def _fill_placeholders(self) -> None:
        self._launch()
        self._end()  # what is started here does not come by way of run
        super()._fill_placeholders()

    def _end(self) -> None:
        self.launches += _OPS.chain_end()

    def _launch(self) -> None:
        if self._waiting:
            _OPS.chain_launch()
            self.waited.append(self._waiting)
        self._waiting = 0

    # What is to be called in place of an op, or None for one that csrc/chain does not take.

    def _stem(self, x: Tensor, weight: Tensor, *args: Any) -> Callable[[], Any] | None:
        residual, stride, pixels = args[5], args[6], args[9]
        alike = weight.dtype in HALVES and x.dtype == (weight.dtype if pixels is None else torch.uint8)
        if not alike or residual is not None or stride != 2 or weight.shape[1] > 3 or weight.shape[2:] != (3, 3):
            return None
        if weight.shape[0] % 8 or weight.shape[0] > STEM:
            return None
        return lambda: _OPS.conv_bn_act.native(x, weight, *args)

    def _depthwise(self, x: Tensor, weight: Tensor, *args: Any) -> Callable[[], Any] | None:
        *norm, stride, padding, activation, pieces = args
        if not _alike(x, weight) or weight.shape[2:] not in KERNELS or stride not in STRIDES:
            return None
        if pieces:  # as many as there are blocks for, each with one
            images, channels, height, width = x.shape
            top, bottom, left, right = padding
            height = output_size(height, weight.shape[2], stride, top, bottom)
            width = output_size(width, weight.shape[3], stride, left, right)
            pieces = max(1, min(self._blocks // (images * -(-channels // GROUP)), height * width))
        return lambda: _OPS.depthwise_conv_bn_act.native(x, weight, *norm, stride, padding, activation, pieces)

    def _gate(self, partial: Tensor, count: int, weight: Tensor, *args: Any) -> Callable[[], Any] | None:
        if partial.dtype != torch.float32 or weight.dtype not in HALVES or weight.shape[1] % 8:
            return None
        return lambda: _OPS.squeeze_excite_gate.native(partial, count, weight, *args)

    def _pointwise(self, x: Tensor, weight: Tensor, *args: Any) -> Callable[[], Any] | None:
        if not _alike(x, weight) or weight.shape[1] % 8:
            return None
        return lambda: _OPS.pointwise_conv_bn_act.native(x, weight, *args)

    def _mean(self, x: Tensor, dim: Any, keepdim: bool = False) -> Callable[[], Any] | None:
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if not last or x.dtype not in HALVES or x.shape[1] % 8 or dim is None or sorted(d % 4 for d in dim) != [2, 3]:
            return None
        return lambda: _OPS.global_average_pool.native(x)[(..., None, None) if keepdim else ...]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Callable[[], Any] | None:
        """A 1x1 convolution of images of one pixel."""
        if x.dim() != 2 or not _alike(x, weight) or weight.shape[1] % 8 or not (x.is_contiguous() and weight.is_contiguous()):
            return None
        if len(weight) not in self._constants:
            self._launch()  # to write them is to write memory now
            self._constants[len(weight)] = weight.new_zeros(len(weight)), weight.new_ones(len(weight))
        zeros, ones = self._constants[len(weight)]
        args = x[..., None, None], weight[..., None, None], None, bias, zeros, ones, 0.0, None, None, "identity"
        return lambda: _OPS.pointwise_conv_bn_act.native(*args)[..., 0, 0]


def _alike(x: Tensor, weight: Tensor) -> bool:
    """Whether both are of one half type, and output channels fill 16 bytes."""
    return x.dtype in HALVES and weight.dtype == x.dtype and weight.shape[0] % 8 == 0


class Chains:
    """``model``'s pass, run so. Its text tells what there was of the last one."""

    def __init__(self, model: nn.Module, pixels: Tensor, dtype: torch.dtype) -> None:
        self._model, self._pixels, self._dtype = model, pixels, dtype
        self._barrier = torch.zeros(1, dtype=torch.int32).to(pixels.device)  # which waits until it is there
        self._blocks = multiprocessors(pixels.device.index) if pixels.is_cuda else 1
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}
        self.waited: Sequence[int] = ()
        self.launches = 0

    def __call__(self, x: Tensor) -> Any:
        chaining = Chaining(self._barrier, self._blocks, self._constants, self._pixels, self._dtype)
        results = chaining.joined(self._model, x)
        self.waited, self.launches = chaining.waited, chaining.launches
        return results

    def __str__(self) -> str:
        return f"{sum(self.waited)} kernels in {self.launches}"
