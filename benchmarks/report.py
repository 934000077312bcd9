"""Writes the README's tables and what is said of them between markers: the family from the cost model, figures from
benchmarks/results/*.json.

python -m benchmarks.report             rewrites README.md
python -m benchmarks.report --plots     also draws benchmarks/results/*.png (matplotlib)
python -m benchmarks.report --check     exits 1 if README.md or a plot is not what this would write
python -m benchmarks.report FILE...     prints the tables of results as text
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ceilings, findings
from effnet_fast.models import FAMILY
from effnet_fast.scaling.cost import Cost
from effnet_fast.weights import SOURCES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
KERNELS = ("csrc", "effnet_fast/ops", "effnet_fast/nn", "effnet_fast/inference")  # whose changes make results old
HEADLINES = {"model": "Speed", "train": "Training step"}  # suites of whole nets
PROOFS = ("errors-cpu", "soak-cpu", "bench-b0-bf16-cpu", "memory-cpu", "parity")  # results that no table shows
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


def timings() -> dict[Path, dict[str, Any]]:
    """The committed files of timings."""
    paths = [RESULTS / f"{name}.json" for name in TIMINGS]
    return {path: json.loads(path.read_text()) for path in paths if path.exists()}


def plots_of(path: Path) -> list[Path]:
    return sorted(RESULTS.glob(f"{path.stem}-*.png"))


def kept_memory(results: dict[str, Any]) -> str:
    """What a training step keeps, ours and a peer's accelerated net beside the same net in eager PyTorch."""
    parts = []
    for net, batch in dict.fromkeys((case["net"], case["batch"]) for case in results["cases"]):
        share = {
            case["entrant"]: f"{100 * case['of_eager']:.0f} %"
            for case in results["cases"]
            if (case["net"], case["batch"]) == (net, batch)
        }
        told = f"{share['ours']}, where torch.compile keeps {share['timm, torch.compile']}"
        parts.append(f"{net.removeprefix('efficientnet_')} at batch {batch}: {told}")
    return f"**Training memory** kept between forward and backward, of eager PyTorch's: {'; '.join(parts)}."


def trials(path: Path) -> str:
    """Single nets or steps on a GPU, which no benchmark has raced."""
    results = json.loads(path.read_text())
    parts: dict[str, list[str]] = {}
    for row in results["trials"]:
        parts.setdefault(f"{row['net']} at batch {row['batch']}", []).append(f"{row['entrant']} {row['median_ms']:.3g} ms")
    told = "; ".join(f"{case}: {', '.join(entrants)}" for case, entrants in parts.items())
    where = f"{results['dtype']}, {results['machine']['gpu']['name']}"
    return f"**{results['title']}** ([trials](benchmarks/results/{path.name}), {where}): {told}."


def headline() -> str:
    """How fast nets are against the fastest peer of each kind, what was not measured, and how often a peer is faster."""
    told, kept = [], list(timings().values())
    for results in kept:
        if results["suite"] in HEADLINES:
            leads = []
            for case in results["cases"]:
                against = " and ".join(f"{lead:.2f} times {kind}'s" for kind, lead in findings.leads(case).items())
                leads += [f"{case['group']} at batch {case['batch']}, {findings.fastest(case)}, has {against}"] if against else []
            label = HEADLINES[results["suite"]]
            told.append(f"**{label}** ({findings.setting(results)}), beside the fastest peer of each kind: {'; '.join(leads)}.")
    told += map(trials, sorted(RESULTS.glob("*-trials-cuda.json")))
    if (path := RESULTS / "memory-cpu.json").exists():
        told.append(kept_memory(json.loads(path.read_text())))
    for device, named in (("cuda", "a GPU"), ("cpu", "a CPU")):
        of_device = {results["suite"]: results for results in kept if results["device"] == device}
        if "model" not in of_device and "kernels" in of_device:
            of_kernels = of_device["kernels"]
            leads = [f"{group} {lead:.2f} times" for group, lead in findings.over_baseline(of_kernels).items()]
            told.append(
                f"**Kernels** ({findings.setting(of_kernels)}), by the speed of {of_kernels['baseline']}: {', '.join(leads)}."
            )
        if "model" not in of_device:
            told.append(f"**Not raced:** whole nets on {named}." if of_device else f"**Not measured:** speed on {named}.")
    for results in kept:
        found, both = findings.behind(results)
        if found:
            told.append(f"A peer is faster on {len(found)} of {both} cases ({findings.setting(results)}): [below](#speed).")
    return "\n".join(told)


