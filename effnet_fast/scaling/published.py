"""Figures that the EfficientNet paper printed, as it printed them: arXiv 1905.11946 in its fifth version (v5, 2020).

But the accuracies of :data:`FAMILY` are those that are often quoted, a column that table 2 has neither in v1 nor in v5 (table 7 of
v5 has its B0, 77.3, and the text its B4, 83.0); :data:`VERSIONS` has those of table 2 in v1 and v5. "FLOPs" are multiply-adds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from effnet_fast.scaling.classics import MOBILENET_V1, MOBILENET_V2, RESNET50
from effnet_fast.scaling.coefficients import PUBLISHED
from effnet_fast.scaling.config import B0, BaseNet
from effnet_fast.scaling.fit import POINTS

PAPER = "arXiv 1905.11946v5"
OF_FAMILY = "accuracies of B0 to B7 as often quoted, table 2 of neither v1 nor v5 has them all"
UNITS = {"": 1.0, "x": 1.0, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Figure:
    """A number as printed: "5.3M", ".39B", "8.9x" or "77.3". It stands for all that rounds to it."""

    text: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d*\.?\d+[MBx]?", self.text):
            raise ValueError(f"Figure: text is {self.text!r}; a number such as '5.3M', '.39B' or '8.9x' would do")

    @property
    def value(self) -> float:
        return float(self.text.rstrip("MBx")) * UNITS[self.unit]

    @property
    def unit(self) -> str:
        return self.text.lstrip("0123456789.")

    @property
    def tolerance(self) -> float:
        """Half of the last digit."""
        decimals = len(self.text.rstrip("MBx").partition(".")[2])
        return 0.5 * 10.0**-decimals * UNITS[self.unit]

    def agrees(self, value: float) -> bool:
        return abs(value - self.value) <= self.tolerance * (1 + 1e-9)


class PublishedNet(NamedTuple):
    """A net of the paper: multipliers of a base's depth, width and image side, top-1 and top-5 in percent, and its figures."""

    name: str
    base: BaseNet
    depth: float
    width: float
    resolution: float
    top1: float
    flops: Figure
    parameters: Figure | None = None
    top5: float | None = None


class Rival(NamedTuple):
    """A net of others that the paper sets beside the EfficientNet ``group``, and how many times that one's figures it says."""

    name: str
    group: str
    top1: float
    top5: float
    parameters: Figure
    flops: Figure | None
    parameters_ratio: Figure
    flops_ratio: Figure | None


class Transfer(NamedTuple):
    """An accuracy on another data set, of a net with ``classes`` outputs; without parameters where the paper gives none."""

    dataset: str
    net: str
    classes: int
    accuracy: float
    parameters: Figure | None


class Latency(NamedTuple):
    """Seconds of one image on one core of an Intel Xeon E5-2690, and the ratio that the paper says."""

    net: str
    seconds: float
    rival: str
    rival_seconds: float
    ratio: Figure


def _family(key: str, top5: float, parameters: str, flops: str) -> PublishedNet:
    row = PUBLISHED[key]
    multipliers = row.depth, row.width, row.resolution / B0.resolution
    return PublishedNet(f"B{key[1]}", B0, *multipliers, _TOP1[key], Figure(flops), Figure(parameters), top5)


def _scaled(name: str, base: BaseNet, top1: float, flops: str, d: float = 1.0, w: float = 1.0, r: float = 1.0) -> PublishedNet:
    return PublishedNet(name, base, d, w, r, top1, Figure(flops))


_TOP1 = {point.name: point.top1 for point in POINTS}
_COMPOUND = "d=1.4 w=1.2 r=1.3"

# Table 2; all versions have the same parameters and FLOPs.
FAMILY = (
    _family("b0", 93.5, "5.3M", ".39B"),
    _family("b1", 94.5, "7.8M", ".70B"),
    _family("b2", 95.0, "9.2M", "1.0B"),
    _family("b3", 95.6, "12M", "1.8B"),
    _family("b4", 96.3, "19M", "4.2B"),
    _family("b5", 96.7, "30M", "9.9B"),
    _family("b6", 96.8, "43M", "19B"),
    _family("b7", 97.1, "66M", "37B"),
)

# Table 2 of two versions: top-1 and top-5.
VERSIONS: dict[str, dict[str, tuple[float, float]]] = {
    "v1": {
        "B0": (76.3, 93.2),
        "B1": (78.8, 94.4),
        "B2": (79.8, 94.9),
        "B3": (81.1, 95.5),
        "B4": (82.6, 96.3),
        "B5": (83.3, 96.7),
        "B6": (84.0, 96.9),
        "B7": (84.4, 97.1),
    },
    "v5": {
        "B0": (77.1, 93.3),
        "B1": (79.1, 94.4),
        "B2": (80.1, 94.9),
        "B3": (81.6, 95.7),
        "B4": (82.9, 96.4),
        "B5": (83.6, 96.7),
        "B6": (84.0, 96.8),
        "B7": (84.3, 97.0),
    },
}

