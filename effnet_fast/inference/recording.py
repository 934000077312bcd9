"""What a forward pass does to an image, as kernels of ours and the operators between them, for a plan of native calls.

:class:`Recording` is the strict form of :class:`effnet_fast.inference.joining.Joining`: the mean and the linear layer of a
classifier are ops too, and a view moves no data. An operator that is no kernel of ours is left for after the kernels before it; a
convolution or an op of ours that reads what it makes begins another native call (csrc/inference/plan.h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from effnet_fast import ops
from effnet_fast.inference.convolution import FoldedConvolution, Folding, is_folded
from effnet_fast.inference.joining import Convolution, Joining, Unplannable
from effnet_fast.ops.conv.reference import normalised

_OPS = torch.ops.effnet_fast
_ATEN = torch.ops.aten
_FLOWING = ("x", "partial", "gate", "residual")  # arguments of our ops that a native call reads anew for every image


class Later(NamedTuple):
    """An operator of PyTorch's, which runs on all images between or after the native calls. It makes the tensors ``made``."""

    name: str
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    made: list[Tensor]


class Segment:
    """Kernels that make one native call, and what comes after it.

    given  what the kernels read and none of them makes: the image, or what earlier segments have made of it
    later  the operators that follow, in their order
    """

    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.later: list[Later] = []


class Made(NamedTuple):
    """Where a tensor's memory was written last: by a kernel of a segment, or an operator after them. The image came before all."""

    segment: int
    is_later: bool


