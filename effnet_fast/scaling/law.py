"""Compound scaling (arXiv 1905.11946, eq. 3): depth alpha^phi, width beta^phi, resolution gamma^phi of one base net.

The law's points are not the published nets: phi = 0 is B0, phi = 1 has B2's parameters, and B1..B7 are a table of their own
(:data:`effnet_fast.scaling.coefficients.PUBLISHED`). Both go through the same ``BaseNet.scaled``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from effnet_fast.scaling.coefficients import DROP_PATH, PUBLISHED
from effnet_fast.scaling.config import B0, BaseNet, NetConfig
from effnet_fast.scaling.cost import Cost

# Beyond this multiple of the base no net is meant; the largest published one, L2, is 5.3 times as deep as B0.
MAX_MULTIPLIER = 100.0
PHI_TOLERANCE = 1e-9


class Constraint(NamedTuple):
    """alpha * beta^2 * gamma^2, and how far that is from the 2 that makes each step of phi double the MACs."""

    value: float
    distance: float


class NearestNet(NamedTuple):
    """A published net, and its Euclidean distance in the natural logs of (depth, width, resolution)."""

    name: str
    distance: float


@dataclass(frozen=True)
class ScaledNet:
    """A point of the law, or explicit multipliers (then ``phi`` is None).

    depth, width, resolution   multipliers of the base, before rounding
    config                     the net they give: ``config.resolution`` is in pixels, rounded to the nearest
    nearest                    the nearest published EfficientNet; None where the base is not B0
    """

    phi: float | None
    depth: float
    width: float
    resolution: float
    config: NetConfig
    nearest: NearestNet | None

    @property
    def dropout(self) -> float:
        return self.config.dropout

    @property
    def drop_path(self) -> float:
        return self.config.drop_path


@dataclass(frozen=True)
class CompoundScaling:
    """The law: a base net and three coefficients from 1 to ``MAX_MULTIPLIER``, the paper's by default."""

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15
    base: BaseNet = B0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            would_do = f"a coefficient from 1 to {MAX_MULTIPLIER:g}"
            value = _real("CompoundScaling", name, getattr(self, name), would_do)
            if not 1 <= value <= MAX_MULTIPLIER:
                raise ValueError(f"CompoundScaling: {name} is {value!r}; {would_do} would do")
        if not isinstance(self.base, BaseNet):
            raise ValueError(f"CompoundScaling: base is {self.base!r}; a BaseNet such as effnet_fast.scaling.B0 would do")

    @property
    def constraint(self) -> Constraint:
        value = self.alpha * self.beta**2 * self.gamma**2
        return Constraint(value, abs(value - 2))

    @property
    def max_phi(self) -> float:
        """The phi at which the largest coefficient reaches ``MAX_MULTIPLIER``; infinite if all three are 1."""
        largest = max(self.alpha, self.beta, self.gamma)
        return math.log(MAX_MULTIPLIER) / math.log(largest) if largest > 1 else math.inf

    def at(self, phi: float) -> ScaledNet:
        """The net at any real ``phi`` >= 0. Raises ValueError beyond :attr:`max_phi`."""
        would_do = f"a number from 0 to {self.max_phi:.6g}"
        phi = _real("CompoundScaling.at", "phi", phi, would_do)
        if not 0 <= phi <= self.max_phi:
            raise ValueError(
                f"CompoundScaling.at: phi is {phi!r}; {would_do} would do (up to {MAX_MULTIPLIER:g} times {self.base.name})"
            )
        name = f"{self.base.name}_phi{phi:g}" if phi else self.base.name
        return self._build(phi, self.alpha**phi, self.beta**phi, self.gamma**phi, name)

    def scaled(self, depth: float = 1.0, width: float = 1.0, resolution: float = 1.0) -> ScaledNet:
        """The net with explicit multipliers > 0 of the base's depth, width and image side; below 1 makes smaller nets."""
        factors = []
        for name, value in (("depth", depth), ("width", width), ("resolution", resolution)):
            would_do = f"a multiplier of {self.base.name}'s, above 0 and up to {MAX_MULTIPLIER:g}"
            factor = _real("CompoundScaling.scaled", name, value, would_do)
            if not 0 < factor <= MAX_MULTIPLIER:
                raise ValueError(f"CompoundScaling.scaled: {name} is {value!r}; {would_do}, would do")
            factors.append(factor)
        d, w, r = factors
        return self._build(None, d, w, r, f"{self.base.name}_d{d:g}_w{w:g}_r{r:g}")

    def phi_for(
        self,
        *,
        target_macs: float | None = None,
        target_memory: float | None = None,
        training: bool = False,
        dtype: str = "fp32",
        batch: int = 1,
        optimizer_tensors: int = 2,
    ) -> float:
        """The largest phi whose exact cost does not exceed the target, within ``PHI_TOLERANCE``.

        Give one of ``target_macs`` (per image) and ``target_memory`` (bytes; of inference, or of ``training``, at ``dtype`` and
        ``batch``: see :class:`effnet_fast.scaling.cost.Cost`). Raises ValueError where the base itself exceeds the target.
        """
        if (target_macs is None) == (target_memory is None):
            raise ValueError("CompoundScaling.phi_for: give exactly one of target_macs and target_memory")
        measure: Callable[[Cost], int]
        if target_macs is not None:
            name, unit, target = "target_macs", "MACs", _real("CompoundScaling.phi_for", "target_macs", target_macs, "a number > 0")
            measure = _macs
        else:
            name, unit = "target_memory", f"bytes ({'training' if training else 'inference'}, {dtype}, batch {batch})"
            target = _real("CompoundScaling.phi_for", "target_memory", target_memory, "a number of bytes > 0")

            def measure(net: Cost) -> int:
                memory = net.training_memory(dtype, batch, optimizer_tensors) if training else net.inference_memory(dtype, batch)
                return memory.total

        def needed(phi: float) -> int:
            return measure(Cost.of(self.at(phi).config))

        least = needed(0.0)
        if least > target:
            raise ValueError(
                f"CompoundScaling.phi_for: {name} is {target:,.0f}; {self.base.name} (phi = 0) "
                f"already needs {least:,} {unit}, {least - target:,.0f} more; "
                "explicit depth, width or resolution multipliers below 1 make smaller nets"
            )
        phi = self.largest_phi(lambda net: measure(Cost.of(net.config)) <= target)
        if phi == self.max_phi:
            raise ValueError(
                f"CompoundScaling.phi_for: {name} is {target:,.0f}; the largest net of the law (phi = {phi:.6g}) "
                f"needs {needed(phi):,} {unit}, so that or less would do"
            )
        return phi

    def largest_phi(self, fits: Callable[[ScaledNet], bool], tolerance: float = PHI_TOLERANCE) -> float:
        """The largest phi whose net ``fits``, within ``tolerance``, where larger nets fit less and the base does; :attr:`max_phi`
        where all do. Raises ValueError where phi changes nothing."""
        if math.isinf(self.max_phi):
            raise ValueError("CompoundScaling: alpha, beta and gamma are all 1, so phi changes nothing; one above 1 would do")
        low, high = 0.0, min(1.0, self.max_phi)
        while fits(self.at(high)):
            if high == self.max_phi:
                return high
            low, high = high, min(2 * high, self.max_phi)
        while high - low > tolerance:
            middle = (low + high) / 2
            low, high = (middle, high) if fits(self.at(middle)) else (low, middle)
        return low

    def _build(self, phi: float | None, depth: float, width: float, resolution: float, name: str) -> ScaledNet:
        pixels = max(1, math.floor(self.base.resolution * resolution + 0.5))
        size = math.log2(depth) + 2 * math.log2(width) + 2 * math.log2(resolution)
        regularised = {"dropout": _dropout(size), "drop_path": DROP_PATH} if self.base.dropout is None else {}
        config = self.base.scaled(depth, width, pixels, name, **regularised)
        nearest = _nearest(depth, width, resolution) if self.base == B0 else None
        return ScaledNet(phi, depth, width, resolution, config, nearest)


def _macs(net: Cost) -> int:
    return net.macs


def _dropout(size: float) -> float:
    """Linear between the published nets over their size (log2 of d * w^2 * r^2), constant outside."""
    rows = sorted((row.size, row.dropout) for row in PUBLISHED.values())
    if size <= rows[0][0]:
        return rows[0][1]
    for (below, low), (above, high) in zip(rows, rows[1:], strict=False):
        if size <= above:
            return low + (high - low) * (size - below) / (above - below)
    return rows[-1][1]


def _nearest(depth: float, width: float, resolution: float) -> NearestNet:
    def distance(key: str) -> float:
        row = PUBLISHED[key]
        ratios = (depth / row.depth, width / row.width, resolution * B0.resolution / row.resolution)
        return math.hypot(*(math.log(ratio) for ratio in ratios))

    key = min(PUBLISHED, key=distance)
    return NearestNet(f"efficientnet_{key}", distance(key))


def _real(function: str, name: str, value: object, would_do: str) -> float:
    """``value`` as a finite float; bool is no number here."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{function}: {name} is {value!r}; {would_do} would do")
    return number
