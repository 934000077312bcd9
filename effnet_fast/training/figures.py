"""The figures of the laboratory (matplotlib): how the runs of an experiment went and how far, beside published values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effnet_fast.colours import AMBER, BLUE, GREEN, ORANGE, PINK, SKY
from effnet_fast.weights.files import whole

_COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
_DASHES, _MARKERS, _GREY = ("-", "--", ":"), ("o", "s"), "#666666"


def draw_experiment(result: dict[str, Any], axis: str, logarithmic: bool, path: Path) -> None:
    """Held-out accuracy over ``axis`` (where there is one) and over the epochs, and the training loss, as PNG; replaced whole.

    result  as :func:`effnet_fast.training.laboratory.perform` returns it
    axis    "parameters (M)", or what the rows' values are; "" for none
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = 3 if axis else 2
    figure = Figure(figsize=(4.4 * panels, 4.8), layout="constrained")
    *first, accuracy, loss = figure.subplots(1, panels, squeeze=False)[0]
    alone = len(result["rows"]) == 1
    for row, style in zip(result["rows"], _styles(result["rows"]), strict=True):
        epochs = [entry["epoch"] for entry in row["history"]]
        style |= {"marker": "." if len(epochs) < 30 else None, "label": row["label"], "linewidth": 1.3}
        accuracy.plot(epochs, [100 * entry["top1"] for entry in row["history"]], **style)
        loss.plot(epochs, [entry["train_loss"] for entry in row["history"]], **style | ({"label": "training"} if alone else {}))
    if alone:
        (row,) = result["rows"]
        epochs, losses = ([entry[name] for entry in row["history"]] for name in ("epoch", "loss"))
        loss.plot(epochs, losses, color=_COLOURS[1], marker=".", linewidth=1.3, label="held out")
    if not axis:
        _published_lines(accuracy, result["published"])
    loss.set_yscale("log")
    _plain_logarithmic(loss.yaxis)
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(accuracy, "held-out images right (%)", "epoch")
    _dress(loss, "cross entropy" if alone else "cross entropy of the training images", "epoch")
    for axes in first:
        (_over_size if axis.startswith("parameters") else _over_value)(axes, result)
        if logarithmic:
            axes.set_xscale("log")
            _plain_logarithmic(axes.xaxis)
        lost = [row["label"] for row in result["rows"] if row["top1"] is None]
        told = f"{axis} (no finite loss: {', '.join(lost)})" if lost else axis
        _dress(axes, "held-out images right after the last epoch (%)", told)
    size = result["size"]
    scaled = ", ".join(f"{name} x{size[name]:g}" for name in ("depth", "width") if size[name] != 1)
    nets = f"nets of {scaled}, " if scaled else ""
    told = f"{result['data']}; {nets}{size['resolution']} pixels, {result['recipe']['epochs']} epochs"
    figure.suptitle(f"{result['title']}\n{told}", fontsize=9)
    with whole(path) as aside:
        figure.savefig(aside, dpi=120, format="png")


def _over_value(axes: Any, result: dict[str, Any]) -> None:
    """A line for each series, and the published values across."""
    for number, series in enumerate(dict.fromkeys(row["series"] for row in result["rows"])):
        rows = [row for row in result["rows"] if row["series"] == series and row["top1"] is not None]
        style = {"color": _COLOURS[number], "marker": _MARKERS[number], "label": series or "measured here"}
        axes.plot([row["value"] for row in rows], [row["top1"] for row in rows], **style)
        if series:  # of few values, each a net
            axes.set_xticks([row["value"] for row in rows])
    _published_lines(axes, result["published"])


def _over_size(axes: Any, result: dict[str, Any]) -> None:
    """Each net at its parameters, in millions, marked by the number in its name; published values of each data set alike."""
    measured = [(row["label"], row["parameters"] / 1e6, row["top1"]) for row in result["rows"] if row["top1"] is not None]
    lines: list[tuple[str, list[Any], dict[str, Any]]] = [("measured here", measured, {"color": _COLOURS[0], "marker": "o"})]
    for data, marker in zip(dict.fromkeys(value["data"] for value in result["published"]), "Dv", strict=False):
        values = [value for value in result["published"] if value["data"] == data]
        points = [(value["net"], value["parameters"], value["top1"]) for value in values]
        style = {"color": _GREY, "linestyle": "--", "linewidth": 1, "marker": marker, "markersize": 5}
        lines.append((f"published on {data}\n({values[0]['source']})", points, style))
    axes.margins(x=0.12)
    for label, points, style in lines:
        axes.plot([x for _, x, _ in points], [y for _, _, y in points], label=label, **style)
        for (name, x, y), (_, _, before) in zip(points, points[:1] + points, strict=False):
            number, place = "".join(filter(str.isdigit, name)), (-4, 4 if y >= before else -9)  # left of the line that comes to it
            axes.annotate(number, (x, y), textcoords="offset points", xytext=place, ha="right", fontsize=7, color=style["color"])


def _published_lines(axes: Any, published: list[dict[str, Any]]) -> None:
    for value in published:
        told = f"published, {value['net']} on {value['data']}: {value['top1']:g}\n({value['source']})"
        axes.axhline(value["top1"], color=_GREY, linestyle="--", linewidth=1, label=told)


def _styles(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each run: from dark to light along a sweep, else a colour for each run, or for each series and dashes within."""
    from matplotlib import colormaps

    series = list(dict.fromkeys(row["series"] for row in rows))
    if len(series) > 1 or series != [""]:
        groups = [[row["label"] for row in rows if row["series"] == name] for name in series]
        places = [(series.index(row["series"]), groups[series.index(row["series"])].index(row["label"])) for row in rows]
        return [{"color": _COLOURS[group], "linestyle": _DASHES[at % len(_DASHES)]} for group, at in places]
    if all(row["value"] is not None for row in rows):
        return [{"color": colormaps["viridis"](0.9 * number / max(1, len(rows) - 1))} for number in range(len(rows))]
    return [{"color": _COLOURS[number % len(_COLOURS)]} for number in range(len(rows))]


def _plain_logarithmic(axis: Any) -> None:
    """Ticks at 1, 2 and 5 as plain numbers, or at 1 where they are many."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _dress(axes: Any, title: str, axis: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(axis, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    labels = axes.get_legend_handles_labels()[1]
    columns = 1 if max(map(len, labels), default=0) > 30 else 2
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.03, -0.13), ncols=columns)
