"""The names of a net's modules, and so its state dict's keys: timm's of an EfficientNet and MobileNetV1, else torchvision's."""

from __future__ import annotations

from typing import NamedTuple

from effnet_fast.scaling.config import BlockConfig, NetConfig

Pair = tuple[str, str]  # a convolution and its norm


class Names(NamedTuple):
    """Stem and head as (convolution, norm), and the classifier."""

    stem: Pair
    head: Pair
    classifier: str


def names_of(config: NetConfig) -> Names:
    """What of a net is in no block."""
    if config.family == "resnet":
        return Names(("conv1", "bn1"), ("", ""), "fc")
    if config.family == "mobilenet_v2":
        last = 1 + sum(stage.layers for stage in config.stages)
        return Names(("features.0.0", "features.0.1"), (f"features.{last}.0", f"features.{last}.1"), "classifier.1")
    if config.family == "mnasnet":
        after = mnasnet_place(config, len(config.stages))
        return Names(("layers.0", "layers.1"), (f"layers.{after}", f"layers.{after + 1}"), "classifier.1")
    return Names(("conv_stem", "bn1"), ("conv_head", "bn2"), "classifier")


def mnasnet_place(config: NetConfig, stage: int) -> int:
    """Where in ``layers`` a stage stands: of the first, whose first block lies flat before all stages, its other blocks, if any."""
    return 7 + stage + (config.stages[0].layers > 1) if stage else 8


def block_names(config: NetConfig, block: BlockConfig) -> tuple[str, tuple[Pair, ...]]:
    """The prefix of a block's names, and its convolutions and norms in the order they run, a projecting shortcut's last."""
    if config.family == "resnet":
        count = 3 if block.operator == "bottleneck" else 2
        pairs = [(f"conv{number}", f"bn{number}") for number in range(1, count + 1)]
        pairs += [("downsample.0", "downsample.1")] if block.projects_shortcut else []
        return f"layer{block.stage + 1}.{block.layer}.", tuple(pairs)
    if config.family == "mobilenet_v2":
        nested = [(f"{number}.0", f"{number}.1") for number in range(1 + block.expands)]
        return f"features.{1 + block.index}.conv.", (*nested, (str(len(nested)), str(len(nested) + 1)))
    if config.family == "mnasnet":
        flat = 3 if block.index == 0 else 0
        pairs = [(str(flat + 3 * number), str(flat + 3 * number + 1)) for number in range(2 + block.expands)]
        if block.index == 0:
            return "layers.", tuple(pairs)
        layer = block.layer - (block.stage == 0)
        return f"layers.{mnasnet_place(config, block.stage)}.{layer}.layers.", tuple(pairs)
    return f"blocks.{block.stage}.{block.layer}.", _timm(block)


def _timm(block: BlockConfig) -> tuple[Pair, ...]:
    """timm numbers the norms from the first that is there."""
    if block.operator == "fused_mbconv":
        convs = ["conv_exp", "conv_pwl"] if block.expands else ["conv"]
    else:
        convs = ["conv_pw", "conv_dw", "conv_pwl"] if block.expands else ["conv_dw", "conv_pw"]
    return tuple((conv, f"bn{number}") for number, conv in enumerate(convs, start=1))
