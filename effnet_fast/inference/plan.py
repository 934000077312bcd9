"""A network on the CPU as one native call: its kernels recorded for one image (csrc/inference/plan.h), replayed for any batch."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from effnet_fast import ops
from effnet_fast.inference.recording import Recording, Unplannable, Unread
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


@dataclass(frozen=True)
class _Value:
    """A tensor that comes of the images, where an operator after the plan reads it."""

    number: int


class _Rest:
    """The operators that are left for after the plan, as calls on numbered values.

    given  what they read, or the network gives, that the plan makes: of the recorded image
    """

    def __init__(self, recording: Recording, leaves: Sequence[Any]) -> None:
        self.given: list[Tensor] = []
        self._numbers: dict[int, int] = {}  # by the tensor, which the recording keeps
        self._given_numbers: list[int] = []
        self._steps = []
        for func, args, kwargs, made in recording.later:
            read = tree_map(lambda t: self._value_of(t) if recording.follows(t) else t, (args, kwargs))
            self._steps.append((func, *read, [self._number_of(t) for t in made]))
        self._leaves = [self._value_of(leaf).number for leaf in leaves]

    def _number_of(self, tensor: Tensor) -> int:
        return self._numbers.setdefault(id(tensor), len(self._numbers))

    def _value_of(self, tensor: Tensor) -> _Value:
        if id(tensor) not in self._numbers:  # nobody has made it: the plan does
            self.given.append(tensor)
            self._given_numbers.append(self._number_of(tensor))
        return _Value(self._numbers[id(tensor)])

    def __str__(self) -> str:
        return ", ".join(func._schema.name.removeprefix("aten::") for func, *_ in self._steps)

    def __call__(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The results of the network, of the plan's."""
        values = dict(zip(self._given_numbers, given, strict=True))
        for func, args, kwargs, numbers in self._steps:
            args, kwargs = tree_map(lambda v: values[v.number] if isinstance(v, _Value) else v, (args, kwargs))
            values.update(zip(numbers, tree_flatten(func(*args, **kwargs))[0], strict=True))
        return [values[number] for number in self._leaves]


class NativePlan:
    """``model``, which gives a tensor or several, for images of one shape, layout and dtype.

    like            another plan of the model: both share the packed weights, and the memory that they work in
    pixels, dtype   for uint8 images: what normalises them (:func:`effnet_fast.ops.conv_bn_act`), and in what the model computes

    Raises Unplannable where a convolution follows something that is no kernel of ours, and what the model raises.
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
                with ops.backend("native"), Unread(recording):
                    leaves, self._tree = tree_flatten(recording.joined(model, image))
                if not all(map(recording.follows, leaves)):
                    raise Unplannable("a result does not come of the image")
                self._rest = _Rest(recording, leaves)
                for made in self._rest.given:
                    form = torch.channels_last if made.dim() == 4 else torch.contiguous_format
                    if not (made.shape[:1] == (1,) and made.is_contiguous(memory_format=form)):
                        raise Unplannable("a result is no batch of maps, channels_last, or of vectors")
                self._results = [(made.shape[1:], made.dtype, made.dim() == 4) for made in self._rest.given]
                self.size = Size(*_OPS.plan_end(self._number, self._rest.given))
                self._rest.given.clear()  # as large as the image
            except BaseException:
                free()  # else this thread would go on recording
                raise

    def held(self) -> int:
        """Bytes of memory of this plan and of those that share with it."""
        return _OPS.plan_held(self._number)

    def __str__(self) -> str:
        steps, arena, packed = self.size
        rest = f", then {self._rest}" if str(self._rest) else ""
        return f"one native call of {steps} kernels{rest}; {arena / 1e6:.1f} MB at work a thread, {packed / 1e6:.1f} MB of weights"

    def __call__(self, images: Tensor) -> Any:
        """What the model gives for ``images``, which lie as the recorded one did."""
        made = [
            torch.empty(
                (len(images), *shape), dtype=dtype, memory_format=torch.channels_last if is_map else torch.contiguous_format
            )
            for shape, dtype, is_map in self._results
        ]
        _OPS.plan_run(self._number, images, made)
        return tree_unflatten(self._rest(made), self._tree)
