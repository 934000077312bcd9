"""The fused forward of a block, as a function of its PARTS.

A block (ours, or a peer library's) hands over its convolutions, norms and activation as :class:`BlockParts`;
:func:`run_block` runs them through the ops. :class:`FusedBlock` is the mixin that chooses, at every call, between that and running
the block's children one by one, which is exact in every case and is what training, tracing and export see.

The choice is made anew at every call, so it must be cheap: children and tensors are taken from ``_modules``, ``_parameters`` and
``_buffers``, since ``nn.Module.__getattr__`` costs more than all the checks together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from effnet_fast import ops
from effnet_fast.nn.padding import pad, sides
from effnet_fast.ops.backends import note
from effnet_fast.ops.common import autocasts

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
    """What a fused block is made of. Absent parts are None; ``drops``: stochastic depth is in effect now."""

    expand: ConvNormAct | None
    depthwise: ConvNormAct | None
    squeeze_excite: SqueezeExciteParts | None
    project: ConvNormAct
    residual: bool
    drops: bool = False


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
    if type(norm) not in norms or tensor_of(norm, "running_mean") is None:
        return f"a norm is a {type(norm).__name__}: not a batch norm with running statistics"
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


def is_traced(x: Any) -> bool:
    """Whether plain aten must be seen: fx, jit.trace, torch.export and both ONNX exporters, torch.func's transforms and
    forward-mode differentiation."""
    # The flag itself: torch.compiler.is_exporting(), which returns it, is always true to torch 2.11's torch.compile.
    return (
        isinstance(x, fx.Proxy)
        or torch.jit.is_tracing()
        or torch.compiler._is_exporting_flag
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def why_plain_for(x: Any) -> str | None:
    """Why a call with this input must run the children one by one, or None."""
    if is_traced(x):
        return "the model is being traced, exported or transformed"
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        return "the input is not a batch of float images"
    if torch.is_grad_enabled() and x.requires_grad:
        return "a gradient is asked for"
    return "a hook sits on all modules" if _has_any_global_hook() else None


def why_plain_now(parts: BlockParts) -> str | None:
    """Why these parts, in the state that they are in, must run one by one, or None."""
    convs = [part for part in (parts.expand, parts.depthwise, parts.project) if part is not None]
    if any(part.norm.training for part in convs) or (parts.drops and parts.residual):
        return "training mode: batch statistics or stochastic depth"
    if torch.is_grad_enabled():
        modules = [module for part in convs for module in part[:2]]
        if parts.squeeze_excite is not None:
            modules += parts.squeeze_excite[:2]
        used = (tensor_of(module, name) for module in modules for name in ("weight", "bias"))
        if any(tensor is not None and tensor.requires_grad for tensor in used):
            return "a gradient is asked for"
    return None


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast would compute in; the ops take half x beside float32 weights."""
    device = x.device.type
    if autocasts(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def norm_of(module: nn.BatchNorm2d) -> ops.Norm:
    """A batch norm's tensors, as the ops take them."""
    weight, bias, mean, var = (tensor_of(module, name) for name in ("weight", "bias", "running_mean", "running_var"))
    assert mean is not None and var is not None  # why_not_fused has seen them
    return ops.Norm(weight, bias, mean, var, module.eps)


def weight_of(conv: nn.Conv2d) -> Tensor:
    """A convolution's weight, which :func:`why_not_fused` has seen to be there."""
    weight = tensor_of(conv, "weight")
    assert weight is not None
    return weight


def run_conv(part: ConvNormAct, x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """A dense or 1x1 convolution with all that surrounds it, as one op."""
    conv, norm = part.conv, norm_of(part.norm)
    if tuple(conv.kernel_size) == (1, 1) and tuple(conv.stride) == (1, 1):
        return ops.pointwise_conv_bn_act(x, weight_of(conv), norm, gate=gate, residual=residual, activation=part.activation)
    zeros = sides(conv, part.padding, x) if isinstance(part.padding, str) else part.padding
    return ops.conv_bn_act(
        x, weight_of(conv), norm, stride=conv.stride[0], padding=zeros, activation=part.activation, residual=residual
    )


def run_block(parts: BlockParts, x: Tensor) -> Tensor:
    """expand | depthwise + squeeze | gate | project (+ residual): at most four ops, nothing between them."""
    shortcut = x if parts.residual else None
    if parts.expand is not None:
        x = run_conv(parts.expand, x)
    gate = None
    if parts.depthwise is not None:
        conv, padding, squeeze_excite = parts.depthwise.conv, parts.depthwise.padding, parts.squeeze_excite
        x, partial = ops.depthwise_conv_bn_act(
            x,
            weight_of(conv),
            norm_of(parts.depthwise.norm),
            stride=conv.stride[0],
            padding=sides(conv, padding, x) if isinstance(padding, str) else padding,
            activation=parts.depthwise.activation,
            squeeze=squeeze_excite is not None,
        )
        if squeeze_excite is not None:
            reduce, expand = squeeze_excite.reduce, squeeze_excite.expand
            gate = ops.squeeze_excite_gate(
                partial,
                x.shape[2] * x.shape[3],
                weight_of(reduce),
                tensor_of(reduce, "bias"),
                weight_of(expand),
                tensor_of(expand, "bias"),
                activation=squeeze_excite.activation,
            )
    return run_conv(parts.project, x, residual=shortcut, gate=gate)


class FusedBlock:
    """Mixin over an ``nn.Module`` block: the fused forward where it gives the children's result, the children elsewhere.

    A subclass gives ``parts()`` (or the reason why it has none) and ``forward_children``.
    """

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(
            "torch.jit.script cannot compile a fused block: torch.export or torch.jit.trace would do, and for an accelerated model"
            " effnet_fast.restore(model) first"
        )

    def parts(self) -> BlockParts | str:
        raise NotImplementedError

    def forward_children(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = why_plain_for(x)
        if reason is None:
            parts = self.parts()
            reason = parts if isinstance(parts, str) else why_plain_now(parts)
        if reason is None:
            cast = autocast(x)
            if parts.residual and cast.dtype != x.dtype:  # type: ignore[union-attr]
                reason = f"the shortcut is {x.dtype}, which autocast does not change"
        if reason is not None:
            note(f"children one by one: {reason}")
            return self.forward_children(x, *args, **kwargs)
        assert not isinstance(parts, str)
        return run_block(parts, cast)


def conv_norm_act(conv: nn.Conv2d, norm: nn.Module, act: nn.Module, kernel: int, stride: int, padding: str, x: Tensor) -> Tensor:
    """A stem or head: one op where :class:`FusedBlock` would fuse, else ``act(norm(conv(x)))``; channels_last from either layout.

    kernel, stride, padding   as the network's own convolution has them; another may stand in its place
    """
    part = ConvNormAct(conv, norm, activation_name(act) or "", padding)  # type: ignore[arg-type]
    reason = why_plain_for(x) or why_not_activation(act) or why_not_fused(part)
    reason = reason or why_plain_now(BlockParts(None, None, None, part, False))
    if reason is not None:
        note(f"children one by one: {reason}")
        if not is_traced(x):
            x = x.contiguous(memory_format=torch.channels_last)  # a convolution's result lies as its input does
        return act(norm(conv(pad(conv, kernel, stride, padding, x))))
    return run_conv(part, autocast(x))
