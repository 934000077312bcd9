"""The parts of torchvision's blocks: a Sequential of Conv2dNormActivation and SqueezeExcitation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation, StochasticDepth

from effnet_fast.interop.adapters.base import PeerBlock, block_parts, hooked
from effnet_fast.nn.parts import (
    NORMS,
    BlockParts,
    ConvNormAct,
    SqueezeExciteParts,
    activation_name,
    squeeze_excite_parts,
    why_not_activation,
    why_not_fused,
)

_NORMS = (*NORMS, FrozenBatchNorm2d)


def _part(layer: Any, role: str = "dense") -> ConvNormAct | str:
    if type(layer).forward is not nn.Sequential.forward or len(layer) not in (2, 3):
        return f"a layer is a {type(layer).__name__}, not a convolution, a norm and an activation"
    conv, norm, act = layer[0], layer[1], layer[2] if len(layer) == 3 else None
    activation, reason = "identity", hooked(layer)
    if act is not None:
        activation, reason = activation_name(act) or "", reason or why_not_activation(act)
    part = ConvNormAct(conv, norm, activation)
    return reason or why_not_fused(part, role, _NORMS) or part


def _squeeze_excite(module: Any) -> SqueezeExciteParts | str:
    if type(module) is not SqueezeExcitation:
        return f"the squeeze-excite is a {type(module).__name__}"
    if type(module.avgpool) is not nn.AdaptiveAvgPool2d or module.avgpool.output_size != 1:
        return f"the pooling of the squeeze-excite is {module.avgpool}"
    if type(module.scale_activation) is not nn.Sigmoid:
        return f"the gate of the squeeze-excite is a {type(module.scale_activation).__name__}, not a sigmoid"
    reason = hooked(module, module.avgpool, module.scale_activation) or why_not_activation(module.activation)
    return reason or squeeze_excite_parts(module.fc1, module.fc2, activation_name(module.activation))


class _TorchvisionBlock(PeerBlock):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def _block(
    block: Any,
    expand: ConvNormAct | str | None,
    depthwise: ConvNormAct | str | None,
    excite: SqueezeExciteParts | str | None,
    project: ConvNormAct | str,
) -> BlockParts | str:
    drop = block.stochastic_depth
    if type(drop) is not StochasticDepth or drop.mode != "row":
        return f"the stochastic depth is {drop}, not one by rows"
    active = drop if drop.training and drop.p > 0 else None
    return hooked(block.block, drop) or block_parts(expand, depthwise, excite, project, block.use_res_connect, active)


def _layers(block: Any, counts: tuple[int, int]) -> list[nn.Module] | str:
    """The layers of the block's Sequential, if it is one of as many layers as the block makes."""
    layers = block.block
    if type(layers) is not nn.Sequential or len(layers) not in counts:
        return f"its layers were replaced: they are a {type(layers).__name__}"
    return [layers[number] for number in range(len(layers))]


class MBConv(_TorchvisionBlock):
    def parts(self: Any) -> BlockParts | str:
        layers = _layers(self, (3, 4))
        if isinstance(layers, str):
            return layers
        expand = _part(layers[0]) if len(layers) == 4 else None
        depthwise, excite, project = layers[-3:]
        return _block(self, expand, _part(depthwise, "depthwise"), _squeeze_excite(excite), _part(project, "pointwise"))


class FusedMBConv(_TorchvisionBlock):
    def parts(self: Any) -> BlockParts | str:
        layers = _layers(self, (1, 2))
        if isinstance(layers, str):
            return layers
        return _block(self, _part(layers[0]) if len(layers) == 2 else None, None, None, _part(layers[-1]))
