"""What courses and slides say of EfficientNet, and what is so: each answer is computed when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from effnet_fast.scaling.classics import RESNET18, RESNET18_CIFAR
from effnet_fast.scaling.coefficients import DROP_PATH, PUBLISHED
from effnet_fast.scaling.config import B0, BlockConfig, NetConfig
from effnet_fast.scaling.cost import Cost, Layer
from effnet_fast.scaling.growth import multiplier_growth
from effnet_fast.scaling.law import CompoundScaling
from effnet_fast.scaling.published import FAMILY, LATENCIES, VERSIONS

_CIFAR_CLASSES = 10


class Claim(NamedTuple):
    """What is said, and what is so."""

    said: str
    so: str


def claims() -> tuple[Claim, ...]:
    """Every row."""
    law, config = CompoundScaling(), B0.scaled()
    cost = Cost.of(config)
    return (
        *_of_the_law(law, cost),
        Claim("B3's width multiplier is 1.3", f"{PUBLISHED['b3'].width:g}"),
        *_of_the_block(config, cost),
        _depthwise_saving(),
        *_of_the_print(),
        *_of_cifar(),
    )


def _of_the_law(law: CompoundScaling, cost: Cost) -> Iterator[Claim]:
    product = law.alpha * law.beta * law.gamma
    yield Claim(
        "alpha * beta * gamma is about 2",
        f"{product:.3f}; alpha * beta^2 * gamma^2 is, {law.constraint.value:.3f}: multiply-adds grow by depth, width^2 and side^2",
    )
    at0, at1 = (Cost.of(law.at(phi).config).parameters for phi in (0, 1))
    nearest = law.at(1).nearest
    yield Claim(
        "B0 is phi = 1",
        f"phi = 0: {at0:,} parameters, B0's {cost.parameters:,}; phi = 1, where the grid search is done, has {at1:,}"
        + (f", as {nearest.name} has" if nearest else ""),
    )
    yield Claim(
        "FLOPS are operations per second",
        f"a count per image: B0's {cost.macs / 1e9:.3f} billion are multiply-adds, {cost.flops / 1e9:.3f} billion operations",
    )
    grown = "; ".join(
        f"{row.label} {row.activations:.2f}, {row.parameters:.2f}, {row.macs:.2f}" for row in multiplier_growth(B0)[:3]
    )
    yield Claim(
        "memory and FLOPs grow with width alone, or with depth and side^2 alone",
        f"B0's activations, parameters and multiply-adds grow each otherwise: {grown} times (depthwise layers are linear in width)",
    )


def _of_the_block(config: NetConfig, cost: Cost) -> Iterator[Claim]:
    blocks = tuple(config.blocks())
    readers = [cost.layers[layer.inputs[0]] for layer in cost.layers if layer.kind == "activation"]
    activated = sum(before.launch.endswith(".project") for before in readers)
    yield Claim("MBConv ends in ReLU", f"the projection is linear: of B0's {len(blocks)} blocks {activated} end in an activation")
    yield Claim(
        "stage 9 reduces the channels", f"the head makes {config.head_channels:,} of the last stage's {blocks[-1].out_channels}"
    )
    first, second = blocks[:2]
    strides = sum(block.stride == 2 and block.layer > 0 for block in blocks)
    yield Claim(
        "MBConv as sample Keras code has it: expands at ratio 1, sums strided repeats, no residual, dropout for drop-path, "
        "squeeze-excite by ReLU from the expanded width",
        f"at ratio 1, {first.in_channels} channels stay {first.expanded_channels}; of the repeats, one after another, {strides} "
        f"are strided; {sum(block.residual for block in blocks)} of {len(blocks)} blocks are residual, dropped whole with up to "
        f"{max(block.drop_path for block in blocks):.4g} ({DROP_PATH} i/N); {_excite(second)}, by {config.activation}",
    )


def _excite(block: BlockConfig) -> str:
    return f"squeeze-excite of the second block has {block.se_channels} channels, of its input's {block.in_channels}"


def _depthwise_saving() -> Claim:
    """A depthwise convolution and the projection after it, beside one dense convolution from the same channels to the same."""
    family = [PUBLISHED[net.name.lower()] for net in FAMILY]
    configs = [B0.scaled(row.depth, row.width, row.resolution) for row in family]
    shares = [1 / block.out_channels + 1 / block.kernel_size**2 for config in configs for block in config.blocks()]
    wholes = [_share(Cost.of(config)) for config in configs]
    return Claim(
        "a depthwise separable convolution saves 75 %",
        f"1 - 1/C_out - 1/k^2 of the dense one's multiply-adds: {_saved(shares)} by block of B0 to B7, {_saved(wholes)} by net",
    )


def _saved(shares: Sequence[float]) -> str:
    return f"{100 * (1 - max(shares)):.1f} to {100 * (1 - min(shares)):.1f} %"


def _share(cost: Cost) -> float:
    separable = dense = 0
    for block in cost.by("block").values():
        convolutions = {layer.launch.rpartition(".")[2]: layer for layer in block.layers if _outside_the_gate(layer)}
        if depthwise := convolutions.get("depthwise"):
            project = convolutions["project"]
            separable += depthwise.macs + project.macs
            dense += depthwise.macs * project.output_shape[0]
    return separable / dense


def _outside_the_gate(layer: Layer) -> bool:
    return layer.kind == "conv" and ".se." not in layer.name


def _of_the_print() -> Iterator[Claim]:
    told = ", ".join(f"{nets['B7'][0]} in {version}" for version, nets in VERSIONS.items())
    yield Claim("B7 has 84.3 or 84.4 top-1", f"arXiv 1905.11946 has {told}")
    told = "; ".join(
        f"{row.net} over {row.rival} {row.rival_seconds:g} / {row.seconds:g} s = {row.rival_seconds / row.seconds:.2f} "
        f"({row.ratio.text} printed)"
        for row in LATENCIES
    )
    yield Claim("EfficientNet infers 6.1 times faster", f"on one core of a CPU, one image: {told}")


def _of_cifar() -> Iterator[Claim]:
    large, small = (Cost.of(base.scaled(num_classes=_CIFAR_CLASSES)) for base in (RESNET18, RESNET18_CIFAR))
    yield Claim(
        "ResNet-18 for CIFAR has 11.18 M parameters, 106 MB and 1.8 G multiply-adds at 32x32 with a 3x3 stem",
        f"those are the 7x7 stem's at {RESNET18.resolution}: {_summary(large)}; "
        f"the 3x3 stem's at {RESNET18_CIFAR.resolution}: {_summary(small)}",
    )
    law = CompoundScaling(base=RESNET18_CIFAR)
    exact = ", ".join(f"{law.base.resolution * law.gamma**phi:.2f}" for phi in (1, 2))
    yield Claim(
        "phi = 1 and 2 make CIFAR's images 36 and 48 pixels",
        f"{law.base.resolution} * {law.gamma:g}^phi is {exact}: {law.at(1).config.resolution} and {law.at(2).config.resolution}",
    )


def _summary(cost: Cost) -> str:
    """Memory as torchsummary counts it: image, parameters, and every module's output (a block's own too) twice, in fp32."""
    image = math.prod(cost.layers[0].input_shapes[0])
    elements = image + cost.parameters + 2 * sum(layer.elements for layer in cost.layers)
    return f"{cost.parameters:,}, {4 * elements / 2**20:.1f} MiB, {cost.macs / 1e9:.3f} G"
