"""Check and time a suite, and write what was measured as JSON; benchmarks/report.py makes tables and plots of it.

    python -m benchmarks.run --suite kernels --device cpu --out benchmarks/results/kernels-cpu.json

Every entrant has a process of its own and they take turns. An entrant whose result is wrong is refused, one that cannot run here is
skipped, one that crashes or hangs has failed; each with its reason in the JSON, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import findings, registry, training
from effnet_fast.benchmark import kernel_time, machine, nets
from effnet_fast.benchmark.case import Case, Entrant
from effnet_fast.benchmark.race import Clock, lanes_of, outcomes
from effnet_fast.benchmark.results import add_shares, net_facts, rates_facts, write
from effnet_fast.benchmark.roofline import Machine

INSTRUCTIONS = Path(__file__).with_name("instructions.json")  # written by tests/sass.py
WRITERS = {"model": nets.write_weights, "train": training.write_weights}
# Rounds of a pass and seconds of a turn. On a GPU the graph of a kernel case runs for 2 ms, so a turn of three replays is 6.
TURNS = {("kernels", "cpu"): (5, 0.06), ("kernels", "cuda"): (3, 0.006), ("model", "cuda"): (3, 0.1), ("train", "cuda"): (2, 0.3)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=registry.SUITES, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write; what the workers print goes beside it")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression, to be found in 'CASE [NETS]: ENTRANT'")
    parser.add_argument("--nets", default=",".join(registry.NETS), help="of b0 to b7; with commas; the first ones first")
    parser.add_argument("--most", type=int, metavar="N", help="of each net and op N shapes, evenly spaced from first to last")
    parser.add_argument("--quick", action="store_true", help="B0 alone, one image, short turns, nothing compiled")
    parser.add_argument("--seconds", type=float, default=math.inf, help="cases for which no time is left are skipped")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device; --device cpu would do")
    nets = tuple(options.nets.split(","))
    if unknown := set(nets) - set(registry.NETS):
        parser.error(f"--nets: {', '.join(sorted(unknown))}; of {', '.join(registry.NETS)} some would do")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite kill ends the entrants' processes too
    dtype = options.dtype or {"cpu": "fp32", "cuda": "bf16"}[options.device]
    results = run(
        options.suite,
        registry.cases(options.suite, options.device, dtype, options.quick, nets, options.most),
        registry.entrants(options.suite, options.device, options.quick),
        options.out,
        only=options.only,
        quick=options.quick,
        seconds=options.seconds,
        command=shlex.join(["python", "-m", "benchmarks.run", *(sys.argv[1:] if arguments is None else arguments)]),
    )
    print(findings.summary(results))
    return 0


def run(
    suite: str,
    cases: list[Case],
    entrants: list[Entrant],
    out: Path,
    only: str = "",
    quick: bool = False,
    seconds: float = math.inf,
    command: str = "",
) -> dict[str, Any]:
    """Measure ``cases``, rewriting ``out`` after each; returns what it holds, which ``command`` wrote.

    Raises ValueError where ``only`` leaves nothing.
    """
    plan = [
        (case, [e for e in entrants if e.takes(case) and re.search(only, f"{case.name} [{' '.join(case.nets)}]: {e.name}")])
        for case in cases
    ]
    plan = [(case, chosen) for case, chosen in plan if chosen]
    if not plan:
        raise ValueError(f"benchmarks.run: no case and entrant contains {only!r}")
    clock, device, dtype = Clock(seconds), plan[0][0].device, plan[0][0].dtype
    rates, facts = machine.measure(device, dtype), machine.facts()
    counts, model = _counts(suite, device, facts)
    results: dict[str, Any] = {
        "suite": suite,
        "device": device,
        "dtype": dtype,
        "quick": quick,
        "command": command,
        "machine": facts,
        "roofline": rates_facts(rates, dtype, device),
        "model": model,
        "baseline": registry.BASELINE[suite],
        "cases": [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(entrant.name for _, chosen in plan for entrant in chosen))
    turns = (1, 0.02) if quick else TURNS.get((suite, device), (4, 0.4))
    with tempfile.TemporaryDirectory() as folder, lanes_of(names, out) as lanes:
        for number, (case, chosen) in enumerate(plan, start=1):
            if suite != "kernels":  # a net has the same weights at every batch, its largest first; a training step its own images
                file = case.nets[0] if suite == "model" else case.name.replace(" ", "-")
                case = replace(case, weights=str(Path(folder, f"{file}.pt")))
            row = _case_facts(case, rates, suite)
            row["entrants"] = outcomes(case, chosen, lanes, clock, turns, WRITERS.get(suite))
            add_shares(row, results["roofline"]["cache_bytes"])
            if counts is not None:
                _add_model(row, case, rates, counts)
            results["cases"].append(row)
            write(results, out)
            print(f"[{number:>{len(str(len(plan)))}}/{len(plan)}] {_line(row)}", flush=True)
    return results


def _case_facts(case: Case, rates: Machine, suite: str) -> dict[str, Any]:
    """What the case must move and compute, and the bound that follows."""
    facts = {"name": case.name, "group": case.group, "nets": list(case.nets), "batch": case.batch}
    if case.launch is not None:
        limit = case.launch.bound(rates, case.dtype, case.batch)
        moved, flops = case.launch.bytes(case.dtype, case.batch), case.launch.flops(case.batch)
        return {**facts, "bytes": moved, "flops": flops, "bound_us": limit.seconds * 1e6, "binds": limit.binds}
    of_net = net_facts(case, rates)
    if suite == "train":  # backward is two more forwards' worth of multiply-adds; there is no bound of its bytes
        return {**facts, "bytes": None, "flops": 3 * of_net["flops"], "bound_us": None, "binds": None}
    return {**facts, **of_net}


def _counts(suite: str, device: str, facts: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What the model of our kernels' times rests on, if there is one for this device, and a line on that."""
    if suite != "kernels":
        return None, "none of whole nets"
    if device == "cpu":
        return None, "none of CPU kernels: bound_us has their bytes and multiply-adds"
    told, capability = json.loads(INSTRUCTIONS.read_text()), facts["gpu"]["capability"]
    if capability.replace(".", "") != str(told["arch"]):
        return None, f"none: instructions were counted for sm_{told['arch']}, this GPU has capability {capability}"
    return told["kernels"], f"native: instructions of sm_{told['arch']} by nvcc {told['nvcc']}; triton: roofline and a launch"


def _add_model(row: dict[str, Any], case: Case, rates: Machine, counts: dict[str, Any]) -> None:
    """Beside what our kernels took, what a model says that they should."""
    assert case.launch is not None
    for name, entrant in row["entrants"].items():
        predicted = None
        if name == "ours native":
            predicted = kernel_time.predict(case.launch, case.dtype, case.batch, rates, counts)
        elif name == "ours triton":
            predicted = kernel_time.least(case.launch, case.dtype, case.batch, rates)
        if predicted is not None:
            entrant["model_us"], entrant["model_binds"] = predicted.seconds * 1e6, predicted.binds


def _line(row: dict[str, Any]) -> str:
    told = [
        f"{name} {entrant['median_us']:.4g} us" if entrant["status"] == "timed" else f"{name} {entrant['status']}"
        for name, entrant in row["entrants"].items()
    ]
    return f"{row['name']}: {', '.join(told)}"


if __name__ == "__main__":
    sys.exit(main())
