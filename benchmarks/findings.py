"""What a file of timings says: a table of figures, and in words who was faster than ours, which target missed, what to doubt."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from effnet_fast.cli.table import table

Results = dict[str, Any]
Case = dict[str, Any]
HEADER = ("what", "batch", "entrant", "cases", "us", "quartiles", "speed-up", "least", "of bound", "worst")
PEERS: dict[str, Callable[[str], bool]] = {  # by kind, from an entrant's name
    "eager": lambda name: name.startswith(("eager", "timm", "torchvision")),
    "torch.compile": lambda name: name.startswith("compile"),
    "a runtime": lambda name: name.startswith(("ONNX Runtime", "OpenVINO")),
}
MOST_MEMORY = 0.5  # of eager PyTorch's, at work
DRIFT = 0.1  # of a median: two passes of one entrant that differ by more are told
NAMED = 12  # cases of a list, the worst first


class Target(NamedTuple):
    """The fastest of ours is to have ``least`` times the speed of ``over``, an entrant, the fastest peer or the bound: a geometric
    mean over the cases of one image, or those of more, of ``group`` or, without one, of each op or net."""

    single: bool
    over: str
    least: float
    group: str = ""


TARGETS = {
    ("kernels", "cpu"): (
        Target(True, "eager channels_last", 3.0, "depthwise_conv_bn_act"),
        Target(False, "eager channels_last", 2.0, "depthwise_conv_bn_act"),
    ),
    ("kernels", "cuda"): (Target(False, "the bound", 0.75),),
    ("model", "cpu"): tuple(
        Target(single, "the fastest peer", least, group)
        for single, group, steps in ((True, "b0", (1.0, 1.2)), (False, "b0", (1.1, 1.3)), (True, "b5", (1.0, 1.2)))
        for least in steps
    ),
    ("model", "cuda"): (Target(False, "compile max-autotune", 2.5),),
    ("train", "cpu"): (Target(False, "timm channels_last", 1.5, "b0"),),
    ("train", "cuda"): (Target(False, "compile max-autotune", 2.0),),
}


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def setting(results: Results) -> str:
    where = results["machine"]
    device = where["gpu"]["name"] if results["device"] == "cuda" else f"{where['cpu']}, {where['threads']} threads"
    return f"{results['suite']}, {results['dtype']}, {device}"


def digest(file: Path) -> str:
    """Of a file of timings, for what was drawn from it."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def timed(case: Case) -> dict[str, dict[str, Any]]:
    return {name: entrant for name, entrant in case["entrants"].items() if entrant["status"] == "timed"}


def groups(results: Results) -> list[str]:
    return list(dict.fromkeys(case["group"] for case in results["cases"]))


def summary(results: Results) -> str:
    """The figures and what is to be said of them, as text."""
    rows = figures(results)
    return "\n".join([*([table(HEADER, rows, "lllrrrrrrr")] if rows else []), *sentences(results)])


def sentences(results: Results) -> list[str]:
    return [
        *(told for find in (_compiled, _behind, _targets, _memory, _model, _rotation, _drift) for told in find(results)),
        *(f"{name} {status} on {_count(number, 'case')}: {reason}" for (status, name, reason), number in _lost(results).items()),
    ]


def figures(results: Results) -> list[tuple[str, ...]]:
    """Under HEADER, a row for each group, kind of batch and entrant: how fast, against the baseline and against the bound."""
    rows = []
    for group in groups(results):
        for single in (False, True):
            cases = [case for case in results["cases"] if case["group"] == group and (case["batch"] == 1) == single]
            for name in dict.fromkeys(name for case in cases for name in case["entrants"]):
                having = [case for case in cases if name in timed(case)]
                if having:
                    rows.append((group, "1" if single else "large", name, *_figures(having, name, results["baseline"])))
    return rows


