"""The pictures of ``scale`` and ``grid`` (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from effnet_fast.cli.table import si
from effnet_fast.colours import BLUE, GREEN, GREY, ORANGE, PINK
from effnet_fast.scaling import CompoundScaling, Cost, Found, Grid, ScaledNet
from effnet_fast.scaling.fit import AccuracyFit
from effnet_fast.weights.files import whole

_ALONE = {"depth": BLUE, "width": GREEN, "resolution": PINK}


def draw_found(law: CompoundScaling, found: Sequence[Found], fit: AccuracyFit | None, out: Path) -> None:
    """Write ``out``: the nets found among the law's and those of one dimension alone, and the best one's cost by stage."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    best = found[0]
    if fit is not None:
        macs = [limit.most for limit in best.limits if limit.name == "macs"]
        _curves(left, law, fit, 1.3 * max([best.cost.macs, *macs]))
        left.plot([_gmacs(one.net) for one in found], [one.accuracy for one in found], "o", color=ORANGE, label="found")
        left.plot(_gmacs(best.net), best.accuracy, "*", color=ORANGE, ms=14, label="the best of them")
        left.set_ylabel("top-1, %, by the fit to published points")
        left.legend(fontsize=8, frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(-0.12, -0.13))
    else:
        phis = np.linspace(0, best.net.phi or min(1.0, law.max_phi), 30)
        left.plot([_gmacs(law.at(phi)) for phi in phis], phis, color="black", lw=1)
        left.plot(_gmacs(best.net), best.net.phi, "*", color=ORANGE, ms=14)
        left.set_ylabel("phi")
    left.set_xlabel("GMACs per image")
    for limit in best.limits:
        if limit.name == "macs":
            left.axvline(limit.most / 1e9, color="black", lw=0.8, ls=":")
    told = ", ".join(f"{limit.name} {si(limit.used)} of {si(limit.most)}" for limit in best.limits)
    figure.suptitle(f"{told}; binding: {best.binding or 'nothing'}", fontsize=9)
    stages = best.cost.by("stage")
    places = np.arange(len(stages))
    shares = (("MACs", "macs", ORANGE), ("parameters", "parameters", BLUE), ("activations", "activations", GREEN))
    for number, (label, quantity, colour) in enumerate(shares):
        total = getattr(best.cost, quantity)
        heights = [100 * getattr(part, quantity) / total for part in stages.values()]
        right.bar(places + 0.27 * (number - 1), heights, 0.25, color=colour, label=label)
    right.set_xticks(places, [name.replace("blocks.", "stage ") for name in stages], fontsize=8, rotation=30, ha="right")
    right.set_ylabel("% of the net")
    right.set_title(best.config.name, fontsize=9, loc="left")
    right.legend(fontsize=8, frameon=False)
    _save(figure, out)


def _curves(axes: Axes, law: CompoundScaling, fit: AccuracyFit, macs: float) -> None:
    def line(nets: list[ScaledNet], **style: Any) -> None:
        within = [net for net in nets if Cost.of(net.config).macs <= macs]
        axes.plot([_gmacs(net) for net in within], [fit(net) for net in within], lw=1, **style)

    steps = np.geomspace(1, 6, 40)
    line([law.at(phi) for phi in np.linspace(0, min(7.0, law.max_phi), 60)], color="black", label="the law, by phi")
    for name, colour in _ALONE.items():
        line([law.scaled(**{name: step}) for step in steps], color=colour, label=f"{name} alone")
    points = [(law.scaled(*point[1:4]), point.top1) for point in fit.points]
    shown = [(_gmacs(net), top1) for net, top1 in points if Cost.of(net.config).macs <= macs]
    if shown:
        axes.plot(*zip(*shown, strict=True), "x", color="black", ms=5, label="published")


def draw_grid(grid: Grid, result: dict[str, Any], out: Path) -> None:
    """Write ``out``: each law of the grid by what it spends its doubling on, and how the best one scales on."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = Cost.of(grid.base.scaled()).macs
    spent = np.array([[np.log2(p.alpha), 2 * np.log2(p.beta), 2 * np.log2(p.gamma)] for p in grid.points])
    spent /= spent.sum(1, keepdims=True)
    # Of a triangle whose corners are the dimensions: two laws are near where they spend alike.
    x, y = spent[:, 1] + spent[:, 2] / 2, spent[:, 2]
    dots = left.scatter(x, y, c=[100 * p.accuracy for p in grid.points], cmap="viridis", s=90, edgecolor="white")
    first = grid.points.index(grid.ranked[0])
    left.scatter(x[first], y[first], s=220, facecolor="none", edgecolor=ORANGE, linewidth=2)
    best = grid.best
    left.plot([0, 1, 0.5, 0], [0, 0, 1, 0], color=GREY, lw=0.8, zorder=0)
    for name, place in (
        ("depth", (0, -0.07)),
        ("width", (1, -0.07)),
        ("resolution", (0.5, 1.07)),
    ):
        left.text(*place, f"{name} alone", ha="center", va="center", fontsize=9)
    left.set(xlim=(-0.15, 1.15), ylim=(-0.12, 1.12))
    left.set_axis_off()
    left.set_title(
        f"{len(grid.points)} laws at phi = 1 by what they spend the doubling on;\n"
        f"ringed: alpha {best.alpha:g}, beta {best.beta:g}, gamma {best.gamma:g}",
        fontsize=9,
        loc="left",
    )
    figure.colorbar(dots, ax=left, label="held-out digits right, %", shrink=0.8)
    nets = {row["label"]: row for row in result["scaled"]["nets"]}

    def at(label: str) -> tuple[float, float]:
        return nets[label]["macs"] / base, 100 * nets[label]["accuracy"]

    law = [at(label) for label in nets if label.startswith("phi")]
    right.plot(*zip(*law, strict=True), "o-", color=ORANGE, label="the ringed law, phi = 0, 1, 2")
    for (name, colour), label in zip(_ALONE.items(), ("d=4", "w=2", "r=2"), strict=True):
        right.plot(*at(label), "s", color=colour, label=f"{name} alone, {label}")
    right.set_xlabel("MACs, times the base's")
    right.set_ylabel("held-out digits right, %, seeds of their own")
    right.legend(fontsize=8, frameon=False, loc="upper left")
    right.margins(y=0.25)
    right.set_title("scaled on, beside one dimension alone", fontsize=9, loc="left")
    _save(figure, out)


def _gmacs(net: ScaledNet) -> float:
    return Cost.of(net.config).macs / 1e9


def _save(figure: Figure, out: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with whole(out) as aside:
        figure.savefig(aside, dpi=120, format="png")
