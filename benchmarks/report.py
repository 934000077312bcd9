"""Writes the README's tables between their markers: the family from the cost model, figures from benchmarks/results/*.json.

python -m benchmarks.report           rewrites README.md
python -m benchmarks.report --check   exits 1 if README.md is not what this would write
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from effnet_fast.models import FAMILY
from effnet_fast.scaling.cost import Cost
from effnet_fast.weights import SOURCES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---" if column == 0 else "---:" for column in range(len(header))], *rows]
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
    results = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())
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
    versions = ", ".join(f"{name} {number}" for name, number in results["machine"]["versions"].items())
    caption = f"{results['images']} images, {results['dtype']}, CPU ({results['machine']['simd']}); {versions}."
    header = ["same weights as", "image", "largest logit", "ours - theirs", "ours - fp64", "theirs - fp64"]
    return f"{table(header, rows)}\n\n{caption}"


SECTIONS = {"family": family, "parity": parity}


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
    before = README.read_text()
    after = render(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