def speed() -> str:
    """Of each committed file of timings a table, what is to be said of it, how it was made, and its plots."""
    parts: list[str] = []
    for path, results in timings().items():
        versions = ", ".join(f"{tool} {number}" for tool, number in results["machine"]["versions"].items() if number)
        caption = (
            f"{findings.setting(results)}; {versions}; commit {results['machine']['commit']}, {results['machine']['date']}: "
            f"`{results['command']}`. Speed-ups are over {results['baseline']}; columns with several cases are geometric means, "
            f"beside the worst case."
        )
        told = "\n".join(f"- {sentence}" for sentence in findings.sentences(results))
        images = "\n".join(f"![{plot.stem}]({plot.relative_to(ROOT)})" for plot in plots_of(path))
        parts += filter(None, (table(findings.HEADER, findings.figures(results)), caption, told, images))
    return "\n\n".join(parts) or "No timing is committed yet."


SECTIONS = {"headline": headline, "family": family, "parity": parity, "speed": speed}


def stale_plots() -> list[Path]:
    """Those that were drawn from other timings than the ones beside them."""
    return [plot for path in timings() for plot in plots_of(path) if findings.digest(path).encode() not in plot.read_bytes()]


def changed_since(commit: str) -> list[str]:
    """Whether the kernels did, in words; empty where they did not."""
    kernels = " or ".join(KERNELS)
    try:
        diff = ["git", "diff", "--quiet", commit.removesuffix("-dirty"), "--", *KERNELS]
        answer = subprocess.run(diff, cwd=ROOT, capture_output=True).returncode
    except OSError:
        answer = None
    if answer == 0:
        return []
    return [f"{kernels} changed since" if answer == 1 else f"git cannot tell whether {kernels} changed since"]


def notices() -> list[str]:
    """What to doubt in committed results, which is no reason to fail: kernels that changed since, passes that differ."""
    told = []
    proofs = {path: json.loads(path.read_text()) for name in PROOFS if (path := RESULTS / f"{name}.json").exists()}
    for path, results in {**timings(), **proofs}.items():
        commit = results["machine"]["commit"] or "no known commit"
        told += [f"{path.name} was measured at {commit}: {why}" for why in changed_since(commit)]
    for path, results in timings().items():
        told += [f"{path.name}: {entry} took {100 * by:+.0f} % in its second pass" for by, entry in findings.drifting(results)]
    return told


def render(text: str) -> str:
    """``text`` with every ``<!-- NAME -->`` ... ``<!-- end NAME -->`` filled."""
    for name, section in SECTIONS.items():
        first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise SystemExit(f"report: README.md wants one section from {first.strip()} to {last}")
        before, rest = text.split(first)
        text = f"{before}{first}{section()}\n{last}{rest.split(last)[1]}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plots", action="store_true")
    options = parser.parse_args(arguments)
    for path in options.files:
        results = json.loads(path.read_text())
        print(f"\n== {path.stem}")
        print((ceilings if results["suite"] == "ceilings" else findings).summary(results))
    if options.files:
        return 0
    if options.plots:
        from benchmarks import plots

        for path in timings():
            plots.draw(path)
    before = README.read_text()
    after = render(before)
    for notice in notices():
        print(f"report: {notice}", file=sys.stderr)
    if not options.check:
        README.write_text(after)
        return 0
    wrong = [f"{plot.name} was drawn from other timings: --plots draws it" for plot in stale_plots()]
    if before != after:
        wrong.append("README.md is not what its sources say: without --check it is written")
    for what in wrong:
        print(f"report: {what}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
