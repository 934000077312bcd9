"""Plots of one file of results: speed-ups as bars and every case under the roofline, of timings; memory over time, of a soak. Needs
matplotlib (the ``bench`` extra)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import findings
from benchmarks.findings import geomean, timed
from effnet_fast.benchmark.case import is_ours
from effnet_fast.benchmark.plot import OURS, PEERS

_MARKS = "os^Dv<>P"


def draw(results: Path) -> list[Path]:
    """Write ``NAME-speed.png`` beside ``NAME.json`` and, where what must be moved is known, ``NAME-roofline.png``."""
    bounded = any(case["bound_us"] is not None for case in json.loads(results.read_text())["cases"])
    return [_written(results, "speed", _speed), *([_written(results, "roofline", _roofline)] if bounded else [])]


def draw_memory(results: Path) -> Path:
    """Write ``NAME-memory.png`` beside ``NAME.json``, of a soak."""
    return _written(results, "memory", _memory)


def _written(results: Path, name: str, plot: Callable[[dict[str, Any]], Any]) -> Path:
    """The plot beside the file. It holds the file's digest, by which it is told from those of other results."""
    figure = plot(json.loads(results.read_text()))
    path = results.with_name(f"{results.stem}-{name}.png")
    figure.savefig(path, dpi=110, metadata={"Source": findings.digest(results)})
    plt.close(figure)
    return path


def _colours(told: dict[str, Any]) -> dict[str, str]:
    names = list(dict.fromkeys(name for case in told["cases"] for name in timed(case)))
    ours = [name for name in names if is_ours(name)]
    peers = [name for name in names if name not in ours]
    return {
        **{name: OURS[i % len(OURS)] for i, name in enumerate(ours)},
        **{name: PEERS[i % len(PEERS)] for i, name in enumerate(peers)},
    }


def _short(group: str) -> str:
    return group.replace("_", " ").replace(" bn act", "")


def _title(told: dict[str, Any]) -> str:
    where = told["machine"]
    return f"{findings.setting(told)}, torch {where['versions']['torch']}, {where['date']}"


def _speed(told: dict[str, Any]) -> Any:
    """Speed-up over the baseline by group and batch; whiskers from the worst case to the best."""
    colours, baseline = _colours(told), told["baseline"]
    groups: dict[str, dict[str, list[float]]] = {}
    for case in told["cases"]:
        entrants = timed(case)
        if baseline in entrants:
            batch = f"batch {case['batch']}" if told["suite"] == "model" else "one image" if case["batch"] == 1 else "large batch"
            label = f"{_short(case['group'])}\n{batch}"
            for name, entrant in entrants.items():
                speed = entrants[baseline]["median_us"] / entrant["median_us"]
                groups.setdefault(label, {}).setdefault(name, []).append(speed)
    figure, axes = plt.subplots(figsize=(max(7, 1.2 + 1.5 * len(groups)), 4.6), layout="constrained")
    colours.pop(baseline, None)  # the line at 1
    axes.set_yscale("log", base=2)
    width = 0.86 / max(1, len(colours))
    present = [[name for name in colours if name in speeds] for speeds in groups.values()]
    used: set[str] = set()
    for name, colour in colours.items():
        places: list[float] = []
        heights: list[float] = []
        errors: list[list[float]] = [[], []]
        for group, speeds in enumerate(groups.values()):
            if name in speeds:
                number, others = present[group].index(name), len(present[group]) - 1
                places.append(group + (number - others / 2) * width)
                heights.append(geomean(speeds[name]))
                errors[0].append(max(0.0, heights[-1] - min(speeds[name])))  # of one speed a last digit may be lost
                errors[1].append(max(0.0, max(speeds[name]) - heights[-1]))
        spread = {"yerr": errors, "error_kw": {"lw": 0.8, "capsize": 2}} if any(map(any, errors)) else {}
        style = {"color": colour, "edgecolor": "white", "lw": 0, "hatch": "////" if colour in used else None}
        used.add(colour)  # there are more entrants than colours that can be told apart
        axes.bar(places, [height - 1 for height in heights], width * 0.92, bottom=1, label=name, **style, **spread)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(f"speed-up over {baseline}")
    axes.set_title(_title(told), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    long = any(len(name) > 26 for name in colours)  # four columns of such would be wider than the picture
    figure.legend(loc="outside lower center", ncols=3 if long else 4, fontsize=8, frameon=False)
    return figure


def _roofline(told: dict[str, Any]) -> Any:
    """Arithmetic intensity against rate: each group a mark, each of ours and the baseline a colour."""
    shown = {name: colour for name, colour in _colours(told).items() if name.startswith("ours") or name == told["baseline"]}
    figure, axes = plt.subplots(figsize=(8, 5.4), layout="constrained")
    groups = list(dict.fromkeys(case["group"] for case in told["cases"]))
    intensities = []
    for case in told["cases"]:
        if not (case["flops"] and case["bytes"]):
            continue
        intensities.append(case["flops"] / case["bytes"])
        for name, entrant in timed(case).items():
            if name in shown:
                mark, filled = _MARKS[groups.index(case["group"]) % len(_MARKS)], case["batch"] > 1
                face = shown[name] if filled else "none"
                axes.plot(intensities[-1], entrant["gflop_s"], mark, ms=5, mec=shown[name], mfc=face, alpha=0.75)
    if intensities:
        low, high = min(intensities) / 1.5, max(intensities) * 1.5
        copy, dense = told["roofline"]["copy_bytes_s"] / 1e9, told["roofline"]["dense_flop_s"] / 1e9
        ridge = min(max(dense / copy, low), high)
        roof = [min(dense, copy * at) for at in (low, ridge, high)]
        label = f"copy {copy:.4g} GB/s,\ndense {dense:.4g} GFLOP/s"
        axes.plot([low, ridge, high], roof, color="black", lw=1.2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_title(_title(told), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    for name, colour in shown.items():
        axes.plot([], [], "s", color=colour, label=name)
    for number, group in enumerate(groups):
        axes.plot([], [], _MARKS[number % len(_MARKS)], color="grey", mfc="none", label=_short(group))
    axes.plot([], [], " ", label="filled: large batch, open: one image")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _memory(told: dict[str, Any]) -> Any:
    """Memory over time; before the line is the warm-up."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for (name, series), colour in zip(told["memory_bytes"].items(), OURS, strict=False):
        seconds = [told["interval_s"] * (number + 1) for number in range(len(series))]
        axes.plot(seconds, [value / 1e6 for value in series], color=colour, label=name)
    axes.axvline(told["warm_up_s"], color="black", lw=0.8, ls=":")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="s", ylabel="MB")
    axes.set_title(_title(told), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure
