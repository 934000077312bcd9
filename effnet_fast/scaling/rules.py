"""One convention for what a published row of multipliers means, and the others that were tried where a row does not follow.

**The convention**, which the whole package follows: a stage's layers are rounded up, channels to the nearest multiple of 8 but to
no less than 90 %, everywhere and so in stem and head (but as :class:`effnet_fast.scaling.config.BaseNet` has a head's own rule);
the image side to the nearest pixel; and what is counted is :attr:`effnet_fast.scaling.cost.Cost.macs`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from effnet_fast.scaling.config import NetConfig, round_channels
from effnet_fast.scaling.cost import Cost
from effnet_fast.scaling.published import PublishedNet


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


# Of each axis the first is the convention; a rule's name tells the others.
LAYERS: dict[str, Callable[[float], int]] = {
    "layers rounded up": math.ceil,
    "layers rounded": _nearest,
    "layers rounded down": math.floor,
}
DIVISORS = {"channels to 8": 8, "channels to 1": 1}
ENDS = ("ends scaled", "head kept", "stem and head kept")
OUTER = ("outer stages scaled", "outer stages' layers kept")
SIDES: dict[str, Callable[[float], int]] = {
    "side to a pixel": _nearest,
    "side to 8 pixels": lambda side: 8 * _nearest(side / 8),
    "side up to 2": lambda side: 2 * math.ceil(side / 2 - 1e-9),
    "side up to 16": lambda side: 16 * math.ceil(side / 16 - 1e-9),
}
COUNTS: dict[str, Callable[[Cost], int]] = {
    "multiply-adds": lambda cost: cost.macs,
    "other operations' outputs too": lambda cost: cost.macs + sum(layer.elements for layer in cost.layers if not layer.macs),
    "convolutions outside squeeze-excite alone": lambda cost: sum(
        layer.macs for layer in cost.layers if layer.kind == "conv" and "se." not in layer.name
    ),
}
AXES = (tuple(LAYERS), tuple(DIVISORS), ENDS, OUTER, tuple(SIDES))


class Alternative(NamedTuple):
    """What another rule gives. ``rule`` names how it differs from the convention."""

    rule: str
    value: float


def build(net: PublishedNet, layers: str, divisor: str, ends: str, outer: str, side: str) -> NetConfig:
    """The net by one choice of each axis. The first of each gives what ``BaseNet.scaled`` does."""
    base, last = net.base, len(net.base.stages) - 1

    def channels(count: int, width: float = net.width) -> int:
        return round_channels(count, width, DIVISORS[divisor], base.round_limit)

    stages = tuple(
        replace(
            stage,
            out_channels=channels(stage.out_channels // stage.expansion) * stage.expansion,
            layers=stage.layers if outer == OUTER[1] and number in (0, last) else LAYERS[layers](stage.layers * net.depth),
        )
        for number, stage in enumerate(base.stages)
    )
    head = base.head_channels
    return replace(
        base.scaled(),
        stages=stages,
        stem_channels=base.stem_channels if ends == ENDS[2] else channels(base.stem_channels),
        head_channels=head and (channels(head, base.head_width(net.width)) if ends == ENDS[0] else head),
        resolution=SIDES[side](net.base.resolution * net.resolution),
    )


def convention(net: PublishedNet) -> Cost:
    """What the net costs by the convention."""
    return Cost.of(build(net, *(axis[0] for axis in AXES)))


def alternatives(net: PublishedNet, quantity: str) -> tuple[Alternative, ...]:
    """Every other combination of the axes that gives another figure, the fewest differences first; ``quantity`` is "parameters"
    or "FLOPs"."""
    counts = COUNTS if quantity == "FLOPs" else {"": lambda cost: cost.parameters}
    found: list[tuple[int, str, int]] = []
    for choices, config in _distinct(net):
        cost = Cost.of(config)
        for number, (name, count) in enumerate(counts.items()):
            differs = [choice for axis, choice in zip(AXES, choices, strict=True) if choice != axis[0]] + [name] * (number > 0)
            found.append((len(differs), ", ".join(differs), count(cost)))
    told: dict[int, str] = {}
    for _, rule, value in sorted(found, key=lambda one: one[0]):
        told.setdefault(value, rule)
    return tuple(Alternative(rule, value) for value, rule in told.items() if rule)


def given_by_rule(nets: Iterable[PublishedNet]) -> Counter[tuple[str, ...]]:
    """Of how many nets each rule, a choice of every axis and a count, gives the printed FLOPs."""
    given: Counter[tuple[str, ...]] = Counter()
    for net in nets:
        fits: dict[NetConfig, list[str]] = {}
        for choices in itertools.product(*AXES):
            config = build(net, *choices)
            if config not in fits:
                cost = Cost.of(config)
                fits[config] = [name for name, count in COUNTS.items() if net.flops.agrees(count(cost))]
            given.update((*choices, name) for name in fits[config])
    return given


def _distinct(net: PublishedNet) -> Iterator[tuple[tuple[str, ...], NetConfig]]:
    def differences(choices: tuple[str, ...]) -> int:
        return sum(choice != axis[0] for axis, choice in zip(AXES, choices, strict=True))

    seen = set()
    for choices in sorted(itertools.product(*AXES), key=differences):
        config = build(net, *choices)
        if config not in seen:
            seen.add(config)
            yield choices, config
