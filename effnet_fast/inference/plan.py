"""A network on the CPU as native calls: kernels recorded for one image (csrc/inference/plan.h), replayed for any batch.

It is one where all of the network is kernels of ours. What none is for runs as PyTorch's operators before, after and between.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from effnet_fast import ops
from effnet_fast.inference.convolution import Folding
from effnet_fast.inference.joining import Unplannable
from effnet_fast.inference.recording import Recording, Unread
from effnet_fast.ops import native
from effnet_fast.ops.library import define_native

define_native("plan_begin(int plan, int like) -> ()")
define_native("plan_input(int plan, Tensor given) -> ()")
define_native("plan_stop(int plan) -> ()")
define_native("plan_end(int plan, Tensor[] results) -> int[]")
define_native("plan_run(int plan, int images, Tensor[] given, Tensor[] results) -> ()")
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
    """Of a plan: native calls, kernels that they call, bytes of what flows between them at once (for one image, at the end for
    four)."""

    calls: int
    steps: int
    arena_bytes: int


@dataclass(frozen=True)
class _Value:
    """A tensor that comes of the images, where a step reads it."""

    number: int


class _Step:
    """Of a plan: a native call, or an operator of PyTorch's. Both read and make numbered values.

    made  the numbers of what it makes
    done  of what no step after it reads
    """

    def __init__(self, read: set[int], made: list[int]) -> None:
        self.read, self.made = read, made
        self.done: list[int] = []

    def run(self, values: dict[int, Tensor]) -> list[Tensor]:
        raise NotImplementedError


class _Operator(_Step):
    def __init__(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, made: list[int]) -> None:
        super().__init__({v.number for v in tree_flatten((args, kwargs))[0] if isinstance(v, _Value)}, made)
        self.name, self._func, self._args, self._kwargs = name, func, args, kwargs

    def run(self, values: dict[int, Tensor]) -> list[Tensor]:
        args, kwargs = tree_map(lambda v: values[v.number] if isinstance(v, _Value) else v, (self._args, self._kwargs))
        return tree_flatten(self._func(*args, **kwargs))[0]


class _Call(_Step):
    """The kernels of a segment.

    plan     its number, under which csrc/binding/plan.cpp keeps what was recorded
    given    what it reads, with numbers
    results  what others read of what it makes, with numbers
    """

    def __init__(self, plan: int, given: dict[int, Tensor], results: dict[int, Tensor]) -> None:
        super().__init__(set(given), list(results))
        self._plan = plan
        self._given = [(number, (t.numel(), *t.stride()[1:])) for number, t in given.items()]
        self._results = []
        for made in results.values():
            form = torch.channels_last if made.dim() == 4 else torch.contiguous_format
            if not (made.shape[:1] == (1,) and made.is_contiguous(memory_format=form)):
                raise Unplannable("what kernels make is read as no batch of maps, channels_last, or of vectors")
            self._results.append((made.shape[1:], made.dtype, form))
        self.steps, self.arena_bytes = _OPS.plan_end(plan, list(results.values()))

    def run(self, values: dict[int, Tensor]) -> list[Tensor]:
        given = [_laid_out(values[number], stride) for number, stride in self._given]
        images = len(given[0])
        made = [torch.empty((images, *shape), dtype=dtype, memory_format=form) for shape, dtype, form in self._results]
        _OPS.plan_run(self._plan, images, given, made)
        return made


def _laid_out(images: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``images`` with a stride that they need not have yet."""
    if all(size == 1 or has == wanted for size, has, wanted in zip(images.shape, images.stride(), stride, strict=True)):
        return images
    return torch.empty_strided(images.shape, stride, dtype=images.dtype).copy_(images)


class _Recording(Recording):
    """Whose segments are plans, with numbers."""

    def __init__(self, image: Tensor, pixels: Tensor, dtype: torch.dtype, folding: Folding, plans: list[int], like: int) -> None:
        self._plans, self._like = plans, like
        super().__init__(image, pixels, dtype, folding)

    def begin(self) -> None:
        super().begin()
        if self._plans:
            _OPS.plan_stop(self._plans[-1])
        self._plans.append(next(_NUMBERS))
        _OPS.plan_begin(self._plans[-1], self._like or (self._plans[0] if len(self._plans) > 1 else 0))

    def give(self, tensor: Tensor) -> None:
        super().give(tensor)
        _OPS.plan_input(self._plans[-1], tensor)


