"""What a forward pass does to an image, as calls of our ops.

The fused blocks call those ops themselves. A convolution outside of them, with the padding before it and the norm and activation
after it, is :class:`Joining`'s to make one op. :class:`Recording` is the strict form of it for a plan of native calls
(csrc/inference/plan.h): there the mean and the linear layer of a classifier are ops too, and a view moves no data. An operator that
is no kernel of ours is left for after the kernels before it; a convolution or an op of ours that reads what it makes begins another
native call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from effnet_fast import ops
from effnet_fast.inference.convolution import FoldedConvolution, Folding, is_folded
from effnet_fast.ops.common import activate_, empty_output
from effnet_fast.ops.conv.reference import normalised
from effnet_fast.ops.depthwise import is_taken

_OPS = torch.ops.effnet_fast
_ATEN = torch.ops.aten
_FLOWING = ("x", "partial", "gate", "residual")  # arguments of our ops that a native call reads anew for every image


class Unplannable(Exception):
    """Why a network cannot be one native call."""


class Convolution(NamedTuple):
    """One that has not been called yet: what follows may belong to it. Without a weight it is a uint8 image, or the padding before
    a convolution."""

    x: Tensor
    dtype: torch.dtype  # of the result, whatever that of an image
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    weight: Tensor | None = None
    bias: Tensor | None = None
    stride: int = 1
    groups: int = 1
    norm: ops.Norm | None = None
    activation: str = "identity"
    pixels: Tensor | None = None  # of a uint8 image

    @classmethod
    def of(cls, x: Tensor, **given: Any) -> Convolution:
        return cls(x, x.dtype, **given)

    @property
    def is_image(self) -> bool:
        return self.pixels is not None and self.weight is None and not any(self.padding)

    @property
    def is_window(self) -> bool:
        """Whether it is :func:`effnet_fast.ops.conv_bn_act`, of several pixels and channels each."""
        if self.weight is None or self.groups != 1:
            return False
        return self.weight.shape[2:] != (1, 1) or self.stride != 1 or any(self.padding) or self.pixels is not None

    def constants(self) -> dict[str, Any]:
        """What it reads beside ``x``: the weights and the norm."""
        return {"weight": self.weight, "bias": self.bias, **({} if self.norm is None else self.norm._asdict())}

    def read(self) -> list[Tensor]:
        """The tensors that it reads."""
        return [t for t in (self.x, *self.constants().values()) if isinstance(t, Tensor)]

    def placeholder(self) -> Tensor:
        """A tensor like the result, which has no memory."""
        if self.weight is None:
            *outer, height, width = self.x.shape
            top, bottom, left, right = self.padding
            last = self.x.is_contiguous(memory_format=torch.channels_last)
            form = torch.channels_last if last else torch.contiguous_format
            shape = (*outer, height + top + bottom, width + left + right)
            y = torch.empty(shape, dtype=self.dtype, device=self.x.device, memory_format=form)
        else:
            y = empty_output(self.x, self.weight, self.stride, self.padding, self.dtype)
        y.untyped_storage().resize_(0)
        return y

    def whole_norm(self) -> ops.Norm:
        """With the bias in it."""
        assert self.weight is not None
        if self.norm is None:
            zeros = torch.zeros(len(self.weight), device=self.weight.device)
            return ops.Norm(None, None if self.bias is None else self.bias.float(), zeros, zeros + 1, 0.0)
        return self.norm if self.bias is None else self.norm._replace(mean=self.norm.mean - self.bias.to(self.norm.mean.dtype))

    def run(self) -> Tensor:
        """As an op of ours."""
        if self.weight is None:
            raise Unplannable("what is no convolution follows a uint8 image, or zeros around an image")
        norm = self.whole_norm()
        window = {"stride": self.stride, "padding": self.padding, "activation": self.activation}
        if self.groups == 1 and not self.is_window:
            return ops.pointwise_conv_bn_act(self.x, self.weight, norm, activation=self.activation)
        if self.groups == 1:
            return ops.conv_bn_act(self.x, self.weight, norm, **window, pixels=self.pixels)  # type: ignore[arg-type]
        return ops.depthwise_conv_bn_act(self.image(), self.weight, norm, squeeze=False, **window)[0]  # type: ignore[arg-type]

    def image(self) -> Tensor:
        """``x``, normalised."""
        return self.x if self.pixels is None else normalised(self.x, self.pixels, self.dtype)

    def run_plain(self) -> Tensor:
        """By PyTorch's own operators, where it has no norm: there is little to join."""
        top, bottom, left, right = self.padding
        even = (top, left) == (bottom, right) and self.weight is not None
        x = self.image() if even or not any(self.padding) else F.pad(self.image(), (left, right, top, bottom))
        if self.weight is None:
            return x
        y = F.conv2d(x, self.weight, self.bias, self.stride, (top, left) if even else 0, groups=self.groups)
        return activate_(y, self.activation).contiguous(memory_format=torch.channels_last)


