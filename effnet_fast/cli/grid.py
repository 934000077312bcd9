"""The paper's grid search (arXiv 1905.11946, section 3.3) made small enough for a CPU: which alpha, beta, gamma with
alpha * beta^2 * gamma^2 ~ 2 make the best of a tiny EfficientNet on scikit-learn's scanned digits, each judged by real training.

The best law is then scaled on by phi, beside depth, width and resolution alone with their counted multiply-adds, trained with seeds
that the search has not seen: the best of many noisy scores is a flattered one. Scans have 8x8 pixels, so larger images only
interpolate: what is found holds for these digits and this short training. A search that was stopped goes on from its file.

example: effnet-fast grid --out grid.json --plot grid.png
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from effnet_fast.benchmark.machine import facts
from effnet_fast.cli.digits import GRID_BASE, digits_trial
from effnet_fast.cli.options import CORES, check_output, count, positive
from effnet_fast.cli.table import si, table
from effnet_fast.scaling import CompoundScaling, Cost, Grid, ScaledNet, grid_search
from effnet_fast.scaling.config import is_whole
from effnet_fast.scaling.grid import judged, write_json
from effnet_fast.training import Trial
from effnet_fast.training.pictures import HELD_OUT

_FRESH = 1000  # is where the seeds of the second part begin
_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("grid.json"), metavar="FILE", help="the result (default grid.json)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (matplotlib)")
    parser.add_argument("--processes", type=count, default=CORES, metavar="N", help=f"at a time, a thread each (default {CORES})")
    parser.add_argument("--step", type=positive, default=0.1, metavar="X", help="of the coefficients (default 0.1)")
    parser.add_argument("--tolerance", type=positive, default=0.1, metavar="X", help="of the product around 2 (default 0.1)")
    parser.add_argument("--epochs", type=count, default=4, metavar="N", help="of each training (default 4)")
    parser.add_argument("--seeds", type=count, default=2, metavar="N", help="trainings of each net (default 2)")


def run(arguments: argparse.Namespace) -> int:
    check_output("out", arguments.out, None)
    if arguments.plot:
        check_output("plot", arguments.plot, ".png")
        from effnet_fast.cli.scaling_plots import draw_grid
    trial = digits_trial(arguments.epochs, tuple(range(arguments.seeds)))
    grid = grid_search(
        trial,
        GRID_BASE,
        step=arguments.step,
        tolerance=arguments.tolerance,
        processes=arguments.processes,
        file=arguments.out,
        same={"data": "digits", "recipe": trial.recipe, "seeds": trial.seeds},
    )
    result = _scaled_on(grid, trial, arguments.processes, arguments.out)
    print(_told(grid, result))
    if arguments.plot:
        draw_grid(grid, result, arguments.plot)
    return 0


def _scaled_on(grid: Grid, trial: Trial, processes: int, out: Path) -> dict[str, Any]:
    """What ``out`` has once the best law is scaled on and trained there, each net stored as it comes."""
    result, nets = json.loads(out.read_text()), _scaled(grid.best)
    seeds = [_FRESH + seed for seed in trial.seeds]
    rows = _stored(out, result, nets, seeds) if "scaled" in result else {}
    before, started = result["seconds"], time.perf_counter()
    todo = {label: net for label, net in nets.items() if label not in rows}
    for label, (accuracy, _) in judged(replace(trial, seeds=tuple(seeds)), todo, processes, len(rows)):
        rows[label] = _row(label, nets[label], accuracy)
        result |= {
            "best": {name: getattr(grid.best, name) for name in ("alpha", "beta", "gamma")},
            "scaled": {"seeds": seeds, "nets": [rows[label] for label in nets if label in rows]},
            "held_out": HELD_OUT,
            "processes": processes,
            "machine": facts(),
            "seconds": before + time.perf_counter() - started,
        }
        write_json(out, result)
    return result


def _stored(out: Path, result: dict[str, Any], nets: dict[str, ScaledNet], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """The rows of ``nets`` that the file has. Raises ValueError where they are not as this command writes them."""
    scaled = result["scaled"]
    try:
        rows = {row["label"]: _row(row["label"], nets[row["label"]], float(row["accuracy"])) for row in scaled["nets"]}
        good = list(rows.values()) == scaled["nets"] and scaled["seeds"] == seeds and is_whole(result["processes"])
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"{out} is damaged: scaled is {scaled!r:.80}, processes {result.get('processes')!r:.20}; "
            "the file without scaled, which is then done again, or another file, would do"
        )
    return rows


def _scaled(law: CompoundScaling) -> dict[str, ScaledNet]:
    """The law at phi 0, 1 and 2, and what the rules say has the MACs of phi = 2."""
    nets = {f"phi={phi}": law.at(phi) for phi in (0, 1, 2)}
    alone = {"d=4": law.scaled(depth=4), "w=2": law.scaled(width=2), "r=2": law.scaled(resolution=2)}
    return {**nets, **alone}


def _row(label: str, net: ScaledNet, accuracy: float) -> dict[str, Any]:
    cost = Cost.of(net.config)
    return {"label": label, "macs": cost.macs, "parameters": cost.parameters, "accuracy": accuracy}


def _told(grid: Grid, result: dict[str, Any]) -> str:
    base = Cost.of(grid.base.scaled())
    rows = [
        (
            f"{point.alpha:g}",
            f"{point.beta:g}",
            f"{point.gamma:g}",
            f"{point.alpha * point.beta**2 * point.gamma**2:.3f}",
            f"{point.macs / base.macs:.2f}",
            point.parameters,
            f"{100 * point.accuracy:.2f} %",
        )
        for point in grid.ranked[:_SHOWN]
    ]
    scaled = [
        (row["label"], si(row["macs"]), row["parameters"], f"{100 * row['accuracy']:.2f} %") for row in result["scaled"]["nets"]
    ]
    best, seeds = grid.best, len(result["scaled"]["seeds"])
    return "\n".join(
        (
            f"the best {len(rows)} of {len(grid.points)} laws at phi = 1, {grid.base.name}, {seeds} trainings each\n",
            table(("alpha", "beta", "gamma", "product", "MACs, times the base's", "parameters", "held out"), rows, "rrrrrrr"),
            f"\nalpha {best.alpha:g}, beta {best.beta:g}, gamma {best.gamma:g} scaled on, beside each dimension alone\n",
            table(("net", "MACs", "parameters", "held out"), scaled, "lrrr"),
            f"\n{result['seconds']:.0f} s in {result['processes']} processes, all runs of a resumed search together",
        )
    )
