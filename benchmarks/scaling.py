"""The page that teaches the scaling law by running it: writes scaling.md, its figures, and the times it took as scaling.json.

python -m benchmarks.scaling            times every net of the paper's tables that is built here, and writes all: minutes
python -m benchmarks.scaling --kept     takes the times that scaling.json has
python -m benchmarks.scaling --quick --out DIR   times B0 alone, for a moment

The grid search and the laboratory are read from benchmarks/results, where `effnet-fast grid` and `effnet-fast lab` have put them.
Time a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.report import RESULTS
from benchmarks.scaling_page import LAW, growths, milliseconds_of, of_grid, of_times, page
from effnet_fast.benchmark.latency import Latency
from effnet_fast.benchmark.machine import facts
from effnet_fast.benchmark.results import write
from effnet_fast.scaling import CompoundScaling, search
from effnet_fast.scaling.published import B0_SCALED, FAMILY, SCALED_UP
from effnet_fast.training.laboratory import EXPERIMENTS
from effnet_fast.weights.files import whole

NAME = "scaling"
GRID = RESULTS / "grid-digits.json"
NETS = (*FAMILY, *B0_SCALED[1:], *SCALED_UP)
SECONDS, TURNS = 0.5, 2  # of calls of each net in a turn; all have their first turn before any has its second
ALLOWED = 2  # times what B0 takes is the time that the search is given


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the files go (default: benchmarks/results)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--kept", action="store_true", help="measure nothing: the times are those in DIR/scaling.json")
    how.add_argument("--quick", action="store_true", help="time B0 alone, for a moment")
    options = parser.parse_args(arguments)
    path = options.out / f"{NAME}.json"
    if options.kept and not path.exists():
        parser.error(f"--kept: {path} does not exist; without --kept it is made")
    try:
        measured = read(path, of_times) if options.kept else {}
        grid = read(GRID, of_grid)
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not options.kept:
        told = ["--quick"] * options.quick
        measured = {"command": shlex.join(["python", "-m", "benchmarks.scaling", *told]), **measure(options.quick)}
        write(measured, path)
    for name, draw in tqdm(figures(measured).items(), "figures", disable=None):
        draw(options.out / f"{NAME}-{name}.png")
    with whole(options.out / f"{NAME}.md") as aside:
        aside.write_text(text(measured, grid, options.out))
    print(f"{options.out / NAME}.md, .json and {len(figures(measured))} figures")
    return 0


def read(path: Path, told: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """What an earlier call wrote. Raises ValueError where ``told``, which tells it, cannot."""
    try:
        held = json.loads(path.read_text())
        told(held)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); its own command makes it anew") from error
    return held


def measure(quick: bool = False) -> dict[str, Any]:
    """What is timed: the published nets, one image each, and the search for the largest net within a time."""
    nets = NETS[:1] if quick else NETS
    latency = Latency(seconds=0.01 if quick else SECONDS)
    turns: dict[str, list[float]] = {net.name: [] for net in nets}
    for net in tqdm(nets * TURNS, "times", unit="net", disable=None):
        turns[net.name].append(latency(CompoundScaling(base=net.base).scaled(net.depth, net.width, net.resolution)))
    rows = [{"net": name, "turns_ms": taken} for name, taken in turns.items()]
    found = None
    if not quick:
        best = search(LAW, milliseconds=ALLOWED * min(turns[NETS[0].name]), latency=latency)[0]
        (limit,) = best.limits
        found = {"most": limit.most, "used": limit.used, "phi": best.net.phi, "binding": best.binding}
    settings = {"batch": latency.batch, "dtype": latency.dtype, "device": latency.device, "seconds_each": latency.seconds}
    return {"machine": facts(), **settings, "latencies": rows, "search": found}


def figures(measured: dict[str, Any]) -> dict[str, Callable[[Path], None]]:
    """By name, what draws each."""
    from benchmarks import scaling_figures as draw

    milliseconds = milliseconds_of(measured)
    return {
        "growth": lambda path: draw.draw_growth(growths(), path),
        "phi": draw.draw_phi,
        "accuracy": lambda path: draw.draw_accuracy(milliseconds, path),
        "methods": lambda path: draw.draw_methods(milliseconds, path),
        "dimensions": draw.draw_dimensions,
        "saving": draw.draw_saving,
    }


def text(measured: dict[str, Any], grid: dict[str, Any], out: Path) -> str:
    """The page for the folder ``out``."""
    labs = [json.loads(path.read_text()) for name in EXPERIMENTS if (path := RESULTS / "lab" / f"{name}.json").exists()]
    return page(measured, grid, labs, RESULTS, out)


if __name__ == "__main__":
    sys.exit(main())
