"""The figures of the page on scaling (matplotlib): counted cost, the paper's accuracies and times measured here. Where a curve is a
fit, its label says so; the paper's own figure 3 is a plot without numbers, so nothing here is read off it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from effnet_fast.colours import BLUE, GREEN, GREY, ORANGE, PINK
from effnet_fast.scaling import B0, CompoundScaling, Cost, NetConfig, ScaledNet, StageConfig, published_fit, thresholds
from effnet_fast.scaling.growth import Growth
from effnet_fast.scaling.published import B0_SCALED, FAMILY, RIVALS, SCALED_UP, PublishedNet
from effnet_fast.scaling.rules import convention
from effnet_fast.weights.files import whole

ALONE = {"depth": BLUE, "width": GREEN, "resolution": PINK}
BASES = {"B0": ORANGE, "MobileNetV1": BLUE, "MobileNetV2": GREEN, "ResNet-50": PINK}
EXPANSION = 6  # of EfficientNet's blocks
KERNELS = (3, 5, 7)
CHANNELS = tuple(8 * 2 ** (step / 2) for step in range(15))
LAW = CompoundScaling()
MOST_PHI = 7
Told = tuple[str, float, float, str]  # name, x, y, colour
Box = tuple[float, float, float, float]
_AROUND = ((6, 0), (-6, 0), (0, 8), (0, -8), (5, 6), (-5, 6), (5, -6), (-5, -6))
_PLACES = tuple((far * dx, far * dy) for far in (1, 2, 3) for dx, dy in _AROUND)
MOST = {"depth": 6.0, "width": 2.6, "resolution": 2.6}  # of the fit's curves: about six times B0's multiply-adds


def draw_growth(families: dict[str, Sequence[Growth]], path: Path) -> None:
    """How each base net's multiply-adds grow with twice a dimension, and with the law's step; lines are what the rules say."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(families))
    marks = ((0, BLUE, "o", -0.24), (1, GREEN, "s", -0.08), (2, PINK, "^", 0.08), (-1, ORANGE, "D", 0.24))
    for number, colour, mark, aside in marks:
        grown = [rows[number] for rows in families.values()]
        axes.plot([row.macs for row in grown], places + aside, mark, color=colour, ms=5, label=grown[0].label)
    for rule in {row.macs_rule for rows in families.values() for row in (*rows[:3], rows[-1])}:
        axes.axvline(rule, color="black", lw=0.8, ls=":", zorder=0)
    axes.set_yticks(places, list(families), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(1, None)
    axes.set_xlabel("multiply-adds, times the base's; dotted: what the rules say")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=4)
    _save(figure, path)


