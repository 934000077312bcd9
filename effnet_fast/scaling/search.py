"""The best net within a budget (arXiv 1905.11946, eq. 2): maximise Accuracy(N(d, w, r)) subject to memory, MACs, parameters, time.

Accuracy and latency are callables of a :class:`ScaledNet`, so that this knows neither a data set nor a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from effnet_fast.scaling.coefficients import PUBLISHED
from effnet_fast.scaling.config import B0, BaseNet, NetConfig, as_real, is_real, is_whole
from effnet_fast.scaling.cost import ITEM_BYTES, Cost
from effnet_fast.scaling.fit import published_fit
from effnet_fast.scaling.law import MAX_MULTIPLIER, PHI_TOLERANCE, CompoundScaling, ScaledNet

LADDER = tuple(2 ** (step / 8) for step in range(17))
LATENCY_TOLERANCE = 1 / 64  # of phi: a measured time does not tell nearer nets apart
_UNITS = {"macs": "MACs", "parameters": "parameters", "memory": "bytes", "milliseconds": "ms"}
_SIDES = 28  # of the base's image are the steps that a free resolution takes: 8 pixels of 224

Measure = Callable[[ScaledNet], float]


class Limit(NamedTuple):
    """What a net may take at most and what it takes, of MACs, parameters, bytes of memory or milliseconds; ``name`` says which."""

    name: str
    most: float
    used: float

    @property
    def slack(self) -> float:
        """What is left; below 0 what is missing."""
        return self.most - self.used


@dataclass(frozen=True)
class Found:
    """A net within the budget.

    accuracy   as the callable has it; None where there is none
    limits     each that was asked for
    binding    the name of that limit which the next larger net of the search exceeds most; None where no limit stops it
    """

    net: ScaledNet
    cost: Cost
    accuracy: float | None
    limits: tuple[Limit, ...]
    binding: str | None

    @property
    def config(self) -> NetConfig:
        return self.net.config


def search(
    law: CompoundScaling | BaseNet = B0,
    *,
    macs: float | str | None = None,
    parameters: float | str | None = None,
    memory: float | str | None = None,
    training: bool = False,
    dtype: str = "fp32",
    batch: int = 1,
    milliseconds: float | None = None,
    latency: Measure | None = None,
    accuracy: Measure | None = None,
    over: str = "phi",
    ladder: Sequence[float] = LADDER,
    keep: int = 5,
    watch: Callable[[ScaledNet], None] | None = None,
) -> tuple[Found, ...]:
    """The ``keep`` most accurate nets within every limit that is given, the best first; equals by fewer MACs.

    law           whose points are taken, or whose base is scaled freely
    macs, parameters, memory   per image, a count, and bytes (of inference, or ``training``, at ``dtype`` and ``batch``: see
                  :class:`effnet_fast.scaling.Cost`); "b2" is what that published net takes
    milliseconds  that ``latency(net)`` may give, which is asked only of nets within the other limits, once each; over "free" not of
                  those whose accuracy with the largest images that may fit is below that of ``keep`` nets found
    accuracy      of a net, larger is better. By default :func:`effnet_fast.scaling.published_fit` where the base is B0; for other
                  bases and over "phi" the larger net is taken for the better
    over          "phi": the largest that fits, and the whole ones below it. "free": of every depth and width of the ``ladder`` of
                  multipliers the net with the largest images that fits, in steps of a 28th of the base's side up to the ladder's
                  end
    watch         is called with each net before it is counted, which is done once, and before it is timed

    Larger nets are taken to need more of everything. Raises ValueError for a bad argument, and where no net fits: it names each
    limit that the smallest net exceeds, and by how much.
    """
    law = CompoundScaling(base=law) if isinstance(law, BaseNet) else law
    if not isinstance(law, CompoundScaling):
        raise ValueError(f"search: law is {law!r}; a CompoundScaling or a BaseNet would do")
    if over not in ("phi", "free"):
        raise ValueError(f"search: over is {over!r}; 'phi' or 'free' would do")
    if accuracy is None and law.base == B0:
        accuracy = published_fit()
    if accuracy is None and over == "free":
        raise ValueError(
            f"search: accuracy is None, and the published points are of {B0.name}; a callable, or over 'phi', would do"
        )
    if (milliseconds is None) != (latency is None):
        raise ValueError("search: milliseconds and latency, which measures them, go together; both or neither would do")
    if not is_whole(keep):
        raise ValueError(f"search: keep is {keep!r}; a whole number >= 1 would do")
    if not isinstance(ladder, Sequence) or not ladder or not all(is_real(rung) and 0 < rung <= MAX_MULTIPLIER for rung in ladder):
        raise ValueError(f"search: ladder is {ladder!r}; one or more multipliers above 0 and up to {MAX_MULTIPLIER:g} would do")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"search: dtype is {dtype!r}; one of {', '.join(ITEM_BYTES)} would do")
    if not is_whole(batch):
        raise ValueError(f"search: batch is {batch!r}; a whole number >= 1 would do")

    def memory_of(cost: Cost) -> int:
        taken = cost.training_memory(dtype, batch) if training else cost.inference_memory(dtype, batch)
        return taken.total

    counts: dict[str, Callable[[Cost], int]] = {
        "macs": lambda cost: cost.macs,
        "parameters": lambda cost: cost.parameters,
        "memory": memory_of,
    }
    most = {
        name: _amount(name, value, counts[name])
        for name, value in (("macs", macs), ("parameters", parameters), ("memory", memory))
        if value is not None
    }
    if milliseconds is not None:
        most["milliseconds"] = _amount("milliseconds", milliseconds)
    if not most:
        raise ValueError("search: nothing limits it; macs, parameters, memory or milliseconds would do")
    budget = _Budget(most, counts, latency, watch)
    scores: dict[ScaledNet, float] = {}

    def score(net: ScaledNet) -> float:
        if accuracy is None:
            return 0.0
        if net not in scores:
            scores[net] = _told("accuracy", accuracy(net), net)
        return scores[net]

    kept: list[tuple[ScaledNet, list[ScaledNet]]] = []

    def promising(net: ScaledNet) -> bool:
        return len(kept) < keep or score(net) >= score(kept[-1][0])

    for one in _over_phi(law, budget) if over == "phi" else _free(law, budget, sorted(set(ladder)), promising):
        kept.append(one)
        if accuracy is not None:
            kept.sort(key=lambda one: (-score(one[0]), budget.amounts(one[0])["macs"]))
        del kept[keep:]
    return tuple(
        Found(net, Cost.of(net.config), None if accuracy is None else score(net), budget.limits(net), budget.binding(larger))
        for net, larger in kept
    )


def _told(name: str, value: float, net: ScaledNet) -> float:
    """What a callable told of ``net``."""
    number = as_real(value)
    if number is None:
        raise ValueError(f"search: {name} gave {value!r} for {net.config.name}; a finite number would do")
    return number


class _Budget:
    """The limits, and what nets take of each."""

    def __init__(
        self,
        most: dict[str, float],
        counts: dict[str, Callable[[Cost], int]],
        latency: Measure | None,
        watch: Callable[[ScaledNet], None] | None,
    ) -> None:
        self.most, self.counts, self.latency, self.watch = most, counts, latency, watch
        self.used: dict[NetConfig, dict[str, int]] = {}
        self.timed: dict[NetConfig, float] = {}

    def amounts(self, net: ScaledNet) -> dict[str, int]:
        """What ``net`` takes of MACs and of all that is limited; nets that differ in how much dropout alone are counted once."""
        key = replace(net.config, name="", dropout=float(net.config.dropout > 0))  # whose cost has no more of it
        if key not in self.used:
            if self.watch is not None:
                self.watch(net)
            cost = Cost.of(key)
            self.used[key] = {name: count(cost) for name, count in self.counts.items() if name in ("macs", *self.most)}
        return self.used[key]

    def counted(self, net: ScaledNet) -> tuple[Limit, ...]:
        return tuple(Limit(name, self.most[name], used) for name, used in self.amounts(net).items() if name in self.most)

    def limits(self, net: ScaledNet) -> tuple[Limit, ...]:
        if self.latency is None:
            return self.counted(net)
        key = replace(net.config, name="")
        if key not in self.timed:
            if self.watch is not None:
                self.watch(net)
            self.timed[key] = _told("latency", self.latency(net), net)
        return (*self.counted(net), Limit("milliseconds", self.most["milliseconds"], self.timed[key]))

    def exceeded_counts(self, net: ScaledNet) -> list[Limit]:
        return [limit for limit in self.counted(net) if limit.slack < 0]

    def exceeded(self, net: ScaledNet) -> list[Limit]:
        """The limits that ``net`` exceeds, that by most first; it is timed only where it exceeds no other."""
        beyond = self.exceeded_counts(net) or [limit for limit in self.limits(net) if limit.slack < 0]
        return sorted(beyond, key=lambda limit: limit.most / limit.used)

    def binding(self, larger: list[ScaledNet]) -> str | None:
        """What the first of ``larger`` that does not fit exceeds most."""
        return next((beyond[0].name for net in larger if (beyond := self.exceeded(net))), None)

    def check(self, smallest: ScaledNet, instead: str = "") -> None:
        if beyond := self.exceeded(smallest):
            told = " and ".join(
                f"{name} is {_amount_told(name, most)}; {smallest.config.name} already needs "
                f"{_amount_told(name, used)} {_UNITS[name]}, {_amount_told(name, used - most)} more"
                for name, most, used in beyond
            )
            raise ValueError(f"search: {told}; no smaller net is searched, so that or more{instead} would do")


def _amount_told(name: str, value: float) -> str:
    """Counts to the last digit, times to four."""
    return f"{value:.4g}" if name == "milliseconds" else f"{value:,.15g}"


def _over_phi(law: CompoundScaling, budget: _Budget) -> Iterator[tuple[ScaledNet, list[ScaledNet]]]:
    """Nets within the budget, each with the next larger ones, of which one binds."""
    budget.check(law.at(0), ", or a smaller base,")
    tolerance = PHI_TOLERANCE if budget.latency is None else LATENCY_TOLERANCE
    phi = law.largest_phi(lambda net: not budget.exceeded(net), tolerance)
    yield law.at(phi), [] if phi == law.max_phi else [law.at(min(phi + tolerance, law.max_phi))]
    for whole in range(int(phi), -1, -1):
        if whole < phi and not budget.exceeded(law.at(whole)):  # a measured time need not rise with phi
            yield law.at(whole), []


def _free(
    law: CompoundScaling, budget: _Budget, rungs: list[float], promising: Callable[[ScaledNet], bool]
) -> Iterator[tuple[ScaledNet, list[ScaledNet]]]:
    """As :func:`_over_phi`. Nets are timed only where the largest that may fit is ``promising``."""
    side = law.base.resolution
    step = max(1, side // _SIDES)
    first, last = (max(1, round(side * rung)) for rung in (rungs[0], rungs[-1]))
    sides = range(first, last + 1, step)
    budget.check(law.scaled(rungs[0], rungs[0], first / side))
    depths, widths = (_distinct(law.base, rungs, dimension) for dimension in ("depth", "width"))
    # What fits at a depth and width fits at no larger image deeper or wider, so each search begins where its neighbours' ended.
    ends = dict.fromkeys(widths, len(sides) - 1)

    def net(depth: float, width: float, number: int) -> ScaledNet:
        return law.scaled(depth, width, sides[number] / side)

    for depth, deeper in zip(depths, [*depths[1:], None], strict=True):
        end = len(sides) - 1
        for width, wider in zip(widths, [*widths[1:], None], strict=True):
            here = partial(net, depth, width)
            end = _last(here, min(end, ends[width]), budget.exceeded_counts)
            found = end >= 0
            if found and budget.latency is not None and (found := promising(here(end))):
                end = _last(here, end, budget.exceeded)
                found = end >= 0
            ends[width] = end
            if not found:
                continue
            larger = [here(end + 1)] if end + 1 < len(sides) else []
            # At the ladder's end of one dimension it is another that might grow.
            larger += [net(depth, wider, end)] if wider else []
            larger += [net(deeper, width, end)] if deeper else []
            yield here(end), larger


def _last(net: Callable[[int], ScaledNet], end: int, exceeded: Callable[[ScaledNet], list[Limit]]) -> int:
    """The last of 0 to ``end`` whose net exceeds nothing, where all before it do not; -1 where none does."""
    low = -1
    while low < end:
        middle = (low + end + 1) // 2
        low, end = (low, middle - 1) if exceeded(net(middle)) else (middle, end)
    return low


def _distinct(base: BaseNet, rungs: list[float], dimension: str) -> list[float]:
    """The multipliers that give nets of their own: rounding makes one of several."""

    def scaled(rung: float) -> NetConfig:
        return base.scaled(depth=rung) if dimension == "depth" else base.scaled(width=rung)

    return list({scaled(rung): rung for rung in reversed(rungs)}.values())[::-1]


def _amount(name: str, value: float | str, count: Callable[[Cost], int] | None = None) -> float:
    if count is not None and isinstance(value, str) and value in PUBLISHED:
        row = PUBLISHED[value]
        return count(Cost.of(B0.scaled(row.depth, row.width, row.resolution)))
    number = as_real(value)
    if number is None or number <= 0:
        names = " or one of " + ", ".join(PUBLISHED) if count else ""
        raise ValueError(f"search: {name} is {value!r}; a number > 0{names} would do")
    return number
