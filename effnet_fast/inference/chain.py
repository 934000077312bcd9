"""A network of few images on CUDA with the kernels that follow one another started as one (csrc/chain).

Stems, depthwise and 1x1 convolutions, squeeze-excite gates, the mean and the classifier wait, whichever backend would have run
them, until an operator comes that is none of them and may touch memory; then all that wait are one launch, on the stream that is
current by then. Their results have their memory at once, and as they run in the order in which they came, what has gone by then may
be where another is, as on a stream: memory that nobody else may be given meanwhile, a CUDA graph's pool. On the CPU nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_fast.inference.joining import Convolution, Joining
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
GROUP, STEM = 32, 128  # channels that a block convolves depthwise at once; that a stem has at most; csrc/chain has them too
MOST = 2**24  # elements of a map that is averaged
_ATEN = torch.ops.aten
# What gives a tensor and touches no memory. Composite operators that may copy call themselves views too.
_UNTOUCHED = {
    _ATEN.alias.default,
    _ATEN.as_strided.default,
    _ATEN.as_strided_.default,
    _ATEN.detach.default,
    _ATEN.empty.memory_format,
    _ATEN.expand.default,
    _ATEN.permute.default,
    _ATEN.select.int,
    _ATEN.slice.Tensor,
    _ATEN.split.Tensor,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.t.default,
    _ATEN.transpose.int,
    _ATEN.unbind.int,
    _ATEN.unsqueeze.default,
    _ATEN.view.default,
}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why nothing would wait there, or None."""
    if device.type != "cuda":
        return f"it is for CUDA, not for {device.type}"
    if dtype not in HALVES:
        return f"it is for {HALVES[0]} and {HALVES[1]}, not for {dtype}"
    return native.REASON or native.why_no_cuda(device)


class Call(NamedTuple):
    """Of an op's native kernel, in place of an operator. The first argument flows through the net; those from the second to the
    sixth are read ahead of their turn, where they are tensors: nothing that waits may make them. ``view``: what is then taken of
    the result."""

    op: str
    args: tuple[Any, ...]
    view: Any = None

    def __call__(self) -> Any:
        made = getattr(_OPS, self.op).native(*self.args)
        return made if self.view is None else made[self.view]