def draw_phi(path: Path) -> None:
    """Multiply-adds over phi beside 2^phi and the law's own product, and the layers of each stage."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = Cost.of(LAW.at(0).config).macs
    phis = np.linspace(0, MOST_PHI, 281)
    left.plot(phis, [Cost.of(LAW.at(phi).config).macs / base for phi in phis], color=ORANGE, label="counted")
    left.plot(phis, 2**phis, color="black", lw=1, ls=":", label="2^phi")
    product = LAW.constraint.value
    left.plot(phis, product**phis, color=GREY, lw=1, ls="--", label=f"(alpha beta^2 gamma^2)^phi, {product:.3f}^phi")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    left.set_xlabel("phi")
    left.set_ylabel("multiply-adds, times B0's")
    left.legend(fontsize=8, frameon=False)
    changes = thresholds(LAW, MOST_PHI)
    alike: dict[int, list[int]] = {}
    for number, stage in enumerate(B0.stages):
        alike.setdefault(stage.layers, []).append(number)
    for (layers, stages), colour in zip(sorted(alike.items()), (ORANGE, BLUE, GREEN, PINK), strict=True):
        steps = [change for change in changes if change.part == f"blocks.{stages[0]}" and change.quantity == "layers"]
        heights = [layers, *(change.after for change in steps)]
        told = ", ".join(f"F{number + 1}" for number in stages)
        right.step(
            [0.0, *(change.phi for change in steps), MOST_PHI], [*heights, heights[-1]], where="post", color=colour, label=told
        )
    right.set_xlabel("phi")
    right.set_ylabel("layers of a stage")
    right.legend(fontsize=8, frameon=False)
    _save(figure, path)


def draw_dimensions(path: Path) -> None:
    """What one dimension alone brings, of each base of the paper's tables, beside all three at once."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    fit, base_macs = published_fit(), _macs(LAW.at(0))
    for axes, dimension in zip(panels, ALONE, strict=True):
        for base, colour in BASES.items():
            first, *forms = _forms(base)
            for form in forms:
                scaled = [name for name in ALONE if getattr(form, name) != 1]
                x, y = convention(form).macs / convention(first).macs, form.top1 - first.top1
                if scaled == [dimension]:
                    axes.plot(x, y, "o", color=colour)
                elif len(scaled) == len(ALONE):
                    axes.plot(x, y, "*", color=colour, mfc="none", mew=1.3, ms=12)
        nets = [LAW.scaled(**{dimension: float(step)}) for step in np.geomspace(1, MOST[dimension], 40)]
        gains = [fit(net) - B0_SCALED[0].top1 for net in nets]
        axes.plot([_macs(net) / base_macs for net in nets], gains, color=BASES["B0"], lw=1.2, ls="--")
        axes.set_title(f"{dimension} alone, beside all three", fontsize=10, loc="left")
        _logarithmic(axes, 2)
        axes.set_xlabel("multiply-adds, times the base's (counted)")
    panels[0].set_ylabel("top-1 gained on ImageNet, points (published)")
    for base, colour in BASES.items():
        panels[0].plot([], [], "s", color=colour, label=base)
    for style, told in (("o", "one dimension alone"), ("*", "all three"), ("--", "B0 by the fit, which saturates by assumption")):
        panels[0].plot([], [], style, color="black", mfc="none" if style == "*" else None, lw=1, label=told)
    figure.legend(loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    _save(figure, path)


def draw_methods(milliseconds: dict[str, float], path: Path) -> None:
    """B0 by four methods: published accuracy over counted multiply-adds, and what else each method costs."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    fit, (first, *forms) = published_fit(), B0_SCALED
    for method, colour in {**ALONE, "compound": GREY}.items():
        steps = np.linspace(0, 5, 60)
        nets = [LAW.at(float(step)) if method == "compound" else LAW.scaled(**{method: 1 + float(step)}) for step in steps]
        within = [net for net in nets if _macs(net) <= 2.2e9]
        left.plot([_macs(net) / 1e9 for net in within], [fit(net) for net in within], color=colour, lw=1, ls="--")
    colours = (*ALONE.values(), ORANGE)
    names = {form.name: form.name.partition(" ")[2] for form in forms}
    law = f"the law, d={LAW.alpha:g}^phi w={LAW.beta:g}^phi r={LAW.gamma:g}^phi,\nby the fit"
    for form, colour in zip(forms, colours, strict=True):
        left.plot(convention(form).macs / 1e9, form.top1, "o", color=colour, ms=8, label=names[form.name])
    left.plot(convention(first).macs / 1e9, first.top1, "s", color="black", ms=7, label=first.name)
    left.plot([], [], color="black", lw=1, ls="--", label="one dimension alone, by the fit")
    left.plot([], [], color=GREY, lw=1, ls="--", label=law)
    left.set_xlabel("GMACs per image (counted)")
    left.set_ylabel("top-1 on ImageNet, % (published)")
    left.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    costs: dict[str, Callable[[PublishedNet], float]] = {
        "multiply-adds": lambda net: convention(net).macs,
        "parameters": lambda net: convention(net).parameters,
        "activations": lambda net: convention(net).activations,
        "kept to train": lambda net: convention(net).saved_elements(),
    }
    if all(form.name in milliseconds for form in B0_SCALED):
        costs["time here"] = lambda net: milliseconds[net.name]
    places = np.arange(len(costs))
    for number, (form, colour) in enumerate(zip(forms, colours, strict=True)):
        heights = [cost(form) / cost(first) for cost in costs.values()]
        bars = right.bar(places + 0.2 * (number - 1.5), heights, 0.18, color=colour, label=names[form.name])
        right.bar_label(bars, fmt="%.2g", fontsize=6.5, padding=1)
    right.axhline(1, color="black", lw=0.8)
    right.set_xticks(places, list(costs), fontsize=8)
    right.set_ylabel(f"times {first.name}'s")
    right.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.08), ncols=4)
    _save(figure, path)


def draw_accuracy(milliseconds: dict[str, float], path: Path) -> None:
    """Published accuracy over parameters and multiply-adds, counted or of the nets of others as printed, and over the time here.
    Accuracies of B0 to B7 are those often quoted, all others are those of v5."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    efficientnet = "EfficientNet, top-1 as often quoted"
    groups = {efficientnet: (FAMILY, ORANGE), **{base: (_forms(base), colour) for base, colour in list(BASES.items())[1:]}}
    quantities: tuple[tuple[str, Callable[[PublishedNet], float | None]], ...] = (
        ("parameters, M", lambda net: convention(net).parameters / 1e6),
        ("GMACs per image", lambda net: convention(net).macs / 1e9),
        ("ms per image, measured here", lambda net: milliseconds.get(net.name)),
    )
    for axes, (quantity, value) in zip(panels, quantities, strict=True):
        told: list[Told] = []
        for label, (nets, colour) in groups.items():
            points = [(x, net.top1, net.name) for net in nets if (x := value(net)) is not None]
            line = "o-" if label == efficientnet else "s"
            axes.plot(
                [x for x, _, _ in points],
                [y for _, y, _ in points],
                line,
                color=colour,
                ms=5,
                lw=1.2,
                label=label,
            )
            told += [(_short(name), x, y, colour) for x, y, name in points]
        for rival in RIVALS:
            printed = {"parameters, M": rival.parameters, "GMACs per image": rival.flops}.get(quantity)
            if printed is not None and rival.name not in BASES:
                x = printed.value / (1e6 if quantity.startswith("parameters") else 1e9)
                axes.plot(x, rival.top1, "x", color=GREY, ms=5)
                told.append((rival.name, x, rival.top1, GREY))
        axes.plot([], [], "x", color=GREY, label="nets of others, as table 2 of v5 prints them")
        _logarithmic(axes, 10)
        axes.set_xlabel(quantity)
        axes.margins(x=0.16)
        _labelled(figure, axes, told, sum(net.name in milliseconds for net in FAMILY) if axes is panels[-1] else len(FAMILY))
    panels[0].set_ylabel("top-1 on ImageNet, % (published)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    _save(figure, path)


def draw_saving(path: Path) -> None:
    """The share of a dense block's multiply-adds that a depthwise one saves, counted of one block at each width and kernel."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, (title, saved) in zip(figure.subplots(1, 3), SAVINGS.items(), strict=True):
        for kernel, colour in zip(KERNELS, (BLUE, ORANGE, GREEN), strict=True):
            axes.plot(CHANNELS, [100 * saved(round(count), kernel) for count in CHANNELS], color=colour, label=f"{kernel}x{kernel}")
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(title, fontsize=9, loc="left")
        _logarithmic(axes, 2)
        axes.set_xlabel("channels")
        axes.set_ylabel("multiply-adds saved, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _save(figure, path)


def _saved(thrifty: tuple[str, int], dense: tuple[str, int]) -> Callable[[int, int], float]:
    """Of blocks named by (operator, expansion) the share that the first saves; a fused MBConv that does not expand is one dense
    convolution."""

    def macs(block: tuple[str, int], channels: int, kernel: int) -> int:
        operator, expansion = block
        stage = StageConfig(operator, kernel, 1, expansion, channels, 1)
        return Cost.of(NetConfig("block", (stage,), channels, channels, 32)).by("stage")["blocks.0"].macs

    return lambda channels, kernel: 1 - macs(thrifty, channels, kernel) / macs(dense, channels, kernel)


SAVINGS = {
    "depthwise separable, against one dense\nconvolution": _saved(("separable", 1), ("fused_mbconv", 1)),
    f"inverted residual (expansion {EXPANSION}), against itself\nwith a dense expanding convolution": _saved(
        ("mbconv", EXPANSION), ("fused_mbconv", EXPANSION)
    ),
    f"inverted residual (expansion {EXPANSION}), against one\ndense convolution that does not expand": _saved(
        ("mbconv", EXPANSION), ("fused_mbconv", 1)
    ),
}


def _forms(base: str) -> tuple[PublishedNet, ...]:
    """A base of the paper's tables 3 and 7 and its scaled forms."""
    return tuple(net for net in (*B0_SCALED, *SCALED_UP) if net.name.partition(" ")[0] == base)


def _short(name: str) -> str:
    first, _, how = name.partition(" ")
    return "compound" if how.count("=") > 1 else how or first


def _macs(net: ScaledNet) -> int:
    return Cost.of(net.config).macs


def _labelled(figure: Figure, axes: Axes, told: Sequence[Told], line: int) -> None:
    """Each name beside its point, where it meets no point, no name before it and not the line through the first ``line`` points,
    if there is such a place."""
    figure.draw_without_rendering()
    points = axes.transData.transform([(x, y) for _, x, y, _ in told])
    between = [
        a + (b - a) * share for a, b in zip(points[: line - 1], points[1:line], strict=True) for share in np.linspace(0, 1, 12)
    ]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in (*points, *between)]
    scale = figure.dpi / 72
    for (name, x, y, colour), at in zip(told, points, strict=True):
        size = 3.6 * len(name) * scale, 8 * scale
        best = min(_PLACES, key=lambda place: _met(_box(at, place, size, scale), taken))
        taken.append(_box(at, best, size, scale))
        side = "right" if best[0] < 0 else "left" if best[0] else "center"
        axes.annotate(name, (x, y), best, textcoords="offset points", fontsize=6.5, color=colour, ha=side, va="center")


def _box(at: Sequence[float], place: tuple[int, int], size: tuple[float, float], scale: float) -> Box:
    """(left, bottom, right, top) in pixels of a name at an offset in points."""
    (dx, dy), (wide, high) = place, size
    left = at[0] + dx * scale - (wide if dx < 0 else 0 if dx else wide / 2)
    low = at[1] + dy * scale - high / 2
    return left, low, left + wide, low + high


def _met(one: Box, taken: Iterable[Box]) -> int:
    return sum(one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3] for other in taken)


def _logarithmic(axes: Axes, base: int) -> None:
    axes.set_xscale("log", base=base)
    if base == 10:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter("{x:g}")


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.tick_params(labelsize=8)
    with whole(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