class Joining(TorchDispatchMode):
    """Runs each convolution that a norm follows as one op, with the padding and the activation around it. All else runs as it is.

    pixels, dtype   for a uint8 image: what normalises it (:func:`effnet_fast.ops.conv_bn_act`), and in what the network computes

    What a convolution, norm or activation gives meanwhile is a placeholder. Whatever the op has made of it takes its place where
    another operator reads it; results of the pass are to be mapped by :meth:`made_of`.
    """

    def __init__(self, pixels: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._pixels, self._dtype = pixels, dtype
        self._placeholders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # what stands for them, made or to be made

    def made_of(self, value: Any) -> Any:
        """``value``, or the tensor that takes its place."""
        made = self._placeholders.get(value) if isinstance(value, Tensor) else None
        if isinstance(made, Convolution):
            made = self._placeholders[value] = self.computed(made)
        return value if made is None else made

    def computed(self, convolution: Convolution) -> Tensor:
        return convolution.run_plain() if convolution.norm is None else convolution.run()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What :meth:`__torch_dispatch__` does with an operator that joins nothing, of tensors that are no placeholders."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument in tree_flatten((args, kwargs))[0]:
                self._make_readers_of(argument)
        before = self._placeholders.get(args[0]) if args and isinstance(args[0], Tensor) else None
        before = before if isinstance(before, Convolution) else None
        if func in _JOINED:
            rest = tree_map(self.made_of, args[1:])
            after = _JOINED[func](before, *rest, **kwargs) if before else None
            after = after or _JOINED[func](Convolution.of(self.made_of(args[0])), *rest, **kwargs)
            if after is not None:
                result = args[0] if func._schema.is_mutable else after.placeholder()
                self._placeholders[result] = after
                if after.activation != "identity":
                    self.made_of(result)  # now: nothing more can belong to it
                statistics = [result.new_empty(0) for _ in func._schema.returns[1:]]  # of a norm: none in evaluation
                return (result, *statistics) if statistics else result
        if func._schema.name == "effnet_fast::conv_bn_act" and before is not None and before.is_image:
            args = before.x, *args[1:-1], before.pixels  # the stem of a net of ours takes the image as it is
        return self.run(func, *tree_map(self.made_of, (args, kwargs)))

    def _make_readers_of(self, written: Any) -> None:
        """Compute what waits to read the memory of a tensor that may be written now."""
        if isinstance(written, Tensor):
            written = self._placeholders.get(written, written)
        if isinstance(written, Tensor):  # what is still to be computed nobody waits for
            memory = written.untyped_storage()._cdata
            for placeholder, made in list(self._placeholders.items()):
                if isinstance(made, Convolution) and any(t.untyped_storage()._cdata == memory for t in made.read()):
                    self.made_of(placeholder)

    def _fill_placeholders(self) -> None:
        """Give those that somebody has kept what they stand for."""
        for placeholder, made in list(self._placeholders.items()):
            if isinstance(made, Convolution):
                made = made.run_plain() if made.norm is None else made.run()
            placeholder.set_(made)

    def joined(self, model: Callable[[Tensor], Any], image: Tensor) -> Any:
        """``model(image)``; a uint8 image is normalised where the first convolution reads it."""
        if image.dtype == torch.uint8:
            assert self._dtype is not None
            convolution = Convolution(image, self._dtype, pixels=self._pixels)
            image = convolution.placeholder()
            self._placeholders[image] = convolution
        with self:
            results = model(image)
        results = tree_map(self.made_of, results)
        del image
        self._fill_placeholders()
        return results


def run_joined(
    model: Callable[[Tensor], Any], image: Tensor, pixels: Tensor | None = None, dtype: torch.dtype | None = None
) -> Any:
    """``model(image)``, with what can be joined joined."""
    return Joining(pixels, dtype).joined(model, image)


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
        return self._kernels[tensor.untyped_storage()._cdata]

    def made_in(self, tensor: Any) -> Made | None:
        """None: it does not come of the image."""
        if not isinstance(tensor, Tensor):
            return None
        return self._operators.get(id(tensor)) or self._made.get(tensor.untyped_storage()._cdata)

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
        self._check_written(func, tree_flatten((args, kwargs))[0])
        result = func(*args, **kwargs) if result is None else result
        made = tree_flatten(result)[0]
        if func.namespace == "effnet_fast" or not all(isinstance(t, Tensor) for t in made):
            raise Unplannable(f"{func} is no kernel of ours")
        if func in _VIEWS and len(args[0]) == len(result) == 1:
            args = args[0], [-1, *result.shape[1:]]  # of however many images
        if func == _ATEN.native_group_norm.default:  # the same, which is not told their number
            x, weight, bias, *_, groups, eps = args
            func, args, made = _ATEN.group_norm.default, (x, groups, weight, bias, eps), made[:1]
        self._add(Later(func._schema.name.removeprefix("aten::"), func, args, kwargs, made), func._schema.is_mutable)
        return result

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
        if weight is not None and convolution.is_window and convolution.pixels is None and is_folded(x, weight, stride):
            norm, padding, activation = convolution.whole_norm(), convolution.padding, convolution.activation
            return self._fold(self._folding(weight, norm, stride, padding, activation), x)
        x = self._read(op, {"x": x}, convolution.is_window)["x"]
        return self._keep_now(convolution._replace(x=x).run())

    def _fold(self, convolution: FoldedConvolution, *read: Tensor) -> Tensor:
        self._check_written("a convolution", read)
        y = convolution(*read)
        self._add(Later("convolution", convolution, read, {}, [y]))
        return y

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(map(self.follows, tree_flatten((args, kwargs))[0])):
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
            return made  # a view, or the same
        return self._leave(func, args, kwargs, made)


# What follows is given what was there before: the result of a convolution that waits, or with no weight an image. It is None where
# the operator does not belong to it.


def _pad(before: Convolution, pad: list[int], value: float = 0) -> Convolution | None:
    if before.weight is not None or any(before.padding) or before.x.dim() != 4 or len(pad) != 4 or value != 0 or min(pad) < 0:
        return None
    left, right, top, bottom = pad
    return before._replace(padding=(top, bottom, left, right))


def _convolution(before, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Convolution | None:
    if before.weight is not None or weight.dim() != 4 or transposed:
        return None
    if any(d != 1 for d in dilation) or stride[0] != stride[-1]:
        return None
    depthwise = groups == len(weight) == before.x.shape[1] and is_taken(weight, stride[0])
    if groups != 1 and not depthwise:
        return None
    top, bottom, left, right = before.padding
    zeros = top + padding[0], bottom + padding[0], left + padding[-1], right + padding[-1]
    return before._replace(padding=zeros, weight=weight, bias=bias, stride=stride[0], groups=groups)


def _norm(before, weight, bias, mean, var, *rest) -> Convolution | None:
    """Of evaluation; ``rest`` is (training,) momentum, eps."""
    if before.weight is None or before.norm is not None or before.activation != "identity":
        return None
    if len(rest) == 3 and rest[0]:
        return None
    return before._replace(norm=ops.Norm(weight, bias, mean, var, rest[-1]))


def _activation(name: str) -> Callable[..., Convolution | None]:
    def joined(before: Convolution, *bounds: float) -> Convolution | None:
        if before.weight is None or before.activation != "identity" or bounds != ((0, 6) if name == "relu6" else ()):
            return None
        return before._replace(activation=name)

    return joined


_JOINED: dict[Any, Callable[..., Convolution | None]] = {
    _ATEN.constant_pad_nd.default: _pad,
    _ATEN.convolution.default: _convolution,
    _ATEN.native_batch_norm.default: _norm,
    _ATEN.cudnn_batch_norm.default: _norm,
    _ATEN._native_batch_norm_legit_no_training.default: _norm,
    **{getattr(_ATEN, name).default: _activation(name) for name in ("silu", "relu")},
    **{getattr(_ATEN, f"{name}_").default: _activation(name) for name in ("silu", "relu")},
    _ATEN.hardtanh.default: _activation("relu6"),
    _ATEN.hardtanh_.default: _activation("relu6"),
}


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
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and self._recording.follows(args[0]):
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


_TAKING = {f"aten::{name}" for name in ("slice", "select", "split", "split_with_sizes", "unbind", "index_select")}
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)
_REPLACED: dict[Any, Callable[..., Tensor | Convolution | None]] = {
    _ATEN.mm.default: _mm,
    _ATEN.mean.dim: _mean,
    _ATEN.linear.default: _linear,
    _ATEN.addmm.default: _addmm,
}