def _figures(cases: list[Case], name: str, baseline: str) -> tuple[str, ...]:
    """Cases; geometric means of microseconds, their quartiles, speed-ups over the baseline and shares of the bound, with the worst
    of each of these two."""
    mine = [case["entrants"][name] for case in cases]
    ratios = [timed(case)[baseline]["median_us"] / timed(case)[name]["median_us"] for case in cases if baseline in timed(case)]
    shares = [entrant["share_of_bound"] for entrant in mine if "share_of_bound" in entrant]
    us = _us(geomean([entrant["median_us"] for entrant in mine]))
    quartiles = " - ".join(_us(geomean([entrant["quartiles_us"][end] for entrant in mine])) for end in (0, 1))
    speed = (f"{geomean(ratios):.2f}", f"{min(ratios):.2f}") if ratios else ("-", "-")
    of_bound = (f"{100 * geomean(shares):.0f} %", f"{100 * min(shares):.0f} %") if shares else ("-", "-")
    return (str(len(cases)), us, quartiles, *speed, *of_bound)


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _compiled(results: Results) -> list[str]:
    having = [case for case in results["cases"] if any(name.startswith("compile") for name in timed(case))]
    names = dict.fromkeys(name for case in having for name in timed(case) if name.startswith("compile"))
    if not names:
        return ["torch.compile was not timed: every comparison is with eager PyTorch."]
    return [f"torch.compile was timed as {', '.join(names)}, on {len(having)} of {_count(len(results['cases']), 'case')}."]


def fastest(case: Case) -> str:
    """The fastest of ours."""
    return min((entrant["median_us"], name) for name, entrant in timed(case).items() if name.startswith("ours"))[1]


def leads(case: Case) -> dict[str, float]:
    """How many times the speed of the fastest peer the fastest of ours has, by the kind of peer, where both were timed."""
    times = {name: entrant["median_us"] for name, entrant in timed(case).items()}
    ours = min((us for name, us in times.items() if name.startswith("ours")), default=None)
    best = {kind: min((us for name, us in times.items() if is_peer(name)), default=None) for kind, is_peer in PEERS.items()}
    return {kind: us / ours for kind, us in best.items() if us and ours}


def over_baseline(results: Results) -> dict[str, float]:
    """How many times the speed of the baseline the fastest of ours has: of each group, the geometric mean of its cases."""
    baseline, ratios = results["baseline"], defaultdict(list)
    for case in results["cases"]:
        if baseline in timed(case) and any(name.startswith("ours") for name in timed(case)):
            ratios[case["group"]].append(timed(case)[baseline]["median_us"] / timed(case)[fastest(case)]["median_us"])
    return {group: geomean(values) for group, values in ratios.items()}


def behind(results: Results, kinds: Iterable[str] = PEERS) -> tuple[list[tuple[float, str]], int]:
    """Where a peer of ``kinds`` is faster: the share of its speed that ours has, and the case; the worst first. And how many cases
    have such a peer."""
    rows = [(min(told), case["name"]) for case in results["cases"] if (told := [v for k, v in leads(case).items() if k in kinds])]
    return sorted(row for row in rows if row[0] < 1), len(rows)


def _behind(results: Results) -> list[str]:
    told = []
    for kind in PEERS:
        found, both = behind(results, [kind])
        if found:
            named = "; ".join(f"{case} ({share:.3f} of its speed)" for share, case in found[:NAMED])
            more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
            told.append(f"Slower than the fastest of {kind} on {len(found)} of {_count(both, 'case')}: {named}{more}.")
        elif both:
            told.append(f"Slower than the fastest of {kind} on none of {_count(both, 'case')}.")
    return told


def _targets(results: Results) -> list[str]:
    told = []
    for target in TARGETS.get((results["suite"], results["device"]), ()):
        for group in [target.group] if target.group else groups(results):
            cases = [case for case in results["cases"] if case["group"] == group and (case["batch"] == 1) == target.single]
            ratios = [lead for case in cases if (lead := _lead(case, target.over)) is not None]
            if ratios:
                reached, batch = geomean(ratios), "one image" if target.single else "a large batch"
                verdict = "met" if reached >= target.least else "missed"
                told.append(
                    f"Target {verdict}: {group}, {batch}, {target.least:g} times the speed of {target.over}: {reached:.2f}."
                )
    return told