class Chaining(Joining):
    """Runs a pass as :class:`Joining` does, but for what waits.

    barrier    [1] int32 where the images are, zero before its first use, of no two passes at the same time
    blocks     multiprocessors of that GPU
    constants  zeros and ones, as many as the largest classifier has classes
    waited     of how many kernels those were that waited together, so far
    launches   that CUDA made of them: one, or a few where there are many. They are known after the pass
    """

    def __init__(self, barrier: Tensor, blocks: int, constants: tuple[Tensor, Tensor], pixels: Tensor, dtype: torch.dtype) -> None:
        super().__init__(pixels, dtype)
        self._barrier, self._blocks, self._constants = barrier, blocks, constants
        self._waiting, self._written = 0, set[int]()  # kernels, and the memory that they will write
        self._taken: dict[Any, Callable[..., Call | None]] = {
            _ATEN.mean.dim: self._mean,
            _ATEN.linear.default: self._linear,
            _ATEN.addmm.default: lambda bias, x, weight: self._linear(x, weight.t(), bias),
            _ATEN.mm.default: lambda x, weight: self._linear(x, weight.t()),
        }
        for op, take in (
            ("conv_bn_act", self._stem),
            ("depthwise_conv_bn_act", self._depthwise),
            ("squeeze_excite_gate", self._gate),
            ("pointwise_conv_bn_act", self._pointwise),
        ):
            self._taken |= {getattr(getattr(torch.ops.effnet_fast, op), kernel.backend): take for kernel in backends.kernels(op)}
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
        if func in _UNTOUCHED:
            return super().run(func, args, kwargs)
        taken = self._taken.get(func)
        call = None if taken is None or kwargs or args[0].device != self._barrier.device else taken(*args)
        if call is None:
            self._launch()
            return super().run(func, args, kwargs)
        if any(isinstance(given, Tensor) and _memory(given) in self._written for given in call.args[1:6]):
            self._launch()
        self._waiting += 1
        results = call()
        self._written |= {_memory(result) for result in (results if isinstance(results, tuple) else (results,))}
        return results

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
        self._written.clear()

    # What is to be called in place of an operator, or None for one that csrc/chain does not take.

    def _stem(self, x: Tensor, weight: Tensor, *args: Any) -> Call | None:
        residual, stride, pixels = args[5], args[6], args[9]
        alike = weight.dtype in HALVES and x.dtype == (weight.dtype if pixels is None else torch.uint8)
        if not alike or residual is not None or stride != 2 or weight.shape[1] > 3 or weight.shape[2:] != (3, 3):
            return None
        return None if weight.shape[0] % 8 or weight.shape[0] > STEM else Call("conv_bn_act", (x, weight, *args))

    def _depthwise(self, x: Tensor, weight: Tensor, *args: Any) -> Call | None:
        *norm, stride, padding, activation, pieces = args
        if not _alike(x, weight) or weight.shape[2:] not in KERNELS or stride not in STRIDES:
            return None
        if pieces:  # as many as there are blocks for, each with one
            images, channels, height, width = x.shape
            top, bottom, left, right = padding
            height = output_size(height, weight.shape[2], stride, top, bottom)
            width = output_size(width, weight.shape[3], stride, left, right)
            pieces = max(1, min(self._blocks // (images * -(-channels // GROUP)), height * width))
        return Call("depthwise_conv_bn_act", (x, weight, *norm, stride, padding, activation, pieces))

    def _gate(self, partial: Tensor, count: int, weight: Tensor, *args: Any) -> Call | None:
        if partial.dtype != torch.float32 or weight.dtype not in HALVES or weight.shape[1] % 8:
            return None
        return Call("squeeze_excite_gate", (partial, count, weight, *args))

    def _pointwise(self, x: Tensor, weight: Tensor, *args: Any) -> Call | None:
        return Call("pointwise_conv_bn_act", (x, weight, *args)) if _alike(x, weight) and weight.shape[1] % 8 == 0 else None

    def _mean(self, x: Tensor, dim: Any, keepdim: bool = False) -> Call | None:
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 16 == 0
        if (
            not last
            or x.numel() > MOST
            or x.dtype not in HALVES
            or x.shape[1] % 8
            or dim is None
            or sorted(d % 4 for d in dim) != [2, 3]
        ):
            return None
        return Call("global_average_pool", (x,), (..., None, None) if keepdim else None)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
        """A 1x1 convolution of images of one pixel."""
        if x.dim() != 2 or not _alike(x, weight) or weight.shape[1] % 8 or not (x.is_contiguous() and weight.is_contiguous()):
            return None
        zeros, ones = (constant[: len(weight)] for constant in self._constants)
        if len(zeros) < len(weight) or (bias is not None and (bias.shape != zeros.shape or bias.dtype != zeros.dtype)):
            return None
        args = x[..., None, None], weight[..., None, None], None, bias, zeros, ones, 0.0, None, None, "identity"
        return Call("pointwise_conv_bn_act", args, (..., 0, 0))


def _alike(x: Tensor, weight: Tensor) -> bool:
    """Whether both are of one half type, and output channels fill 16 bytes."""
    return x.dtype in HALVES and weight.dtype == x.dtype and weight.shape[0] % 8 == 0


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Chains:
    """``model``'s pass, run so. Its text tells what there was of the last one. It keeps no memory that a pass has made."""

    def __init__(self, model: nn.Module, pixels: Tensor, dtype: torch.dtype) -> None:
        self._model, self._pixels, self._dtype = model, pixels, dtype
        classes = max((module.out_features for module in model.modules() if isinstance(module, nn.Linear)), default=0)
        zeros = torch.zeros(classes, dtype=dtype)
        # From the CPU, which waits until they are there.
        self._barrier = torch.zeros(1, dtype=torch.int32).to(pixels.device)
        self._constants = zeros.to(pixels.device), (zeros + 1).to(pixels.device)
        self._blocks = multiprocessors(pixels.device.index) if pixels.is_cuda else 1
        self.waited: Sequence[int] = ()
        self.launches = 0

    def __call__(self, x: Tensor) -> Any:
        chaining = Chaining(self._barrier, self._blocks, self._constants, self._pixels, self._dtype)
        results = chaining.joined(self._model, x)
        self.waited, self.launches = chaining.waited, chaining.launches
        return results

    def __str__(self) -> str:
        return f"{sum(self.waited)} kernels in {self.launches}"
