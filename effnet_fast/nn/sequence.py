"""Blocks and ends whose children stand in a sequence under numbers, as torchvision's MobileNetV2 and MnasNet have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.nn.blocks import ActLayer, NormLayer, StochasticDepth, conv2d, depthwise_parts
from effnet_fast.nn.fused import FusedBlock, is_traced, run_parts, why_plain_for
from effnet_fast.nn.parts import BlockParts, ConvNormAct, activation_name, has_hooks, why_not_activation, why_not_fused
from effnet_fast.ops.backends import note
from effnet_fast.scaling.config import BlockConfig


class ConvNormSequence(FusedBlock, nn.Sequential):  # type: ignore[misc]  # whose forward takes more arguments
    """A convolution, its norm and activation, numbered 0 to 2; x [N, in, H, W] -> [N, out, ceil(H / stride), ...]."""

    def __init__(self, in_channels: int, out: int, kernel: int, stride: int, norm_layer: NormLayer, act_layer: ActLayer) -> None:
        super().__init__(conv2d(in_channels, out, kernel, stride, "symmetric"), norm_layer(out), act_layer())

    def forward_children(self, x: Tensor) -> Tensor:
        if not is_traced(x):
            x = x.contiguous(memory_format=torch.channels_last)  # a convolution's result lies as its input does
        return nn.Sequential.forward(self, x)

    def parts(self, *args: Any, **kwargs: Any) -> BlockParts | str:
        children: Any = list(self._modules.values())
        if len(children) != 3:
            return _REPLACED
        part = ConvNormAct(children[0], children[1], activation_name(children[2]) or "")
        return why_not_activation(children[2]) or why_not_fused(part) or BlockParts(None, None, None, part, False)


class SequentialMBConv(FusedBlock, nn.Module):
    """Mobile inverted bottleneck (arXiv 1801.04381) without squeeze-excite, its children in ``layers`` (MnasNet's names).

    x [N, in, H, W] -> [N, out, H', W'], H' = ceil(H / stride).
    """

    PLACE = "layers"

    def __init__(self, config: BlockConfig, norm_layer: NormLayer, act_layer: ActLayer) -> None:
        super().__init__()
        self.residual = config.residual
        self.add_module(self.PLACE, self.arranged(mbconv_layers(config, norm_layer, act_layer)))
        self.drop_path = StochasticDepth(config.drop_path)

    @staticmethod
    def arranged(groups: list[list[nn.Module]]) -> nn.Sequential:
        return nn.Sequential(*(module for group in groups for module in group))

    def forward_children(self, x: Tensor) -> Tensor:
        y = self._modules[self.PLACE](x)  # type: ignore[misc]
        return self.drop_path(y) + x if self.residual else y

    def parts(self, *args: Any, **kwargs: Any) -> BlockParts | str:
        child: Any = self._modules
        leaves = _leaves(child[self.PLACE])
        return leaves if isinstance(leaves, str) else _sequence_parts(leaves, self.residual, child["drop_path"])


class NestedMBConv(SequentialMBConv):
    """The same under MobileNetV2's names: in ``conv``, where each convolution that has an activation is in a sequence with it."""

    PLACE = "conv"

    @staticmethod
    def arranged(groups: list[list[nn.Module]]) -> nn.Sequential:
        *activated, project = groups
        return nn.Sequential(*(nn.Sequential(*group) for group in activated), *project)


def mbconv_layers(config: BlockConfig, norm_layer: NormLayer, act_layer: ActLayer) -> list[list[nn.Module]]:
    """Expand (where the block does), depthwise, project: each convolution with what follows it."""
    wide, out = config.expanded_channels, config.out_channels
    depthwise = conv2d(wide, wide, config.kernel_size, config.stride, "symmetric", groups=wide)
    groups: list[list[nn.Module]] = []
    if config.expands:
        groups.append([conv2d(config.in_channels, wide, 1, 1, "symmetric"), norm_layer(wide), act_layer()])
    groups.append([depthwise, norm_layer(wide), act_layer()])
    return [*groups, [conv2d(wide, out, 1, 1, "symmetric"), norm_layer(out)]]


def run_sequence(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The modules of a block that has none of its own, by :func:`mbconv_layers`: fused where that gives their result."""
    made: Any = why_plain_for(x) or _sequence_parts(modules)
    if isinstance(made, BlockParts):
        made = run_parts(made, x)
    if isinstance(made, Tensor):
        return made
    note(f"children one by one: {made}")
    for module in modules:
        x = module(x)
    return x


_REPLACED = "the children were replaced"


def _leaves(sequence: nn.Module) -> list[nn.Module] | str:
    """The modules within a sequence and those in it, in order, or why calling them one by one would not be the same."""
    if type(sequence) is not nn.Sequential:
        return _REPLACED
    if has_hooks(sequence):
        return "a hook sits on a child"
    leaves: list[nn.Module] = []
    for module in sequence._modules.values():
        inner = _leaves(module) if type(module) is nn.Sequential else [module]
        if isinstance(inner, str):
            return inner
        leaves += inner
    return leaves


def _sequence_parts(leaves: Sequence[nn.Module], residual: bool = False, drop_path: nn.Module | None = None) -> BlockParts | str:
    if len(leaves) not in (5, 8):
        return _REPLACED
    expand = leaves[:3] if len(leaves) == 8 else None
    return depthwise_parts(expand, leaves[-5:-2], (*leaves[-2:], None), "symmetric", residual, drop_path)
