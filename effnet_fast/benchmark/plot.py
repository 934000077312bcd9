"""The picture of a comparison. Needs matplotlib (the ``bench`` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from effnet_fast.benchmark.case import is_ours
from effnet_fast.benchmark.compare import described, fastest_first, in_order
from effnet_fast.colours import AMBER, BLACK, BLUE, GREEN, ORANGE, PINK, SKY, YELLOW
from effnet_fast.weights.files import whole

# Ours are warm.
OURS = (ORANGE, AMBER, PINK, YELLOW)
PEERS = (BLUE, SKY, GREEN, BLACK, "#999999", "#666699")


def draw(results: dict[str, Any], out: Path) -> None:
    """Write ``out``: a panel for each case, with a bar for each entrant's images a second, its quartiles, and the bound."""
    panels = [(case, fastest_first(case)) for case in in_order(results)]
    heights = [1 + 0.34 * len(rows) for _, rows in panels]
    grid = {"height_ratios": heights}
    figure, axes = plt.subplots(len(panels), figsize=(8, 1 + sum(heights)), layout="constrained", squeeze=False, gridspec_kw=grid)
    for (case, rows), panel in zip(panels, axes[:, 0], strict=True):
        _panel(panel, case, rows)
    figure.suptitle(described(results), fontsize=10)
    with whole(out) as aside:
        figure.savefig(aside, dpi=120, format="png")
    plt.close(figure)


def _panel(axes: Any, case: dict[str, Any], rows: list[tuple[str, dict[str, Any]]]) -> None:
    for place, (name, entrant) in enumerate(rows):
        speed = entrant["images_s"]
        slow, fast = (case["batch"] * 1e6 / entrant["quartiles_us"][end] for end in (1, 0))
        spread = [[max(0.0, speed - slow)], [max(0.0, fast - speed)]]
        face = OURS[0] if is_ours(name) else PEERS[0]
        axes.barh(place, speed, color=face, xerr=spread, error_kw={"lw": 0.8, "capsize": 2})
        axes.text(max(speed, fast), place, f"  {entrant['median_us'] / 1e3:.4g} ms", va="center", fontsize=8)
    limit = case["batch"] * 1e6 / case["bound_us"]
    axes.axvline(limit, color="black", lw=0.8, ls=":")
    axes.text(limit, -0.6, "bound ", ha="right", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.9)
    axes.margins(x=0.15)
    axes.set_xlabel("images/s", fontsize=8)
    axes.set_title(f"batch {case['batch']}, {case['dtype']}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
