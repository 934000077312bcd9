"""Convolutions of a forward pass that no fused block makes, as calls of our ops.

The fused blocks call those ops themselves. A convolution outside of them, with the padding before it and the norm and activation
after it, is :class:`Joining`'s to make one op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from effnet_fast import ops
from effnet_fast.ops.common import activate_, empty_output
from effnet_fast.ops.conv.reference import normalised
from effnet_fast.ops.depthwise import is_taken

_ATEN = torch.ops.aten


class Unplannable(Exception):
    """Why a network's blocks run one by one, and not in native calls."""


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
