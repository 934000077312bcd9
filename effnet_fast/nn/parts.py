"""What a block is made of: its convolutions, norms and activations, found among its children, and why they are not what the ops
compute.

Children and tensors are taken from ``_modules``, ``_parameters`` and ``_buffers``: the question is asked at every call, and
``nn.Module.__getattr__`` costs more than all the checks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_fast import ops

NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.SyncBatchNorm)
_ACTIVATIONS = {nn.SiLU: "silu", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Identity: "identity"}


class ConvNormAct(NamedTuple):
    """A convolution without bias, its norm, the name of its activation, and how it pads.

    padding: "symmetric" (as ``conv.padding`` says), "same" (TensorFlow's), or fixed zeros (top, bottom, left, right).
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    activation: str = "identity"
    padding: str | tuple[int, int, int, int] = "symmetric"


class SqueezeExciteParts(NamedTuple):
    """The two 1x1 convolutions of a squeeze-excite, and the activation between them; a sigmoid makes the gate."""

    reduce: nn.Conv2d
    expand: nn.Conv2d
    activation: str


class BlockParts(NamedTuple):
    """What a fused block is made of. Absent parts are None.

    drop  the stochastic depth that is in effect now: of ones [N, 1, 1, 1] it makes the factors of the images' branches
    """

    expand: ConvNormAct | None
    depthwise: ConvNormAct | None
    squeeze_excite: SqueezeExciteParts | None
    project: ConvNormAct
    residual: bool
    drop: Callable[[Tensor], Tensor] | None = None


def activation_name(module: nn.Module | None) -> str | None:
    """The ops' name of an activation module, or None for one that they do not have."""
    return _ACTIVATIONS.get(type(module))  # type: ignore[arg-type]


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer as calling ``module`` would use it; None for one that is absent or computed (a parametrization).

    In a DataParallel replica it is a plain attribute.
    """
    for place in (module._parameters, module._buffers, module.__dict__):
        if name in place:
            return place[name]
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` would do more than its own forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def why_not_activation(module: nn.Module | None) -> str | None:
    """Why ``module`` is not an activation of the ops, or None."""
    if activation_name(module) is None:
        return f"an activation is {module}: the ops have {', '.join(ops.ACTIVATIONS)}"
    return "a hook sits on an activation" if has_hooks(module) else None  # type: ignore[arg-type]


def why_not_fused(
    part: ConvNormAct,
    role: str = "dense",
    norms: tuple[type[nn.Module], ...] = NORMS,
    conv_type: type[nn.Conv2d] = nn.Conv2d,
) -> str | None:
    """Why the children of ``part`` are not what the ops compute, or None.

    role       "dense", "depthwise" or "pointwise" (1x1 with stride 1, which takes the gate)
    norms      types whose evaluation is a batch norm's
    conv_type  a peer's subclass of Conv2d whose forward is a Conv2d's after padding as ``part.padding`` says
    """
    conv, norm = part.conv, part.norm
    if not _is_plain_conv(conv, conv_type):
        return f"a convolution is a {type(conv).__name__}, or its forward was replaced"
    if tensor_of(conv, "weight") is None:
        return "a convolution is parametrized"
    if _has_bias(conv) or conv.padding_mode != "zeros" or isinstance(conv.padding, str) or conv.dilation != (1, 1):
        return f"a convolution is {conv}: only bias-free, undilated ones with zeros as padding are fused"
    wrong_shape = _why_not_shape(part, role)
    if wrong_shape is not None:
        return wrong_shape
    if type(norm) not in norms:
        return f"a norm is a {type(norm).__name__}: not a batch norm"
    return "a hook sits on a child" if has_hooks(conv) or has_hooks(norm) else None


def _is_plain_conv(conv: Any, conv_type: type[nn.Conv2d]) -> bool:
    """Whether calling ``conv`` computes a Conv2d, after padding as ``conv_type`` does."""
    cls, own = type(conv), conv.__dict__
    if not isinstance(conv, nn.Conv2d) or "forward" in own or "_conv_forward" in own:
        return False
    return cls.forward is conv_type.forward and cls._conv_forward is conv_type._conv_forward


def _has_bias(conv: nn.Conv2d) -> bool:
    """Whether the convolution has a bias, or something in its place."""
    return conv._parameters.get("bias") is not None if "bias" in conv._parameters else conv.bias is not None


def _pair(value: Any) -> tuple[int, int] | None:
    """A kernel size or stride as a tuple: a peer may hold a list, and a user may set a number."""
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == 2 else None


def _why_not_shape(part: ConvNormAct, role: str) -> str | None:
    conv = part.conv
    kernel, stride = _pair(conv.kernel_size), _pair(conv.stride)
    if kernel is None or stride is None:
        return f"a {role} convolution has kernel size {conv.kernel_size!r} and stride {conv.stride!r}"
    groups = conv.in_channels if role == "depthwise" else 1
    if conv.groups != groups or (role == "depthwise" and conv.out_channels != conv.in_channels):
        return f"a {role} convolution has {conv.groups} groups, {conv.in_channels} channels in and {conv.out_channels} out"
    pointwise = kernel == (1, 1) and stride == (1, 1)
    if stride[0] != stride[1] or (role == "pointwise" and not pointwise):
        return f"a {role} convolution has kernel size {kernel} and stride {stride}"
    if part.padding == "same" and (stride[0] > 2 or kernel[0] != kernel[1] or kernel[0] < stride[0]):
        return f"a convolution pads to the same size over kernel size {kernel} and stride {stride}"
    own_zeros = conv.padding != (0, 0)
    fixed_zeros = not isinstance(part.padding, str) and part.padding != (0, 0, 0, 0)
    if (own_zeros and (pointwise or part.padding != "symmetric")) or (fixed_zeros and pointwise):
        return f"a convolution with kernel size {kernel} pads by {conv.padding}"
    return None


def squeeze_excite_parts(
    reduce: nn.Module, expand: nn.Module, activation: str | None, conv_type: type[nn.Conv2d] = nn.Conv2d
) -> SqueezeExciteParts | str:
    """The parts of a squeeze-excite (the caller has checked its activation and gate), or why the ops do not compute it."""
    for conv in (reduce, expand):
        if not _is_plain_conv(conv, conv_type) or has_hooks(conv):
            return "a convolution of the squeeze-excite was replaced or has a hook"
        shape = _pair(conv.kernel_size), _pair(conv.stride), conv.groups, _pair(conv.padding)
        if shape != ((1, 1), (1, 1), 1, (0, 0)):
            return f"a convolution of the squeeze-excite is {conv}"
        if tensor_of(conv, "weight") is None or not any("bias" in place for place in (conv._parameters, conv.__dict__)):
            return "a convolution of the squeeze-excite is parametrized"
    return SqueezeExciteParts(reduce, expand, activation or "")  # type: ignore[arg-type]


def uses_batch(norm: nn.Module) -> bool:
    """Whether a norm normalises with the statistics of the batch that it is given."""
    return isinstance(norm, _BatchNorm) and (norm.training or tensor_of(norm, "running_mean") is None)


def norm_of(module: nn.BatchNorm2d) -> ops.Norm:
    """A batch norm's tensors, as the ops take them."""
    weight, bias, mean, var = (tensor_of(module, name) for name in ("weight", "bias", "running_mean", "running_var"))
    assert mean is not None and var is not None  # or it uses_batch
    return ops.Norm(weight, bias, mean, var, module.eps)


def alike(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """As they are where all have one dtype, else in ``dtype``: under autocast a net's parameters may have several."""
    tensors = list(tensors)
    if len({tensor.dtype for tensor in tensors if tensor is not None}) == 1:
        return tensors
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def weight_of(conv: nn.Conv2d) -> Tensor:
    """A convolution's weight, which :func:`why_not_fused` has seen to be there."""
    weight = tensor_of(conv, "weight")
    assert weight is not None
    return weight