# Table 3. It gives the compound multipliers of MobileNetV1 alone; the others are taken to have the same. ResNet-50's d=4 and w=2
# look as if they had changed places, but do not follow so either.
SCALED_UP = (
    _scaled("MobileNetV1", MOBILENET_V1, 70.6, ".6B"),
    _scaled("MobileNetV1 w=2", MOBILENET_V1, 74.2, "2.2B", w=2),
    _scaled("MobileNetV1 r=2", MOBILENET_V1, 72.7, "2.2B", r=2),
    _scaled(f"MobileNetV1 {_COMPOUND}", MOBILENET_V1, 75.6, "2.3B", 1.4, 1.2, 1.3),
    _scaled("MobileNetV2", MOBILENET_V2, 72.0, ".3B"),
    _scaled("MobileNetV2 d=4", MOBILENET_V2, 76.8, "1.2B", d=4),
    _scaled("MobileNetV2 w=2", MOBILENET_V2, 76.4, "1.1B", w=2),
    _scaled("MobileNetV2 r=2", MOBILENET_V2, 74.8, "1.2B", r=2),
    _scaled(f"MobileNetV2 {_COMPOUND}", MOBILENET_V2, 77.4, "1.3B", 1.4, 1.2, 1.3),
    _scaled("ResNet-50", RESNET50, 76.0, "4.1B"),
    _scaled("ResNet-50 d=4", RESNET50, 78.1, "16.2B", d=4),
    _scaled("ResNet-50 w=2", RESNET50, 77.7, "14.7B", w=2),
    _scaled("ResNet-50 r=2", RESNET50, 77.5, "16.4B", r=2),
    _scaled(f"ResNet-50 {_COMPOUND}", RESNET50, 78.8, "16.7B", 1.4, 1.2, 1.3),
)

# Table 7.
B0_SCALED = (
    _scaled("B0", B0, _TOP1["b0"], ".4B"),
    _scaled("B0 d=4", B0, _TOP1["d=4"], "1.8B", d=4),
    _scaled("B0 w=2", B0, _TOP1["w=2"], "1.8B", w=2),
    _scaled("B0 r=2", B0, _TOP1["r=2"], "1.9B", r=2),
    _scaled(f"B0 {_COMPOUND}", B0, _TOP1[_COMPOUND], "1.8B", 1.4, 1.2, 1.3),
)


def _rival(
    name: str, group: str, top1: float, top5: float, size: str, flops: str | None, size_ratio: str, flops_ratio: str | None
) -> Rival:
    def printed(text: str | None) -> Figure | None:
        return None if text is None else Figure(text)

    return Rival(name, group, top1, top5, Figure(size), printed(flops), Figure(size_ratio), printed(flops_ratio))


# Table 2: the nets of others, each in the group of the EfficientNet that is about as accurate.
RIVALS = (
    _rival("ResNet-50", "B0", 76.0, 93.0, "26M", "4.1B", "4.9x", "11x"),
    _rival("DenseNet-169", "B0", 76.2, 93.2, "14M", "3.5B", "2.6x", "8.9x"),
    _rival("ResNet-152", "B1", 77.8, 93.8, "60M", "11B", "7.6x", "16x"),
    _rival("DenseNet-264", "B1", 77.9, 93.9, "34M", "6.0B", "4.3x", "8.6x"),
    _rival("Inception-v3", "B1", 78.8, 94.4, "24M", "5.7B", "3.0x", "8.1x"),
    _rival("Xception", "B1", 79.0, 94.5, "23M", "8.4B", "3.0x", "12x"),
    _rival("Inception-v4", "B2", 80.0, 95.0, "48M", "13B", "5.2x", "13x"),
    _rival("Inception-resnet-v2", "B2", 80.1, 95.1, "56M", "13B", "6.1x", "13x"),
    _rival("ResNeXt-101", "B3", 80.9, 95.6, "84M", "32B", "7.0x", "18x"),
    _rival("PolyNet", "B3", 81.3, 95.8, "92M", "35B", "7.7x", "19x"),
    _rival("SENet", "B4", 82.7, 96.2, "146M", "42B", "7.7x", "10x"),
    _rival("NASNet-A", "B4", 82.7, 96.2, "89M", "24B", "4.7x", "5.7x"),
    _rival("AmoebaNet-A", "B4", 82.8, 96.1, "87M", "23B", "4.6x", "5.5x"),
    _rival("PNASNet", "B4", 82.9, 96.2, "86M", "23B", "4.5x", "6.0x"),
    _rival("AmoebaNet-C", "B5", 83.5, 96.5, "155M", "41B", "5.2x", "4.1x"),
    _rival("GPipe", "B7", 84.3, 97.0, "557M", None, "8.4x", None),
)

# Table 5. Parameters are of the net with that data set's classes.
TRANSFER = (
    Transfer("CIFAR-100", "B7", 100, 91.7, Figure("64M")),
    Transfer("Flowers", "B7", 102, 98.8, None),
    Transfer("Stanford Cars", "B3", 196, 93.6, Figure("10M")),
)

# Table 4.
LATENCIES = (
    Latency("B1", 0.098, "ResNet-152", 0.554, Figure("5.7x")),
    Latency("B7", 3.1, "GPipe", 19.0, Figure("6.1x")),
)
