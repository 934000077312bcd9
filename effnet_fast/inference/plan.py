"""A network on the CPU as one native call: its kernels recorded for one image (csrc/inference/plan.h), replayed for any batch."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from effnet_fast import ops
from effnet_fast.inference.recording import Recording, Unplannable
from effnet_fast.ops import native
from effnet_fast.ops.library import define_native

define_native("plan_begin(int plan, Tensor image, int like) -> ()")
define_native("plan_end(int plan, Tensor[] results) -> int[]")
define_native("plan_run(int plan, Tensor images, Tensor[] results) -> ()")
define_native("plan_held(int plan) -> int")
define_native("plan_free(int plan) -> ()")
define_native("return_memory() -> ()")
_OPS = torch.ops.effnet_fast
_NUMBERS = itertools.count(1)


def return_memory() -> None:
    """Give the system back what kernels' results were in that are gone: on the CPU large ones take turns in memory that is kept."""
    if native.REASON is None:
        _OPS.return_memory()


class Size(NamedTuple):
    """Of a plan: kernels that it calls, bytes of what flows between them at once (for one image, at the end for four),
    bytes of the packed weights."""

    steps: int
    arena_bytes: int
    packed_bytes: int


class NativePlan:
    """``model``, which gives a tensor or several, for images of one shape, layout and dtype.

    like            another plan of the model: both share the packed weights, and the memory that they work in
    pixels, dtype   for uint8 images: what normalises them (:func:`effnet_fast.ops.conv_bn_act`), and in what the model computes

    Raises Unplannable where something in it is no kernel of ours, and what the model raises.
    """

    def __init__(self, model: nn.Module, image: Tensor, pixels: Tensor, dtype: torch.dtype, like: NativePlan | None = None) -> None:
        if native.REASON is not None:
            raise Unplannable(native.REASON)
        self._number = next(_NUMBERS)
        free = weakref.finalize(self, _OPS.plan_free, self._number)
        with torch.no_grad():  # inference mode would hide what a composite operator is made of
            try:
                _OPS.plan_begin(self._number, image, like._number if like else 0)
                recording = Recording(image, pixels, dtype)  # keeps what was recorded until the end
                with ops.backend("native"):
                    leaves, self._tree = tree_flatten(recording.joined(model, image))
                for leaf in leaves:
                    form = torch.channels_last if isinstance(leaf, Tensor) and leaf.dim() == 4 else torch.contiguous_format
                    if not (isinstance(leaf, Tensor) and leaf.shape[:1] == (1,) and leaf.is_contiguous(memory_format=form)):
                        raise Unplannable("a result is no batch of maps, channels_last, or of vectors")
                self._results = [(leaf.shape[1:], leaf.dtype, leaf.dim() == 4) for leaf in leaves]
                self.size = Size(*_OPS.plan_end(self._number, leaves))
            except BaseException:
                free()  # else this thread would go on recording
                raise

    def held(self) -> int:
        """Bytes of memory of this plan and of those that share with it."""
        return _OPS.plan_held(self._number)

    def __str__(self) -> str:
        steps, arena, packed = self.size
        return f"one native call of {steps} kernels; {arena / 1e6:.1f} MB at work a thread, {packed / 1e6:.1f} MB of weights"

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