def _steps(recording: Recording, plans: list[int], leaves: Sequence[Tensor]) -> tuple[list[_Step], list[int]]:
    """What was recorded, of segments that are ``plans``, and the numbers of the network's results; 0 is the images. Of ``plans``
    those stay that something is read of."""
    numbers = {id(recording.image): 0}  # by tensors that the recording keeps
    results: list[dict[int, Tensor]] = [{} for _ in plans]  # of each segment, what others read

    def number_of(tensor: Tensor) -> int:
        if id(tensor) not in numbers:  # no operator has made it: kernels do
            made = results[recording.kernels_of(tensor)]
            alike = (number for number, other in made.items() if tensor.is_set_to(other))
            numbers[id(tensor)] = number = next(alike, len(numbers))
            made[number] = tensor
        return numbers[id(tensor)]

    after = []
    given = []
    for segment in recording.segments:
        given.append({number_of(tensor): tensor for tensor in segment.given})
        steps: list[_Step] = []
        for name, func, args, kwargs, made in segment.later:
            read = tree_map(lambda t: t if recording.made_in(t) is None else _Value(number_of(t)), (args, kwargs))
            steps.append(_Operator(name, func, read[0], read[1], [numbers.setdefault(id(t), len(numbers)) for t in made]))
        after.append(steps)
    read_last = [number_of(leaf) for leaf in leaves]

    steps = []
    for plan, segment_given, segment_results, operators in zip(list(plans), given, results, after, strict=True):
        if segment_results:
            steps.append(_Call(plan, segment_given, segment_results))
        else:
            plans.remove(plan)
            _OPS.plan_free(plan)
        steps += operators
    needed = set(read_last)
    for step in reversed(steps):
        step.done = [number for number in {*step.read, *step.made} if number not in needed]
        needed |= step.read
    return steps, read_last


def _names(steps: Sequence[_Step]) -> str:
    return ", ".join(dict.fromkeys(step.name for step in steps if isinstance(step, _Operator)))


def _free(plans: list[int]) -> None:
    """Called by the garbage collector too, whatever this thread does then: a trace must not see it."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        for plan in plans:
            _OPS.plan_free(plan)


class NativePlan:
    """``model``, which gives a tensor or several, for images of one shape, layout and dtype.

    like            another plan of the model: both share the packed weights, and the memory that they work in
    pixels, dtype   for uint8 images: what normalises them (:func:`effnet_fast.ops.conv_bn_act`), and in what the model computes

    Raises Unplannable where there is nothing to gain or what runs depends on what is in an image, and what the model raises.
    """

    def __init__(self, model: nn.Module, image: Tensor, pixels: Tensor, dtype: torch.dtype, like: NativePlan | None = None) -> None:
        if native.REASON is not None:
            raise Unplannable(native.REASON)
        self._folding: Folding = like._folding if like else Folding()
        self._plans: list[int] = []
        free = weakref.finalize(self, _free, self._plans)
        with torch.no_grad():  # inference mode would hide what a composite operator is made of
            try:
                recording = _Recording(image, pixels, dtype, self._folding, self._plans, like._plans[0] if like else 0)
                with ops.backend("native"), Unread(recording):
                    leaves, self._tree = tree_flatten(recording.joined(model, image))
                if not all(map(recording.follows, leaves)):
                    raise Unplannable("a result does not come of the image")
                recording.leave_views(leaves)
                self._steps, self._leaves = _steps(recording, self._plans, leaves)
                if not self._plans:
                    raise Unplannable("nothing of it is a kernel of ours")
            except BaseException:
                free()  # else this thread would go on recording
                raise
        calls = [step for step in self._steps if isinstance(step, _Call)]
        self.size = Size(
            len(calls),
            sum(call.steps for call in calls),
            max((call.arena_bytes for call in calls), default=0),
        )

    def held(self) -> int:
        """Bytes of memory of this plan and of those that share with it."""
        return _OPS.plan_held(self._plans[0]) + self._folding.nbytes()

    def __str__(self) -> str:
        calls, kernels, arena = self.size
        if calls == 1:
            where = next(i for i, step in enumerate(self._steps) if isinstance(step, _Call))
            before, after = _names(self._steps[:where]), _names(self._steps[where:])
            told = f"one native call of {kernels} kernels"
            told = (f"{before}, then " if before else "") + told + (f", then {after}" if after else "")
        else:
            told = f"{calls} native calls of {kernels} kernels, and {_names(self._steps)}"
        return f"{told}; {arena / 1e6:.1f} MB at work a thread"

    def __call__(self, images: Tensor) -> Any:
        """What the model gives for ``images``, which lie as the recorded one did."""
        values = {0: images}
        for step in self._steps:
            values.update(zip(step.made, step.run(values), strict=True))
            for number in step.done:
                del values[number]
        return tree_unflatten([values[number] for number in self._leaves], self._tree)
