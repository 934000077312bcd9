"""A network on the CPU as one native call: its kernels recorded for one image (csrc/inference/plan.h), and replayed for any batch.

:class:`Recording` watches every operator of a forward pass. The native ops record themselves; a view moves no data; the mean and
the linear layer of a classifier become native ops. Anything else that touches what came of the image is :class:`Unplannable`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from effnet_fast import ops
from effnet_fast.ops.library import define_native

define_native("plan_begin(Tensor image) -> int")
define_native("plan_end(int plan, Tensor[] results) -> int[]")
define_native("plan_run(int plan, Tensor images, Tensor[] results) -> ()")
define_native("plan_free(int plan) -> ()")
_OPS = torch.ops.effnet_fast
_ATEN = torch.ops.aten


class Unplannable(Exception):
    """Why a network cannot be one native call."""


class Recording(TorchDispatchMode):
    """Follows what comes of ``image`` through a forward pass."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self._kept: list[Tensor] = []  # while they live, no other tensor has their storage
        self._storages: set[int] = set()
        self.keep(image)

    def keep(self, made: Any) -> Any:
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, Tensor):
                self._kept.append(tensor)
                self._storages.add(tensor.untyped_storage()._cdata)
        return made

    def is_kept(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(map(self.is_kept, tree_flatten((args, kwargs))[0])):
            return func(*args, **kwargs)  # of weights alone: a constant
        if func.namespace == "effnet_fast":
            if not func._overloadname.startswith("native"):
                raise Unplannable(f"{func} runs on another backend than native")
            return self.keep(func(*args, **kwargs))
        if func in _REPLACED:
            return self.keep(_REPLACED[func](*args, **kwargs))
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and self.is_kept(made):
            return made  # a view, or the same
        raise Unplannable(f"{func} is no kernel of ours")


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if x.dim() != 4 or dim is None or sorted(d % 4 for d in dim) != [2, 3] or dtype not in (None, x.dtype):
        raise Unplannable(f"a mean over {dim} of {tuple(x.shape)}")
    y = _OPS.global_average_pool.native(x)
    return y[:, :, None, None] if keepdim else y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of images of one pixel, whose norm adds the bias."""
    if x.dim() != 2:
        raise Unplannable(f"a linear layer over {tuple(x.shape)}")
    zeros = torch.zeros(len(weight))
    shift = None if bias is None else bias.float()
    norm = ops.Norm(None, shift, zeros, zeros + 1, 0.0)
    return _OPS.pointwise_conv_bn_act.native(x[:, :, None, None], weight[:, :, None, None], *norm, None, None, "identity")[:, :, 0, 0]


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        raise Unplannable("a scaled linear layer")
    return _linear(x, weight.t(), bias)


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    _ATEN.mean.dim: _mean,
    _ATEN.linear.default: _linear,
    _ATEN.addmm.default: _addmm,
}


class Size(NamedTuple):
    """Of a plan: kernels that it calls, bytes of what flows between them for one image, bytes of the packed weights."""

    steps: int
    arena_bytes: int
    packed_bytes: int


class NativePlan:
    """``model``, which gives a tensor or several, for images of one shape, layout and dtype.

    Raises Unplannable where something in it is no kernel of ours.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        with torch.inference_mode():
            number = _OPS.plan_begin(image)
            self._free = weakref.finalize(self, _OPS.plan_free, number)
            try:
                with Recording(image) as recording, ops.backend("native"):
                    made = model(image)
                leaves, self._tree = tree_flatten(made)
                if not leaves or not all(recording.is_kept(leaf) for leaf in leaves):
                    raise Unplannable("a result does not come of the image")
                self._results = [(leaf.shape[1:], leaf.dtype, leaf.dim() == 4) for leaf in leaves]
                self.size = Size(*_OPS.plan_end(number, leaves))
            except BaseException:
                self._free()
                raise
        self._number = number

    def __call__(self, images: Tensor) -> Any:
        """What the model gives for ``images``, which lie as the recorded one did."""
        made = [
            torch.empty(
                (len(images), *shape), dtype=dtype, memory_format=torch.channels_last if is_map else torch.contiguous_format
            )
            for shape, dtype, is_map in self._results
        ]
        _OPS.plan_run(self._number, images, made)
        return tree_unflatten(made, self._tree)
