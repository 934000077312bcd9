"""The fused forward of a block, as a function of its PARTS.

A block (ours, or a peer library's) hands over its convolutions, norms and activation as :class:`BlockParts`; :func:`run_block`
runs them through the ops, and :func:`effnet_fast.nn.training.train_block` where a gradient or the statistics of the batch are asked
for. :class:`FusedBlock` is the mixin that chooses, at every call, between these and running the block's children one by one, which
is exact in every case and is what tracing and export see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from effnet_fast import ops
from effnet_fast.nn.padding import pad, sides
from effnet_fast.nn.parts import (
    BlockParts,
    ConvNormAct,
    activation_name,
    alike,
    norm_of,
    tensor_of,
    uses_batch,
    weight_of,
    why_not_activation,
    why_not_fused,
)
from effnet_fast.nn.training import train_block, why_not_trained
from effnet_fast.ops.backends import note
from effnet_fast.ops.common import autocasts
from effnet_fast.ops.expand_depthwise import is_one_kernel


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
    return "a hook sits on all modules" if _has_any_global_hook() else None


def trains(parts: BlockParts, x: Tensor) -> bool:
    """Whether a call asks for more than inference: a gradient, the statistics of the batch, or stochastic depth."""
    convs = [part for part in (parts.expand, parts.depthwise, parts.project) if part is not None]
    if any(uses_batch(part.norm) for part in convs) or (parts.drop is not None and parts.residual):
        return True
    if not torch.is_grad_enabled():
        return False
    modules = [module for part in convs for module in part[:2]]
    if parts.squeeze_excite is not None:
        modules += parts.squeeze_excite[:2]
    used = (tensor_of(module, name) for module in modules for name in ("weight", "bias"))
    return x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in used)


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast would compute in; the ops take half x beside float32 weights."""
    device = x.device.type
    if autocasts(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def run_conv(part: ConvNormAct, x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """A dense or 1x1 convolution with all that surrounds it, as one op."""
    conv, norm = part.conv, norm_of(part.norm)
    if tuple(conv.kernel_size) == (1, 1) and tuple(conv.stride) == (1, 1):
        return ops.pointwise_conv_bn_act(x, weight_of(conv), norm, gate=gate, residual=residual, activation=part.activation)
    zeros = sides(conv, part.padding, x.shape) if isinstance(part.padding, str) else part.padding
    return ops.conv_bn_act(
        x, weight_of(conv), norm, stride=conv.stride[0], padding=zeros, activation=part.activation, residual=residual
    )


def _may_be_one_kernel(expand: ConvNormAct, depthwise: ConvNormAct | None) -> bool:
    """Whether they are what expand_depthwise_conv_bn_act computes: a 1x1 that keeps the image's size, and one activation."""
    kernel, stride = tuple(expand.conv.kernel_size), tuple(expand.conv.stride)
    return depthwise is not None and kernel == stride == (1, 1) and expand.activation == depthwise.activation


def run_block(parts: BlockParts, x: Tensor) -> Tensor:
    """expand | depthwise + squeeze | gate | project (+ residual): at most four ops, nothing between them; three where one kernel
    makes the first two."""
    shortcut, expand = x if parts.residual else None, parts.expand
    if expand is not None and not _may_be_one_kernel(expand, parts.depthwise):
        x, expand = run_conv(expand, x), None
    gate = None
    if parts.depthwise is not None:
        conv, padding, squeeze_excite = parts.depthwise.conv, parts.depthwise.padding, parts.squeeze_excite
        weight, norm, stride = weight_of(conv), norm_of(parts.depthwise.norm), conv.stride[0]
        options: dict[str, Any] = {
            "stride": stride,
            "padding": sides(conv, padding, x.shape) if isinstance(padding, str) else padding,
            "activation": parts.depthwise.activation,
            "squeeze": squeeze_excite is not None,
        }
        if expand is not None and is_one_kernel(x, weight_of(expand.conv), weight, stride, options["padding"]):
            x, partial = ops.expand_depthwise_conv_bn_act(x, weight_of(expand.conv), norm_of(expand.norm), weight, norm, **options)
        else:
            x, partial = ops.depthwise_conv_bn_act(x if expand is None else run_conv(expand, x), weight, norm, **options)
        if squeeze_excite is not None:
            reduce, widen = squeeze_excite.reduce, squeeze_excite.expand
            weights = weight_of(reduce), tensor_of(reduce, "bias"), weight_of(widen), tensor_of(widen, "bias")
            count, activation = x.shape[2] * x.shape[3], squeeze_excite.activation
            gate = ops.squeeze_excite_gate(partial, count, *alike(weights, partial.dtype), activation=activation)  # type: ignore[arg-type]
    return run_conv(parts.project, x, residual=shortcut, gate=gate)


def run_parts(parts: BlockParts, x: Tensor) -> Tensor | str:
    """The fused result, by inference's ops or by training's; or why these parts must run one by one for ``x``."""
    cast = autocast(x)
    if parts.residual and cast.dtype != x.dtype:
        return f"the shortcut is {x.dtype}, which autocast does not change"
    if trains(parts, cast):
        return why_not_trained(parts, cast) or train_block(parts, cast)
    return run_block(parts, cast)


class FusedBlock:
    """Mixin over an ``nn.Module`` block: the fused forward where it gives the children's result, the children elsewhere.

    A subclass gives ``parts`` (or the reason why it has none) and ``forward_children``.
    """

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(
            "torch.jit.script cannot compile a fused block: torch.export or torch.jit.trace would do, and for an accelerated model"
            " effnet_fast.restore(model) first"
        )

    def parts(self, *args: Any, **kwargs: Any) -> BlockParts | str:
        """``args`` and ``kwargs`` are those of the call, beside x."""
        raise NotImplementedError

    def forward_children(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = why_plain_for(x)
        if reason is None:
            parts = self.parts(*args, **kwargs)
            made = parts if isinstance(parts, str) else run_parts(parts, x)
            if isinstance(made, Tensor):
                return made
            reason = made
        note(f"children one by one: {reason}")
        return self.forward_children(x, *args, **kwargs)


def conv_norm_act(conv: nn.Conv2d, norm: nn.Module, act: nn.Module, kernel: int, stride: int, padding: str, x: Tensor) -> Tensor:
    """A stem or head: one op where :class:`FusedBlock` would fuse, else ``act(norm(conv(x)))``; channels_last from either layout.

    kernel, stride, padding   as the network's own convolution has them; another may stand in its place
    """
    part = ConvNormAct(conv, norm, activation_name(act) or "", padding)  # type: ignore[arg-type]
    reason = why_plain_for(x) or why_not_activation(act) or why_not_fused(part)
    made = run_parts(BlockParts(None, None, None, part, False), x) if reason is None else reason
    if isinstance(made, Tensor):
        return made
    note(f"children one by one: {made}")
    if not is_traced(x):
        x = x.contiguous(memory_format=torch.channels_last)  # a convolution's result lies as its input does
    return act(norm(conv(pad(conv, kernel, stride, padding, x))))
