"""The log of a run as CSV, and its curves as a picture (matplotlib)."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from effnet_fast.colours import BLUE, ORANGE
from effnet_fast.training.checkpoint import History
from effnet_fast.weights.files import whole

_NAMES = {"train_loss": "training loss", "loss": "held-out loss", "top1": "top-1", "top5": "top-5", "lr": "highest of a step"}


def write_csv(history: History, path: Path) -> None:
    """A line for each epoch, under the names of all figures; one that it has not is left out. The file is replaced whole."""
    names = list(dict.fromkeys(name for row in history for name in row))
    with whole(path) as aside, open(aside, "w", newline="") as file:
        lines = csv.DictWriter(file, names)
        lines.writeheader()
        lines.writerows(history)


def draw_curves(history: History, path: Path) -> None:
    """Losses, accuracies and the learning rate over the epochs, as PNG, with gaps where one is not; the file is replaced whole."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    panels = [("loss", ("train_loss", "loss")), ("share of images right", ("top1", "top5")), ("learning rate", ("lr",))]
    panels = [(title, tuple(name for name in names if any(name in row for row in history))) for title, names in panels]
    panels = [(title, names) for title, names in panels if names]
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        curves = {name: [row.get(name, math.nan) for row in history] for name in names}
        for (name, values), colour in zip(curves.items(), (BLUE, ORANGE), strict=False):
            axes.plot(epochs, values, color=colour, label=_NAMES[name], marker="." if len(epochs) < 30 else None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title == "loss" and not any(value <= 0 for values in curves.values() for value in values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("epoch", fontsize=8)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    with whole(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
