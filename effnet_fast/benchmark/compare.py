"""One network beside its peers, at some batches and dtypes: what ``effnet-fast bench`` measures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from effnet_fast.benchmark import machine
from effnet_fast.benchmark.case import Case, Entrant, is_ours
from effnet_fast.benchmark.nets import eager_of, entrants, write_weights
from effnet_fast.benchmark.race import Clock, lanes_of, outcomes
from effnet_fast.benchmark.results import add_shares, net_facts, rates_facts

ROUNDS = 4  # of each of two passes
Results = dict[str, Any]


def plan(
    net: str, size: int, batches: Sequence[int], dtypes: Sequence[str], device: str, peers: Sequence[str]
) -> list[tuple[Case, list[Entrant]]]:
    """The cases, of each dtype the largest batch first, and who takes part in them: ours, eager PyTorch and ``peers``."""
    chosen = [entrant for entrant in entrants(device, eager_of(net)) if entrant.peer in ("", *peers)]
    cases = [
        Case(f"{net} {dtype} n{batch}", net, (net,), batch, dtype, device, net=net, size=size)
        for dtype in dtypes
        for batch in sorted(batches, reverse=True)
    ]
    return [(case, [entrant for entrant in chosen if entrant.takes(case)]) for case in cases]


def compare(
    planned: Sequence[tuple[Case, list[Entrant]]],
    seconds: float,
    logs: Path,
    advance: Callable[[int], Any] = lambda steps: None,
) -> Iterator[Results]:
    """Check and time a :func:`plan`; JSON-ready results of all cases so far, after each.

    seconds  an entrant's, in all its turns of a case; at least three calls are made in each
    logs     a folder for what the entrants print
    advance  see effnet_fast.benchmark.race.outcomes
    """
    first = planned[0][0]
    device, dtypes = first.device, dict.fromkeys(case.dtype for case, _ in planned)
    rates = {dtype: machine.measure(device, dtype) for dtype in dtypes}
    results: Results = {
        "net": first.net,
        "size": first.size,
        "device": device,
        "seconds": seconds,
        "machine": machine.facts(),
        "roofline": {dtype: rates_facts(rates[dtype], dtype, device) for dtype in dtypes},
        "cases": [],
    }
    names = list(dict.fromkeys(entrant.name for _, chosen in planned for entrant in chosen))
    turns = (ROUNDS, seconds / (2 * ROUNDS))
    with tempfile.TemporaryDirectory() as folder, lanes_of(names, logs / "bench") as lanes:
        for case, chosen in planned:
            case = replace(case, weights=str(Path(folder, f"{case.dtype}.pt")))
            row = {"name": case.name, "batch": case.batch, "dtype": case.dtype, **net_facts(case, rates[case.dtype])}
            row["entrants"] = outcomes(case, chosen, lanes, Clock(float("inf")), turns, write_weights, advance)
            add_shares(row, results["roofline"][case.dtype]["cache_bytes"])
            _add_speeds(row)
            results["cases"].append(row)
            yield results


def _add_speeds(row: dict[str, Any]) -> None:
    """The best peer, and of every entrant its images a second and how many times the speed of the best peer it has."""
    timed = fastest_first(row)
    row["best_peer"] = next((name for name, _ in timed if not is_ours(name)), None)
    for _, entrant in timed:
        entrant["images_s"] = row["batch"] * 1e6 / entrant["median_us"]
        if row["best_peer"]:
            entrant["of_best_peer"] = row["entrants"][row["best_peer"]]["median_us"] / entrant["median_us"]


def fastest_first(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The entrants of a case that were timed."""
    timed = [(name, entrant) for name, entrant in row["entrants"].items() if entrant["status"] == "timed"]
    return sorted(timed, key=lambda named: named[1]["median_us"])


def in_order(results: Results) -> list[dict[str, Any]]:
    """The cases by dtype, the smallest batch first."""
    dtypes = list(results["roofline"])
    return sorted(results["cases"], key=lambda case: (dtypes.index(case["dtype"]), case["batch"]))


def described(results: Results) -> str:
    """The net and where it ran, in a line."""
    where = results["machine"]
    on = where["gpu"]["name"] if results["device"] == "cuda" else f"{where['cpu']}, {where['threads']} threads, {where['simd']}"
    return f"{results['net']}, {results['size']}x{results['size']}, {on}, torch {where['versions']['torch']}"
