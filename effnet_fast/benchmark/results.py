"""What a file of timings holds beside the times: bytes, operations and bounds, rates and shares."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from effnet_fast.benchmark.case import Case
from effnet_fast.benchmark.machine import last_level_cache
from effnet_fast.benchmark.roofline import Launch, Machine, bound, launches
from effnet_fast.models import config_of
from effnet_fast.weights.files import whole


def write(results: dict[str, Any], out: Path) -> None:
    """As JSON: all of it or nothing."""
    with whole(out) as aside:
        aside.write_text(json.dumps(results, indent=1) + "\n")


def rates_facts(rates: Machine, dtype: str, device: str) -> dict[str, Any]:
    """What the machine was measured to do."""
    return {
        "name": rates.name,
        "copy_bytes_s": rates.copy,
        "dense_flop_s": rates.dense[dtype],
        "lanes_s": rates.lanes,
        "special_s": rates.special if math.isfinite(rates.special) else None,
        "cache_bytes": last_level_cache(device),
    }


def net_facts(case: Case, rates: Machine) -> dict[str, Any]:
    """What a net must move and compute, and the bounds that follow."""
    config = replace(config_of(case.net), resolution=case.size)
    rows: dict[str, tuple[Launch, ...]] = {level: launches(config, level, rates, case.dtype) for level in ("L2", "L3")}
    limits = {level: bound(rows[level], rates, case.dtype, case.batch) * 1e6 for level in rows}
    moved = sum(row.bytes(case.dtype, case.batch, vectors=False) for row in rows["L2"])
    flops = sum(row.flops(case.batch) for row in rows["L2"])
    return {"bytes": moved, "flops": flops, "bound_us": limits["L2"], "bound_L3_us": limits["L3"], "binds": "sum"}


def add_shares(row: dict[str, Any], cache: int) -> None:
    """Rates, by an entrant's own bytes where it has some, as with partial sums; and over how many caches its inputs rotated."""
    for entrant in row["entrants"].values():
        if entrant["status"] == "timed":
            seconds = entrant["median_us"] * 1e-6
            entrant["gflop_s"] = row["flops"] / seconds / 1e9
            if row["bound_us"] is not None:
                entrant["gb_s"] = entrant.get("bytes", row["bytes"]) / seconds / 1e9
                entrant["share_of_bound"] = row["bound_us"] / entrant["median_us"]
            if "set_bytes" in entrant:
                entrant["caches_rotated"] = entrant["sets"] * entrant["set_bytes"] / cache