class Recording(Joining):
    """Follows what comes of ``image`` through a forward pass.

    folding   what folds convolutions for the network's other recordings too
    segments  what has been recorded, in its order
    """

    def __init__(self, image: Tensor, pixels: Tensor, dtype: torch.dtype, folding: Folding | None = None) -> None:
        super().__init__(pixels, dtype)
        self.image, self._folding = image, folding or Folding()
        self._made: dict[int, Made] = {}  # by the storage
        self._kernels: dict[int, int] = {}  # by the storage too, the segment whose kernels wrote it first
        self._operators: dict[int, Made] = {}  # by tensors that operators have made, views too; segments keep them all
        self._views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of what kernels make, by what makes them
        self._storages: list[StorageWeakRef] = []  # whose addresses are taken while these live; their memory is free
        self.segments: list[Segment] = []
        self._keep(image, Made(-1, False))
        self.begin()

    def begin(self) -> None:
        """Begin a segment."""
        self.segments.append(Segment())

    def give(self, tensor: Tensor) -> None:
        """Have the kernels of the segment read something that they do not make."""
        self.segments[-1].given.append(tensor)

    def _keep(self, tensor: Tensor, made: Made) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._made:
            self._storages.append(StorageWeakRef(storage))
        self._made[storage._cdata] = made
        return tensor

    def _keep_now(self, tensor: Tensor) -> Tensor:
        here = len(self.segments) - 1
        self._keep(tensor, Made(here, False))
        self._kernels[tensor.untyped_storage()._cdata] = here
        return tensor

    def kernels_of(self, tensor: Tensor) -> int:
        """The segment whose kernels have made it."""
        segment = self._kernels.get(tensor.untyped_storage()._cdata)
        if segment is None:
            raise Unplannable("something that does not come of the image is read with what does")
        return segment

    def made_in(self, tensor: Any) -> Made | None:
        """None: it does not come of the image."""
        if not isinstance(tensor, Tensor):
            return None
        made = self._operators.get(id(tensor)), self._made.get(tensor.untyped_storage()._cdata)
        return max((of for of in made if of is not None), default=None)  # of an operator's, also what wrote to it after

    def follows(self, tensor: Any) -> bool:
        """Whether it comes of the image."""
        return isinstance(tensor, Tensor) and (tensor in self._placeholders or self.made_in(tensor) is not None)

    def _is_later(self, tensor: Any) -> bool:
        made = self.made_in(tensor)
        return made is not None and made.is_later

    def _is_others(self, tensor: Any) -> bool:
        """Whether another segment's kernels have made it, or an operator."""
        made = self.made_in(tensor)
        return made is not None and made != (len(self.segments) - 1, False)

    def _check_constants(self, op: Any, given: dict[str, Any]) -> None:
        """A plan packs or copies them as they are when it is made."""
        for name, value in given.items():
            if self.follows(value):
                raise Unplannable(f"{op}: {name} is made of the image")

    def _check_written(self, op: Any, tensors: Iterable[Any]) -> None:
        if any(self._is_later(tensor) and id(tensor) not in self._operators for tensor in tensors):
            raise Unplannable(f"{op} reads what was written through another tensor")

    def _read(self, op: Any, tensors: dict[str, Tensor], any_order: bool = False) -> dict[str, Tensor]:
        """What a kernel is to read instead of ``tensors``: what its segment makes or is given, maps channels_last but for a kernel
        that takes them in ``any_order``."""
        self._check_written(op, tensors.values())
        for name, tensor in tensors.items():
            if self.made_in(tensor) is None:
                raise Unplannable(f"{op}: {name} does not come of the image")
            form = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
            lies = tensor.is_contiguous(memory_format=form) or (any_order and tensor.is_contiguous())
            if self._is_others(tensor) and not lies:
                tensors = tensors | {name: self._leave(_ATEN.clone.default, (tensor,), {"memory_format": form})}
        here = len(self.segments) - 1
        if any(self.made_in(tensor) == (here, True) for tensor in tensors.values()):
            self.begin()
        for tensor in tensors.values():
            if self._is_others(tensor) and not any(tensor is given for given in self.segments[-1].given):
                if len(tensor) != len(self.image):
                    raise Unplannable(f"{op} reads no batch of images")
                self.give(tensor)
        return tensors

    def _leave(self, func: Any, args: Any, kwargs: Any, result: Any = None) -> Any:
        """Have an operator run after the kernels so far, and give what it makes of this image."""
        if not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}.isdisjoint(func.tags):
            raise Unplannable(f"{func} gives Python what depends on the image")
        self.leave_views(tree_flatten((args, kwargs))[0])
        self._check_written(func, tree_flatten((args, kwargs))[0])
        result = func(*args, **kwargs) if result is None else result
        made = tree_flatten(result)[0]
        if func.namespace == "effnet_fast" or not all(isinstance(t, Tensor) for t in made):
            raise Unplannable(f"{func} is no kernel of ours")
        if func._schema.is_mutable and any(self.made_in(tensor) is None for tensor in made):
            raise Unplannable(f"{func} writes what comes of the image to what does not")
        if func._schema.name in _BATCH_NORMS and any(given is True for given in args):
            raise Unplannable(f"{func} takes statistics of a batch")
        if func in _VIEWS and len(self.image) == 1 and result.dim() > 0:
            args = args[0], [-1, *result.shape[1:]]  # of however many images
        if func == _ATEN.expand.default and args[0].shape[:1] == result.shape[:1] and args[0].dim() == result.dim():
            args = args[0], [-1, *result.shape[1:]], *args[2:]
        if func == _ATEN.native_group_norm.default:  # the same, which is not told their number
            x, weight, bias, *_, groups, eps = args
            func, args, made = _ATEN.group_norm.default, (x, groups, weight, bias, eps), made[:1]
        self._add(Later(func._schema.name.removeprefix("aten::"), func, args, kwargs, made), func._schema.is_mutable)
        return result

    def leave_views(self, tensors: Iterable[Any]) -> None:
        """Have operators make those of ``tensors`` that are views of what kernels make, but for one that is all of it, in order."""
        for tensor in tensors:
            view = self._views.get(tensor) if isinstance(tensor, Tensor) and id(tensor) not in self._operators else None
            if view is not None and not (len(tensor) == len(self.image) and _is_whole(tensor)):
                func, args, kwargs = view
                self._leave(func, args, kwargs, tensor)

    def _add(self, later: Later, writes: bool = False) -> None:
        self.segments[-1].later.append(later)
        for tensor in later.made:
            made = self._operators[id(tensor)] = Made(len(self.segments) - 1, True)
            if writes or tensor.untyped_storage()._cdata not in self._made:  # not of a view
                self._keep(tensor, made)

    def computed(self, convolution: Convolution) -> Tensor:
        op = "a convolution or a linear layer"
        self._check_constants(op, convolution.constants())
        x, weight, stride = convolution.x, convolution.weight, convolution.stride
        if weight is None:
            return self._leave_image(convolution)
        if convolution.is_window and convolution.pixels is None and is_folded(x, weight, stride):
            norm, padding, activation = convolution.whole_norm(), convolution.padding, convolution.activation
            return self._fold(self._folding(weight, norm, stride, padding, activation), x)
        x = self._read(op, {"x": x}, convolution.is_window)["x"]
        return self._keep_now(convolution._replace(x=x).run())

    def _leave_image(self, convolution: Convolution) -> Tensor:
        """A uint8 image, or the padding around one, that is not a convolution's after all."""
        x, pixels, dtype = convolution.x, convolution.pixels, convolution.dtype
        if pixels is not None:
            y = normalised(x, pixels, dtype)
            self._add(Later("normalised", normalised, (x, pixels, dtype), {}, [y]))
            x = y
        top, bottom, left, right = convolution.padding
        return self._leave(_ATEN.constant_pad_nd.default, (x, [left, right, top, bottom]), {}) if any(convolution.padding) else x

    def _fold(self, convolution: FoldedConvolution, *read: Tensor) -> Tensor:
        self._check_written("a convolution", read)
        y = convolution(*read)
        self._add(Later("convolution", convolution, read, {}, [y]))
        return y

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(map(self.follows, tree_flatten((args, kwargs))[0])):
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise Unplannable(f"{func} would give the same each time")
            return func(*args, **(kwargs or {}))  # of weights alone: a constant
        return super().__torch_dispatch__(func, types, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "effnet_fast":
            if not func._overloadname.startswith("native"):
                raise Unplannable(f"{func} runs on another backend than native")
            names = (argument.name for argument in func._schema.arguments)
            given = dict(zip(names, args, strict=False)) | kwargs
            flowing = {name: given[name] for name in _FLOWING if isinstance(given.get(name), Tensor)}
            self._check_constants(func, {name: value for name, value in given.items() if name not in flowing})
            if func._schema.name == "effnet_fast::conv_bn_act" and given["pixels"] is None:
                x, weight, stride, residual = (given[name] for name in ("x", "weight", "stride", "residual"))
                if is_folded(x, weight, stride):
                    norm = ops.Norm(*(given[f"norm_{name}"] for name in ops.Norm._fields))
                    folded = self._folding(weight, norm, stride, given["padding"], given["activation"])
                    return self._fold(folded, x, *([] if residual is None else [residual]))
            return tree_map(self._keep_now, func(**given | self._read(func, flowing, "::conv_bn_act" in func._schema.name)))
        if func == _ATEN.as_strided_.default and _strides_only_what_is_one(*args):
            return func(*args, **kwargs)  # as adaptive pooling does
        read = tree_flatten((args, kwargs))[0]
        if any(map(self._is_later, read)) or _takes_images(func, args, kwargs):
            return self._leave(func, args, kwargs)
        if func in _REPLACED and not any(map(self._is_others, read)):
            replaced = _REPLACED[func](*args, **kwargs)
            if replaced is not None:
                return self.computed(replaced)[:, :, 0, 0] if isinstance(replaced, Convolution) else self._keep_now(replaced)
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        made = None if writes else func(*args, **kwargs)
        if isinstance(made, Tensor) and self.follows(made) and self.made_in(made) != Made(-1, False):
            if made is not args[0]:
                self._views[made] = func, args, kwargs
            return made
        return self._leave(func, args, kwargs, made)


def _is_whole(tensor: Tensor) -> bool:
    """Whether it is all of its memory, a map's channels last."""
    form = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.is_contiguous(memory_format=form) and tensor.nbytes == tensor.untyped_storage().nbytes()


# What an operator is in a plan, a convolution still to be computed or made; None where it is none of ours.


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    if x.dim() != 4 or dim is None or sorted(d % 4 for d in dim) != [2, 3] or dtype not in (None, x.dtype):
        return None
    y = _OPS.global_average_pool.native(x)
    return y[:, :, None, None] if keepdim else y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Convolution | None:
    """A 1x1 convolution of images of one pixel."""
    if x.dim() != 2:
        return None
    return Convolution.of(x[:, :, None, None], weight=weight[:, :, None, None], bias=bias)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Convolution | None:
    if beta != 1 or alpha != 1:
        return None
    return _linear(x, weight.t(), bias)


def _mm(x: Tensor, weight: Tensor) -> Convolution | None:
    return _linear(x, weight.t())


class Unread(TorchFunctionMode):
    """Refuses to give Python the values of what a recording follows: a plan would keep those of one image."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = (
            args[:1]
            if func in _READING
            else ()
            if func not in _COLLECTING or isinstance(args[0], Tensor)
            else tree_flatten(args)[0]
        )
        if any(map(self._recording.follows, read)):
            raise Unplannable(f"{func.__name__} gives Python what depends on the image")
        return func(*args, **(kwargs or {}))


def _strides_only_what_is_one(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    """Whether ``as_strided_`` leaves every value of it where it is."""
    if tuple(size) != tuple(tensor.shape) or offset not in (None, tensor.storage_offset()):
        return False
    return all(n == 1 or new == old for n, new, old in zip(size, stride, tensor.stride(), strict=True))


def _takes_images(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is made for some images of a batch, which of one are all."""
    if func._schema.name not in _TAKING:
        return False
    given = {argument.name: argument.default_value for argument in func._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    return given["dim"] in (0, -args[0].dim())


_READING = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
_COLLECTING = (torch.tensor, torch.as_tensor, torch.asarray)  # the values of tensors in a sequence
_BATCH_NORMS = ("aten::native_batch_norm", "aten::_native_batch_norm_legit")
_TAKING = {f"aten::{name}" for name in ("slice", "select", "split", "split_with_sizes", "unbind", "index_select")}
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)
_REPLACED: dict[Any, Callable[..., Tensor | Convolution | None]] = {
    _ATEN.mm.default: _mm,
    _ATEN.mean.dim: _mean,
    _ATEN.linear.default: _linear,
    _ATEN.addmm.default: _addmm,
}
