"""What a scaled net scores, as a law fitted to published points. It is a fit: its residuals are part of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from effnet_fast.scaling.coefficients import PUBLISHED
from effnet_fast.scaling.config import B0, BaseNet, NetConfig, is_real
from effnet_fast.scaling.law import ScaledNet

_DIMENSIONS = ("depth", "width", "resolution")
_EXPONENTS = np.arange(0.5, 6.01, 0.25)


class AccuracyPoint(NamedTuple):
    """Top-1 in percent of a net with these multipliers, >= 1, of its base's depth, width and image side."""

    name: str
    depth: float
    width: float
    resolution: float
    top1: float


# ImageNet, of nets of arXiv 1905.11946: B0 to B7 as often quoted (those of table 2 in v1 and v5 differ, they are in
# effnet_fast.scaling.published), and table 7, where B0 is scaled to 1.8 GMACs.
_TOP1 = {"b0": 77.3, "b1": 79.2, "b2": 80.3, "b3": 81.7, "b4": 83.0, "b5": 83.7, "b6": 84.2, "b7": 84.4}
POINTS = (
    *(
        AccuracyPoint(key, PUBLISHED[key].depth, PUBLISHED[key].width, PUBLISHED[key].resolution / B0.resolution, top1)
        for key, top1 in _TOP1.items()
    ),
    AccuracyPoint("d=4", 4.0, 1.0, 1.0, 79.0),
    AccuracyPoint("w=2", 1.0, 2.0, 1.0, 78.9),
    AccuracyPoint("r=2", 1.0, 1.0, 2.0, 79.1),
    AccuracyPoint("d=1.4 w=1.2 r=1.3", 1.4, 1.2, 1.3, 81.1),
)


@dataclass(frozen=True)
class AccuracyFit:
    """top-1 = c0 + c1 s(d) + c2 s(w) + c3 s(r) + c4 s(d) s(w) s(r), with s(x) = 1 - x^-exponent.

    Each dimension alone saturates (arXiv 1905.11946, section 3.2, observation 1); the last term is earned by all three together
    (section 3.3, observation 2). d is the net's blocks over the base's, which rounding makes more than the multiplier; w and r are
    the multipliers of width and image side.

    left_out   root mean square, in percent, of what each point is off a fit to the others
    """

    base: BaseNet
    points: tuple[AccuracyPoint, ...]
    exponent: float
    coefficients: tuple[float, ...]
    left_out: float

    def __call__(self, net: ScaledNet) -> float:
        """Top-1 in percent. Raises ValueError for a net below the base, of which the points say nothing."""
        d, w, r = factors = self._factors(net)
        for name, factor in zip(_DIMENSIONS, factors, strict=True):
            if factor < 1:
                raise ValueError(f"AccuracyFit: {name} is {factor:.4g} times {self.base.name}'s; the points begin at 1")
        return float(_features(np.array([[d, w, r]]), self.exponent)[0] @ np.array(self.coefficients))

    @property
    def residuals(self) -> tuple[float, ...]:
        """Published less fitted, of each point."""
        found = _features(_multipliers(self.base, self.points), self.exponent) @ np.array(self.coefficients)
        return tuple(point.top1 - float(value) for point, value in zip(self.points, found, strict=True))

    def beyond(self, net: ScaledNet) -> tuple[str, ...]:
        """The dimensions in which ``net`` is larger than any point: there the law is extrapolated."""
        most = _multipliers(self.base, self.points).max(0)
        return tuple(name for name, x, end in zip(_DIMENSIONS, self._factors(net), most, strict=True) if x > end * (1 + 1e-9))

    def _factors(self, net: ScaledNet) -> tuple[float, float, float]:
        return _blocks(net.config) / _blocks(self.base.scaled()), net.width, net.resolution

    def __str__(self) -> str:
        constant, depth, width, resolution, all_three = self.coefficients
        residuals = self.residuals
        return (
            f"top-1 = {constant:.1f} {depth:+.2f} s(d) {width:+.2f} s(w) {resolution:+.2f} s(r) {all_three:+.2f} s(d) s(w) s(r), "
            f"s(x) = 1 - x^-{self.exponent:g}: a fit to {len(self.points)} points, off by {_rms(residuals):.2f} (rms), "
            f"{max(map(abs, residuals)):.2f} at most, {self.left_out:.2f} (rms) where a point is left out"
        )


def fit_accuracy(points: Sequence[AccuracyPoint] = POINTS, base: BaseNet = B0) -> AccuracyFit:
    """Least squares for the coefficients; the exponent is that with which a point left out is met best.

    Raises ValueError where a point is no net of ``base`` or larger, or the points do not tell the dimensions apart.
    """
    for point in points:
        if not all(map(is_real, point[1:])) or min(point[1:4]) < 1:
            raise ValueError(f"fit_accuracy: point {point.name!r} is {point[1:]}; multipliers >= 1 and a top-1 would do")
    factors = _multipliers(base, points) if points else np.ones((0, 3))
    top1 = np.array([point.top1 for point in points])
    best: tuple[float, float] | None = None
    for exponent in _EXPONENTS:
        left_out = _left_out(_features(factors, exponent), top1)
        if left_out is not None and (best is None or left_out < best[0]):
            best = left_out, float(exponent)
    if best is None:
        raise ValueError(
            f"fit_accuracy: {len(points)} points do not tell the dimensions apart; the base, two or more scaled in each dimension "
            "alone, and two or more in all would do"
        )
    coefficients = np.linalg.lstsq(_features(factors, best[1]), top1, rcond=None)[0]
    return AccuracyFit(base, tuple(points), best[1], tuple(map(float, coefficients)), best[0])


@cache
def published_fit() -> AccuracyFit:
    """The fit to :data:`POINTS`, of B0 on ImageNet."""
    return fit_accuracy()


def _blocks(config: NetConfig) -> int:
    return sum(stage.layers for stage in config.stages)


def _multipliers(base: BaseNet, points: Sequence[AccuracyPoint]) -> np.ndarray:
    blocks = _blocks(base.scaled())
    return np.array([(_blocks(base.scaled(depth=point.depth)) / blocks, point.width, point.resolution) for point in points])


def _features(factors: np.ndarray, exponent: float) -> np.ndarray:
    """[N, 3] -> [N, 5]."""
    saturated = 1 - factors**-exponent
    return np.column_stack([np.ones(len(factors)), saturated, saturated.prod(1)])


def _left_out(features: np.ndarray, top1: np.ndarray) -> float | None:
    """Root mean square of each point's distance from the fit to the others; None where those do not determine one."""
    off = []
    for one in range(len(top1)):
        others = np.arange(len(top1)) != one
        coefficients, _, rank, _ = np.linalg.lstsq(features[others], top1[others], rcond=None)
        if rank < features.shape[1]:
            return None
        off.append(float(top1[one] - features[one] @ coefficients))
    return _rms(off) if off else None


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))
