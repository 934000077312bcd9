"""How costs grow: exact ratios beside the rule of thumb, and the phi at which rounding lets the net change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from effnet_fast.scaling.config import B0, BaseNet, round_channels
from effnet_fast.scaling.cost import Cost
from effnet_fast.scaling.law import CompoundScaling, ScaledNet

_DIVISOR = 8


class Growth(NamedTuple):
    """Exact cost over the base's, and what the rule of thumb says of it.

    The rules (arXiv 1905.11946, section 3.3, for MACs): MACs d * w^2 * r^2, or 2^phi on the law; parameters d * w^2; activations
    d * w * r^2. Depthwise layers, the ends of the net and rounding make the difference.

    depthwise  MACs of the depthwise convolutions alone, which width does not square: d * w * r^2; None where there are none
    peak       elements alive at once in inference: w * r^2
    saved      elements kept for backward, of one image: d * w * r^2
    layers, channels, pixels   what rounding made of the multipliers: blocks over the base's (d), the mean over the
               stages of their width's own growth (w), pixels of the image (r^2)
    """

    label: str
    depth: float
    width: float
    resolution: float
    macs: float
    macs_rule: float
    parameters: float
    parameters_rule: float
    activations: float
    activations_rule: float
    depthwise: float | None
    depthwise_rule: float
    peak: float
    peak_rule: float
    saved: float
    saved_rule: float
    layers: float
    channels: float
    pixels: float


class Threshold(NamedTuple):
    """A change of the net at or just above ``phi``: ``part`` "stem", "blocks.S" or "head", ``quantity`` "layers" or "channels"."""

    phi: float
    part: str
    quantity: str
    before: int
    after: int


def multiplier_growth(base: BaseNet = B0, *, depth: float = 2.0, width: float = 2.0, resolution: float = 2.0) -> tuple[Growth, ...]:
    """Rows for depth alone, width alone, resolution alone, and the three together, as multipliers of ``base``."""
    law = CompoundScaling(base=base)
    return tuple(_row(law, label, law.scaled(*factors)) for label, factors in _combinations(depth, width, resolution))


def compound_growth(law: CompoundScaling | BaseNet = B0, phi: float = 1.0) -> tuple[Growth, ...]:
    """Rows for alpha^phi, beta^phi and gamma^phi alone, and for the law's net at ``phi``, whose MACs should be 2^phi."""
    law = _law(law, "compound_growth")
    net = law.at(phi)
    rows = [_row(law, label, law.scaled(*factors)) for label, factors in _combinations(net.depth, net.width, net.resolution)[:3]]
    return (*rows, _row(law, f"phi={phi:g}", net)._replace(macs_rule=2.0**phi))


def growth_rows(law: CompoundScaling | BaseNet = B0) -> tuple[Growth, ...]:
    """Rows for twice each dimension of the law's base, for twice all three, and for the law's net at phi = 1."""
    law = _law(law, "growth_rows")
    return (*multiplier_growth(law.base), compound_growth(law)[-1])


def thresholds(law: CompoundScaling | BaseNet = B0, phi_max: float = 7.0) -> tuple[Threshold, ...]:
    """Every change of a stage's layers, and of any part's channels, for 0 <= phi <= ``phi_max``, by rising phi.

    Closed form, so exact up to the last bits of a float. Layers are ceil(n * alpha^phi): the net gains a layer *just above* the
    phi given, hence one in every stage just above 0. Resolution, which changes at nearly every pixel, is not listed.
    """
    law = _law(law, "thresholds")
    try:
        law.at(phi_max)
    except ValueError as error:
        raise ValueError(f"thresholds: phi_max is {phi_max!r}; a number from 0 to {law.max_phi:.6g} would do") from error
    return tuple(sorted(_crossings(law, float(phi_max)), key=lambda row: row.phi))


def _crossings(law: CompoundScaling, phi_max: float) -> Iterator[Threshold]:
    base = law.base
    last = len(base.stages) - 1
    for number, stage in enumerate(base.stages):
        if not (base.fixed_ends and number in (0, last)):
            layers = stage.layers
            while (phi := _power(layers / stage.layers, law.alpha)) <= phi_max:
                yield Threshold(phi, f"blocks.{number}", "layers", layers, layers + 1)
                layers += 1
    parts = [
        (f"blocks.{number}", stage.out_channels // stage.expansion, stage.expansion) for number, stage in enumerate(base.stages)
    ]
    if not base.fixed_ends:
        parts.append(("stem", base.stem_channels, 1))
    if base.head_channels and base.head_width(2.0) > 1:
        parts.append(("head", base.head_channels, 1))
    for part, count, times in parts:
        channels = round_channels(count, limit=base.round_limit)
        # Rounding reaches the next multiple half a divisor early, or where staying would fall below the limit.
        while (phi := _power(_width_reaching(channels + _DIVISOR, base.round_limit) / count, law.beta)) <= phi_max:
            yield Threshold(phi, part, "channels", times * channels, times * (channels + _DIVISOR))
            channels += _DIVISOR


def _width_reaching(channels: int, limit: float) -> float:
    half = channels - _DIVISOR / 2
    return min(half, (channels - _DIVISOR) / limit) if limit else half


def _power(ratio: float, coefficient: float) -> float:
    """The phi at which coefficient^phi is ``ratio``."""
    return math.log(ratio) / math.log(coefficient) if coefficient > 1 else math.inf


def _combinations(depth: float, width: float, resolution: float) -> list[tuple[str, tuple[float, float, float]]]:
    return [
        (f"d={depth:g}", (depth, 1.0, 1.0)),
        (f"w={width:g}", (1.0, width, 1.0)),
        (f"r={resolution:g}", (1.0, 1.0, resolution)),
        (f"d={depth:g} w={width:g} r={resolution:g}", (depth, width, resolution)),
    ]


def _row(law: CompoundScaling, label: str, net: ScaledNet) -> Growth:
    d, w, r = net.depth, net.width, net.resolution
    base, config = law.base.scaled(), net.config
    before, after = Cost.of(base), Cost.of(config)
    depthwise = [_depthwise_macs(cost) for cost in (before, after)]
    widths = [new.out_channels / old.out_channels for old, new in zip(base.stages, config.stages, strict=True)]
    return Growth(
        label,
        d,
        w,
        r,
        macs=after.macs / before.macs,
        macs_rule=d * w**2 * r**2,
        parameters=after.parameters / before.parameters,
        parameters_rule=d * w**2,
        activations=after.activations / before.activations,
        activations_rule=d * w * r**2,
        depthwise=depthwise[1] / depthwise[0] if depthwise[0] else None,
        depthwise_rule=d * w * r**2,
        peak=_peak(after) / _peak(before),
        peak_rule=w * r**2,
        saved=after.saved_elements() / before.saved_elements(),
        saved_rule=d * w * r**2,
        layers=sum(stage.layers for stage in config.stages) / sum(stage.layers for stage in base.stages),
        channels=sum(widths) / len(widths),
        pixels=(config.resolution / base.resolution) ** 2,
    )


def _depthwise_macs(cost: Cost) -> int:
    return sum(layer.macs for layer in cost.layers if layer.kind == "conv" and layer.launch.endswith(".depthwise"))


def _peak(cost: Cost) -> int:
    return max(layer.live for layer in cost.layers)


def _law(law: CompoundScaling | BaseNet, function: str) -> CompoundScaling:
    if isinstance(law, BaseNet):
        return CompoundScaling(base=law)
    if not isinstance(law, CompoundScaling):
        raise ValueError(f"{function}: law is {law!r}; a CompoundScaling or a BaseNet would do")
    return law
