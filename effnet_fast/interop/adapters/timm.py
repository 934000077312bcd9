"""The parts of timm's blocks. Its norms hold the activation that follows; its SAME padding is a convolution of its own type."""

from __future__ import annotations

from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame, DropPath
from timm.layers.activations import Sigmoid
from timm.layers.norm_act import FrozenBatchNormAct2d, SyncBatchNormAct
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from effnet_fast.interop.adapters.base import PeerBlock, block_parts, hooked
from effnet_fast.nn.parts import (
    BlockParts,
    ConvNormAct,
    SqueezeExciteParts,
    activation_name,
    has_hooks,
    squeeze_excite_parts,
    why_not_activation,
    why_not_fused,
)

_NORM_ACTS = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
_NORMS = (*_NORM_ACTS, nn.BatchNorm2d, nn.SyncBatchNorm)


def _part(conv: Any, norm: Any, role: str = "dense") -> ConvNormAct | str:
    """A convolution with its norm and activation, or why they are not fused.

    A plain batch norm has no activation: torch's own SyncBatchNorm conversion drops timm's, and the block then computes so.
    """
    activation, reason = "identity", None
    if type(norm) in _NORM_ACTS and "act" in norm._modules:
        act, drop = norm._modules["act"], norm._modules["drop"]
        activation, reason = activation_name(act) or "", why_not_activation(act)
        if type(drop) is not nn.Identity or has_hooks(drop):
            reason = reason or f"a norm drops by {drop}"
    same = type(conv) is Conv2dSame
    part = ConvNormAct(conv, norm, activation, "same" if same else "symmetric")
    return reason or why_not_fused(part, role, _NORMS, Conv2dSame if same else nn.Conv2d) or part


def _squeeze_excite(module: Any) -> SqueezeExciteParts | str | None:
    if type(module) is nn.Identity:
        return hooked(module)
    if type(module) is not SqueezeExcite:
        return f"the squeeze-excite is a {type(module).__name__}"
    child: Any = module._modules
    gate, act = child["gate"], child["act1"]
    if type(gate) not in (nn.Sigmoid, Sigmoid):
        return f"the gate of the squeeze-excite is a {type(gate).__name__}, not a sigmoid"
    reason = hooked(module, gate) or why_not_activation(act)
    return reason or squeeze_excite_parts(child["conv_reduce"], child["conv_expand"], activation_name(act))


class _TimmBlock(PeerBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _block(
    block: Any, expand: ConvNormAct | str | None, depthwise: ConvNormAct | str | None, project: ConvNormAct | str
) -> BlockParts | str:
    """The block's convolutions together with the rest that timm's blocks have in common."""
    if getattr(block, "conv_s2d", None) is not None:
        return "it begins with a space-to-depth convolution"
    child = block._modules
    aa, drop_path = child["aa"], child["drop_path"]
    if type(aa) is not nn.Identity:
        return f"it blurs where it strides, by a {type(aa).__name__}"
    if type(drop_path) not in (nn.Identity, DropPath):
        return f"the drop-path is a {type(drop_path).__name__}"
    excite = _squeeze_excite(child["se"]) if "se" in child else None
    if excite is not None and depthwise is None:
        return "a squeeze-excite follows its dense convolution"
    drops = type(drop_path) is DropPath and drop_path.training and drop_path.drop_prob
    drop = drop_path if drops else None
    return hooked(aa, drop_path) or block_parts(expand, depthwise, excite, project, block.has_skip, drop)


class InvertedResidual(_TimmBlock):
    def parts(self: Any) -> BlockParts | str:
        child = self._modules
        expand, depthwise = _part(child["conv_pw"], child["bn1"]), _part(child["conv_dw"], child["bn2"], "depthwise")
        return _block(self, expand, depthwise, _part(child["conv_pwl"], child["bn3"], "pointwise"))


class DepthwiseSeparableConv(_TimmBlock):
    def parts(self: Any) -> BlockParts | str:
        child = self._modules
        depthwise = _part(child["conv_dw"], child["bn1"], "depthwise")
        return _block(self, None, depthwise, _part(child["conv_pw"], child["bn2"], "pointwise"))


class EdgeResidual(_TimmBlock):
    def parts(self: Any) -> BlockParts | str:
        child = self._modules
        return _block(self, _part(child["conv_exp"], child["bn1"]), None, _part(child["conv_pwl"], child["bn2"]))


class ConvBnAct(_TimmBlock):
    def parts(self: Any) -> BlockParts | str:
        child = self._modules
        return _block(self, None, None, _part(child["conv"], child["bn1"]))
