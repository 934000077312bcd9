"""What a forward pass does to an image, as calls of the native ops, which a plan records (csrc/inference/plan.h).

The fused blocks call those ops themselves. A convolution outside of them, with the padding before it and the norm and activation
after it, becomes one; so do the mean and the linear layer of a classifier. A view moves no data. Anything else that touches what
came of the image is :class:`Unplannable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from effnet_fast import ops

_OPS = torch.ops.effnet_fast
_ATEN = torch.ops.aten


class Unplannable(Exception):
    """Why a network cannot be one native call."""


class Convolution(NamedTuple):
    """One that has not been called yet: what follows may belong to it. Without a weight it is a uint8 image, or the padding before
    a convolution."""

    x: Tensor
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    weight: Tensor | None = None
    bias: Tensor | None = None
    stride: int = 1
    groups: int = 1
    norm: ops.Norm | None = None
    activation: str = "identity"
    pixels: Tensor | None = None  # of a uint8 image

    @property
    def is_image(self) -> bool:
        return self.pixels is not None and self.weight is None and not any(self.padding)

    def run(self) -> Tensor:
        """As an op of ours."""
        if self.weight is None:
            raise Unplannable("what is no convolution follows a uint8 image, or zeros around an image")
        channels = len(self.weight)
        norm = self.norm
        if norm is None:
            zeros = torch.zeros(channels)
            norm = ops.Norm(None, None if self.bias is None else self.bias.float(), zeros, zeros + 1, 0.0)
        elif self.bias is not None:
            norm = norm._replace(mean=norm.mean - self.bias.to(norm.mean.dtype))
        window = {"stride": self.stride, "padding": self.padding, "activation": self.activation}
        pointwise = self.weight.shape[2:] == (1, 1) and self.stride == 1 and not any(self.padding)
        if self.groups == 1 and pointwise and self.pixels is None:
            return ops.pointwise_conv_bn_act(self.x, self.weight, norm, activation=self.activation)
        if self.groups == 1:
            return ops.conv_bn_act(self.x, self.weight, norm, **window, pixels=self.pixels)  # type: ignore[arg-type]
        if self.groups == channels == self.x.shape[1] and self.pixels is None:
            return ops.depthwise_conv_bn_act(self.x, self.weight, norm, squeeze=False, **window)[0]  # type: ignore[arg-type]
        raise Unplannable(f"a convolution of {self.groups} groups")


class Recording(TorchDispatchMode):
    """Follows what comes of ``given`` through a forward pass: of ``image``, or where that is uint8 of what stands for it.

    pixels, dtype   for a uint8 image: what normalises it (:func:`effnet_fast.ops.conv_bn_act`), and in what the network computes
    """

    def __init__(self, image: Tensor, pixels: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._kept: list[Tensor] = []  # while they live, no other tensor has their storage
        self._made: dict[int, Tensor | Convolution | None] = {}  # by storage: what the ops made for it, if that is another tensor
        if image.dtype == torch.uint8:
            self.given = self._keep(torch.empty_like(image, dtype=dtype), Convolution(image, pixels=pixels))
        else:
            self.given = self._keep(image, None)

    def _keep(self, tensor: Tensor, made: Tensor | Convolution | None) -> Tensor:
        self._kept.append(tensor)
        self._made[tensor.untyped_storage()._cdata] = made
        return tensor

    def _follows(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._made

    def _pending(self, tensor: Any) -> Convolution | None:
        made = self._made[tensor.untyped_storage()._cdata] if self._follows(tensor) else None
        return made if isinstance(made, Convolution) else None

    def made_of(self, tensor: Any) -> Any:
        """``tensor``, or the one that the ops made in its place."""
        if not self._follows(tensor):
            return tensor
        made = self._made[tensor.untyped_storage()._cdata]
        if isinstance(made, Convolution):
            made = made.run()
            self._keep(tensor, made)
            self._keep(made, None)
        return tensor if made is None else made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(map(self._follows, tree_flatten((args, kwargs))[0])):
            return func(*args, **kwargs)  # of weights alone: a constant
        pending = self._pending(args[0]) if args else None
        if func in _JOINED and self._follows(args[0]):
            after = _JOINED[func](pending or self.made_of(args[0]), *args[1:], **kwargs)
            if after is not None:
                result = func(*args, **kwargs)
                self._keep(result if isinstance(result, Tensor) else result[0], after)
                return result
        if func._schema.name == "effnet_fast::conv_bn_act" and pending is not None and pending.is_image:
            args = pending.x, *args[1:-1], pending.pixels  # the stem of a net of ours takes the image as it is
        args, kwargs = tree_map(self.made_of, (args, kwargs))
        if func.namespace == "effnet_fast":
            if not func._overloadname.startswith("native"):
                raise Unplannable(f"{func} runs on another backend than native")
            return tree_map(lambda made: self._keep(made, None), func(*args, **kwargs))
        if func in _REPLACED:
            return self._keep(_REPLACED[func](*args, **kwargs), None)
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        made = None if writes else func(*args, **kwargs)
        if isinstance(made, Tensor) and self._follows(made):
            return made  # a view, or the same
        raise Unplannable(f"{func} is no kernel of ours")


def _pad(x: Tensor | Convolution, pad: list[int], value: float = 0) -> Convolution | None:
    before = x if isinstance(x, Convolution) else Convolution(x)
    if before.weight is not None or any(before.padding) or len(pad) != 4 or value != 0 or min(pad) < 0:
        return None
    left, right, top, bottom = pad
    return before._replace(padding=(top, bottom, left, right))


def _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Convolution | None:
    before = x if isinstance(x, Convolution) else Convolution(x)
    if before.weight is not None:  # another convolution's result
        return None
    if weight.dim() != 4 or transposed or any(d != 1 for d in dilation) or stride[0] != stride[-1]:
        return None
    top, bottom, left, right = before.padding
    zeros = top + padding[0], bottom + padding[0], left + padding[-1], right + padding[-1]
    return before._replace(padding=zeros, weight=weight, bias=bias, stride=stride[0], groups=groups)


def _norm(x, weight, bias, mean, var, *rest) -> Convolution | None:
    """Of evaluation; ``rest`` is (training,) momentum, eps."""
    if not isinstance(x, Convolution) or x.weight is None or x.norm is not None or x.activation != "identity":
        return None
    if len(rest) == 3 and rest[0]:
        return None
    return x._replace(norm=ops.Norm(weight, bias, mean, var, rest[-1]))


def _activation(name: str) -> Callable[..., Convolution | None]:
    def joined(x: Tensor | Convolution, *bounds: float) -> Convolution | None:
        if (
            not isinstance(x, Convolution)
            or x.weight is None
            or x.activation != "identity"
            or bounds != ((0, 6) if name == "relu6" else ())
        ):
            return None
        return x._replace(activation=name)

    return joined


_JOINED: dict[Any, Callable[..., Convolution | None]] = {
    _ATEN.constant_pad_nd.default: _pad,
    _ATEN.convolution.default: _convolution,
    _ATEN.native_batch_norm.default: _norm,
    _ATEN._native_batch_norm_legit_no_training.default: _norm,
    **{getattr(_ATEN, name).default: _activation(name) for name in ("silu", "relu")},
    **{getattr(_ATEN, f"{name}_").default: _activation(name) for name in ("silu", "relu")},
    _ATEN.hardtanh.default: _activation("relu6"),
    _ATEN.hardtanh_.default: _activation("relu6"),
}


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if x.dim() != 4 or dim is None or sorted(d % 4 for d in dim) != [2, 3] or dtype not in (None, x.dtype):
        raise Unplannable(f"a mean over {dim} of {tuple(x.shape)}")
    y = _OPS.global_average_pool.native(x)
    return y[:, :, None, None] if keepdim else y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of images of one pixel."""
    if x.dim() != 2:
        raise Unplannable(f"a linear layer over {tuple(x.shape)}")
    return Convolution(x[:, :, None, None], weight=weight[:, :, None, None], bias=bias).run()[:, :, 0, 0]


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        raise Unplannable("a scaled linear layer")
    return _linear(x, weight.t(), bias)


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    _ATEN.mean.dim: _mean,
    _ATEN.linear.default: _linear,
    _ATEN.addmm.default: _addmm,
}