def _memory(results: Results) -> list[str]:
    """Of nets on a CPU at batch 16: the frozen copy's beside eager PyTorch's least for that batch at once."""
    told = []
    if (results["suite"], results["device"]) != ("model", "cpu"):
        return told
    for case in results["cases"]:
        bytes_of = {name: entrant["memory_bytes"] for name, entrant in timed(case).items() if "memory_bytes" in entrant}
        eager = [value for name, value in bytes_of.items() if PEERS["eager"](name) and not name.endswith("one by one")]
        if case["batch"] != 16 or "ours optimized" not in bytes_of or not eager:
            continue
        share = bytes_of["ours optimized"] / min(eager)
        verdict = "met" if share <= MOST_MEMORY else "missed"
        told.append(
            f"Target {verdict}: {case['group']} at batch {case['batch']}, ours optimized, {MOST_MEMORY:g} of the memory that eager"
            f" PyTorch takes at least for all at once: {share:.2f}."
        )
    return told


def _lead(case: Case, over: str) -> float | None:
    """How many times the speed of a target's ``over`` the fastest of ours has, where both were timed."""
    if over == "the fastest peer":
        return min(leads(case).values(), default=None)
    ours = [entrant["median_us"] for name, entrant in timed(case).items() if name.startswith("ours")]
    other = case["bound_us"] if over == "the bound" else timed(case).get(over, {}).get("median_us")
    return other / min(ours) if ours and other else None


def _model(results: Results) -> list[str]:
    """Of kernels whose instructions were counted: what they took of what they should."""
    told = []
    for group in groups(results):
        mine = [entrant for case in results["cases"] if case["group"] == group for entrant in timed(case).items()]
        for name in dict.fromkeys(name for name, entrant in mine if "model_us" in entrant):
            ratios = [entry["median_us"] / entry["model_us"] for other, entry in mine if other == name and "model_us" in entry]
            told.append(f"{group}, {name}: {geomean(ratios):.2f} of the modelled time, {min(ratios):.2f} to {max(ratios):.2f}.")
    return told


def _rotation(results: Results) -> list[str]:
    """How many last-level caches a kernel's inputs and weights filled before the same copy came again."""
    least = {
        case["name"]: min(entrant["caches_rotated"] for entrant in timed(case).values())
        for case in results["cases"]
        if any("caches_rotated" in entrant for entrant in timed(case).values())
    }
    few = {name: caches for name, caches in least.items() if caches < 3}
    if not least:
        return []
    kinds = " and ".join(dict.fromkeys(case["group"] for case in results["cases"] if case["name"] in few))
    told = f"Inputs and weights rotate past 3 last-level caches on {len(least) - len(few)} of {_count(len(least), 'case')}"
    if few:
        told += f"; on the others ({kinds}) all copies together fill as little as {min(few.values()):.2g} of one"
    return [f"{told}."]


def drifting(results: Results) -> list[tuple[float, str]]:
    """Entries whose second pass took longer or shorter than the first by more than DRIFT, the worst first: by how much, which."""
    found = []
    for case in results["cases"]:
        for name, entrant in timed(case).items():
            first, again = entrant["passes_us"]
            if abs(again / first - 1) > DRIFT:
                found.append((again / first - 1, f"{case['name']}: {name}"))
    return sorted(found, key=lambda row: -abs(row[0]))


def _drift(results: Results) -> list[str]:
    found, every = drifting(results), sum(len(timed(case)) for case in results["cases"])
    worst = f", at most by {100 * abs(found[0][0]):.0f} % ({found[0][1]})" if found else ""
    return [f"The two passes differ by more than {100 * DRIFT:.0f} % in {len(found)} of {_count(every, 'timing')}{worst}."]


def _lost(results: Results) -> Counter[tuple[str, str, str]]:
    """What was not timed and why, and on how many cases."""
    return Counter(
        (entrant["status"], name, entrant["reason"])
        for case in results["cases"]
        for name, entrant in case["entrants"].items()
        if entrant["status"] != "timed"
    )
