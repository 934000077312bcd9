"""Writes the README's tables between their markers: the family from the cost model, figures from benchmarks/results/*.json.

python -m benchmarks.report             rewrites README.md
python -m benchmarks.report --plots     also draws benchmarks/results/*.png (matplotlib)
python -m benchmarks.report --check     exits 1 if README.md is not what this would write
python -m benchmarks.report FILE...     prints the tables of results as text
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ceilings, run
from effnet_fast.models import FAMILY
from effnet_fast.scaling.cost import Cost
from effnet_fast.weights import SOURCES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
TIMINGS = tuple(f"{suite}-{device}" for device in ("cuda", "cpu") for suite in ("model", "train", "kernels"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [header, ["---" if column == 0 else "---:" for column in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def default_weights(name: str) -> str:
    return f"`{next(iter(SOURCES[name]))}`" if name in SOURCES else "none: `tf_` form"


def family() -> str:
    """Every network once; its ``tf_`` form differs in padding and eps alone."""
    rows = []
    for name, config in FAMILY.items():
        if name.startswith("tf_"):
            continue
        cost = Cost.of(config)
        rows.append(
            [
                f"`{name}`",
                str(config.resolution),
                str(sum(stage.layers for stage in config.stages)),
                f"{cost.parameters:,}",
                f"{cost.macs / 1e9:.4g}",
                f"{cost.activations / 1e6:.3g}",
                f"{config.dropout:g}",
                default_weights(name),
            ]
        )
    return table(["name", "resolution", "blocks", "parameters", "GMACs", "activations (M)", "dropout", "default weights"], rows)


def parity() -> str:
    results = json.loads((RESULTS / "parity.json").read_text())
    rows = [
        [
            f"{case['peer']} `{case['name']}`",
            "x".join(map(str, case["size"])),
            f"{case['largest_logit']:.2g}",
            f"{case['ours_from_peer']:.1e}",
            f"{case['ours_from_float64']:.1e}",
            f"{case['peer_from_float64']:.1e}",
        ]
        for case in results["cases"]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in results["machine"]["versions"].items() if number)
    caption = f"{results['images']} images, {results['dtype']}, CPU ({results['machine']['simd']}); {versions}."
    header = ["same weights as", "image", "largest logit", "ours - theirs", "ours - fp64", "theirs - fp64"]
    return f"{table(header, rows)}\n\n{caption}"


def speed() -> str:
    """A table for each committed file of timings, with its plots."""
    parts = []
    for name in TIMINGS:
        if not (RESULTS / f"{name}.json").exists():
            continue
        results = json.loads((RESULTS / f"{name}.json").read_text())
        where = results["machine"]
        device = where["gpu"]["name"] if results["device"] == "cuda" else f"{where['cpu']}, {where['threads']} threads"
        versions = ", ".join(f"{tool} {number}" for tool, number in where["versions"].items() if number)
        caption = f"{results['suite']}, {results['dtype']}, {device}; {versions}; commit {where['commit']}, {where['date']}."
        told = f"Speed-ups are over {results['baseline']}; columns with several cases are geometric means, beside the worst case."
        plots = sorted(RESULTS.glob(f"{name}-*.png"))
        images = "\n".join(f"![{path.stem}]({path.relative_to(ROOT)})" for path in plots)
        parts.append("\n\n".join(filter(None, (table(run.HEADER, run.figures(results)), f"{caption} {told}", images))))
    return "\n\n".join(parts) or "No timing is committed yet."


SECTIONS = {"family": family, "parity": parity, "speed": speed}


def render(text: str) -> str:
    """``text`` with every ``<!-- NAME -->`` ... ``<!-- end NAME -->`` filled."""
    for name, section in SECTIONS.items():
        first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise SystemExit(f"report: README.md wants one section from {first.strip()} to {last}")
        before, rest = text.split(first)
        text = f"{before}{first}{section()}\n{last}{rest.split(last)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plots", action="store_true")
    options = parser.parse_args()
    for path in options.files:
        results = json.loads(path.read_text())
        print(f"\n== {path.stem}")
        print((ceilings if results["suite"] == "ceilings" else run).summary(results))
    if options.files:
        return 0
    if options.plots:
        from benchmarks import plots

        for name in TIMINGS:
            if (RESULTS / f"{name}.json").exists():
                plots.draw(RESULTS / f"{name}.json")
    before = README.read_text()
    after = render(before)
    if options.check:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
