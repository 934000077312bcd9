"""The names that each library's checkpoints give to the same tensors, derived from a config; none is parsed.

An EfficientNet has a name in each layout, and its own are timm's. Of the older nets, whose own names are torchvision's, there is no
other layout here, but that timm names ResNets alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from effnet_fast.scaling.config import BlockConfig, NetConfig
from effnet_fast.scaling.cost import layers

LAYOUTS = ("timm", "torchvision", "lukemelas")
# The stem's key in each, and how the key of a norm's batch counter ends.
STEMS = ("conv_stem.weight", "features.0.0.weight", "_conv_stem.weight")
COUNT = "num_batches_tracked"

_NORM = ("weight", "bias", "running_mean", "running_var", COUNT)
# Keys that only a checkpoint of that layout has.
_SIGNATURES = {
    "timm": re.compile(r"(blocks\.\d+\.\d+|conv_stem|conv_head|bn[12]|classifier)\."),
    "torchvision": re.compile(r"(features\.\d+\.\d+(\.block\.\d+\.\w+)?|classifier\.1)\."),
    "lukemelas": re.compile(r"_(blocks\.\d+\._\w+|conv_stem|conv_head|bn[01]|fc)\."),
}


class Convention(NamedTuple):
    """What weights were trained under and a checkpoint of plain tensors does not say."""

    padding: str
    bn_eps: float
    bn_momentum: float | None


class _Module(NamedTuple):
    """A convolution, norm or linear layer: its name in each of LAYOUTS, and the shape of its weight (and of a norm's vectors)."""

    names: tuple[str, str, str]
    shape: tuple[int, ...]
    bias: bool = False

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if len(self.shape) == 1:
            for entry in _NORM:
                yield entry, () if entry == COUNT else self.shape
        else:
            yield "weight", self.shape
            if self.bias:
                yield "bias", self.shape[:1]


def native(config: NetConfig) -> str:
    """The layout of a net's own state dict."""
    return "timm" if config.family == "efficientnet" else "torchvision"


def detect(keys: Iterable[str], config: NetConfig | None = None) -> str:
    """The layout that most of the keys are written in: "timm", "torchvision" or "lukemelas".

    config  of the net that they should be of, where it is known: an older net has one layout only

    Raises ValueError, naming the nearest layout and some keys, where fewer than half fit any.
    """
    if config is not None and config.family != "efficientnet":
        return native(config)
    keys = list(keys)
    fits = {layout: sum(bool(pattern.match(key)) for key in keys) for layout, pattern in _SIGNATURES.items()}
    nearest = max(fits, key=fits.__getitem__)
    if 2 * fits[nearest] < len(keys) or not keys:
        raise ValueError(
            f"the keys are in no layout known here: {fits[nearest]} of {len(keys)} fit the nearest, {nearest}; "
            f"the first are {few(keys)}"
        )
    return nearest


def key_map(config: NetConfig, layout: str) -> dict[str, str]:
    """The net's own key -> the layout's for every tensor of the net, in the order of all libraries' state dicts.

    Raises ValueError for an unknown layout, or where that library has no such net.
    """
    column = _column(config, layout)
    return {
        f"{module.names[0]}.{entry}": f"{module.names[column]}.{entry}"
        for module in _modules(config)
        for entry, _ in module.tensors()
    }


def shapes(config: NetConfig) -> dict[str, tuple[int, ...]]:
    """The net's own key -> shape, for every tensor of the net."""
    return {f"{module.names[0]}.{entry}": shape for module in _modules(config) for entry, shape in module.tensors()}


def convention(config: NetConfig, layout: str) -> Convention | None:
    """What the weights that a library trained or converted were run under there; None for timm, which runs them under either, and
    for a net that has one layout only."""
    if config.family != "efficientnet":
        return None
    if layout == "lukemelas":
        # Fixes SAME at the nominal size, where it is the same as SAME from the run-time size.
        return Convention("same", 1e-3, 0.01)
    if layout == "torchvision":
        if any(stage.operator == "fused_mbconv" for stage in config.stages):
            return Convention("symmetric", 1e-3, 0.1)
        b5_and_wider = config.head_channels >= 2048
        return Convention("symmetric", 1e-3, 0.01) if b5_and_wider else Convention("symmetric", 1e-5, 0.1)
    return None


def few(names: Iterable[str], limit: int = 3) -> str:
    """Some names for an error message, and how many more there are."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _column(config: NetConfig, layout: str) -> int:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; one of {', '.join(map(repr, LAYOUTS))} would do")
    if config.family != "efficientnet":
        if layout != "torchvision" and (layout, config.family) != ("timm", "resnet"):
            raise ValueError(f"{config.name} has torchvision's names, and none here in {layout}'s; layout 'torchvision' would do")
        return LAYOUTS.index(layout)
    fused = any(stage.operator == "fused_mbconv" for stage in config.stages)
    plain = any(stage.operator != "fused_mbconv" and not stage.se_ratio for stage in config.stages)
    if layout != "timm" and (plain or config.activation != "silu"):
        raise ValueError(f"{layout} has no net without squeeze-excite such as {config.name}; layout 'timm' would do")
    if layout == "lukemelas" and fused:
        raise ValueError(f"lukemelas has no FusedMBConv, which {config.name} is built of; layout 'timm' or 'torchvision' would do")
    return LAYOUTS.index(layout)


def _modules(config: NetConfig) -> Iterator[_Module]:
    if config.family != "efficientnet":
        for layer in layers(config):
            if layer.weight:
                biased = len(layer.weight) > 1 and layer.parameters > math.prod(layer.weight)
                yield _Module((layer.name,) * 3, layer.weight, biased)
        return
    kernel = config.stem_kernel
    yield _Module(("conv_stem", "features.0.0", "_conv_stem"), (config.stem_channels, config.in_channels, kernel, kernel))
    yield _Module(("bn1", "features.0.1", "_bn0"), (config.stem_channels,))
    for block in config.blocks():
        places = (
            f"blocks.{block.stage}.{block.layer}",
            f"features.{block.stage + 1}.{block.layer}.block",
            f"_blocks.{block.index}",
        )
        for module in _fused_mbconv(block) if block.operator == "fused_mbconv" else _mbconv(block):
            names = [f"{place}.{name}" for place, name in zip(places, module.names, strict=True)]
            yield module._replace(names=(names[0], names[1], names[2]))
    last, head = len(config.stages) + 1, config.head_channels
    if head:
        yield _Module(("conv_head", f"features.{last}.0", "_conv_head"), (head, config.stages[-1].out_channels, 1, 1))
        yield _Module(("bn2", f"features.{last}.1", "_bn1"), (head,))
    if config.num_classes:
        yield _Module(("classifier", "classifier.1", "_fc"), (config.num_classes, config.features), bias=True)


def _mbconv(block: BlockConfig) -> Iterator[_Module]:
    # timm numbers the norms and torchvision the layers from the first that is there; lukemelas names them for what they do.
    channels, kernel = block.expanded_channels, block.kernel_size
    at = 0
    if block.expands:
        yield _Module(("conv_pw", "0.0", "_expand_conv"), (channels, block.in_channels, 1, 1))
        yield _Module(("bn1", "0.1", "_bn0"), (channels,))
        at = 1
    yield _Module(("conv_dw", f"{at}.0", "_depthwise_conv"), (channels, 1, kernel, kernel))
    yield _Module((f"bn{at + 1}", f"{at}.1", "_bn1"), (channels,))
    if block.se_channels:
        yield _Module(("se.conv_reduce", f"{at + 1}.fc1", "_se_reduce"), (block.se_channels, channels, 1, 1), bias=True)
        yield _Module(("se.conv_expand", f"{at + 1}.fc2", "_se_expand"), (channels, block.se_channels, 1, 1), bias=True)
    project = "conv_pwl" if block.expands else "conv_pw"
    yield _Module((project, f"{at + 2}.0", "_project_conv"), (block.out_channels, channels, 1, 1))
    yield _Module((f"bn{at + 2}", f"{at + 2}.1", "_bn2"), (block.out_channels,))


def _fused_mbconv(block: BlockConfig) -> Iterator[_Module]:
    channels = block.expanded_channels if block.expands else block.out_channels
    yield _Module(("conv_exp" if block.expands else "conv", "0.0", ""), (channels, block.in_channels, *[block.kernel_size] * 2))
    yield _Module(("bn1", "0.1", ""), (channels,))
    if block.expands:
        yield _Module(("conv_pwl", "1.0", ""), (block.out_channels, channels, 1, 1))
        yield _Module(("bn2", "1.1", ""), (block.out_channels,))
