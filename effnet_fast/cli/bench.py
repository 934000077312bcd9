"""Time a network beside its peers: ours as it is, timm's accelerated, and the copy for serving; eager PyTorch, torchvision,
torch.compile, and on the CPU ONNX Runtime and OpenVINO, also for throughput (the batch as single images over threads or streams),
and eager PyTorch on one image after the other.

All have the same weights, which are random, at the net's own resolution, and their logits are held to float64 before they are
timed. Each runs in a process of its own and they take turns, in two passes. A time is the median of all calls, beside its
quartiles; memory is what the net takes at work, with its weights and whatever it keeps; the bound is the time that bytes and
operations alone would take at this machine's measured rates. Nothing else should run on the machine meanwhile. The exit code is 1
where an entrant failed or its logits were wrong.

examples: effnet-fast bench efficientnet_b0
          effnet-fast bench efficientnet_b5 --batch 1 --dtype fp32,bf16 --peers openvino,onnxruntime --json b5.json --plot b5.png
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from effnet_fast.benchmark.case import DTYPES
from effnet_fast.benchmark.compare import ROUNDS, Results, compare, described, fastest_first, in_order, plan
from effnet_fast.benchmark.nets import NOT_INSTALLED, PEERS
from effnet_fast.benchmark.race import steps
from effnet_fast.benchmark.results import write
from effnet_fast.benchmark.roofline import launches
from effnet_fast.cli import say
from effnet_fast.cli.options import check_output, count, listed, one_of, seconds
from effnet_fast.cli.table import si, table
from effnet_fast.models import config_of

WRONG = 1  # the exit code
_HEADER = ("entrant", "ms", "quartiles", "images/s", "of best peer", "memory", "of bound", "off by", "")
_SMALLEST = 32  # pixels: a net halves its image five times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="such as efficientnet_b0; a tag of weights behind it changes nothing")
    parser.add_argument("--batch", type=listed(count), default=[1, 16], metavar="N,...", help="images at a time (default 1,16)")
    parser.add_argument(
        "--dtype", type=listed(one_of(*DTYPES)), default=["fp32"], metavar="D,...", help=f"of {', '.join(DTYPES)} (default fp32)"
    )
    parser.add_argument(
        "--peers",
        type=listed(one_of("all", "none", *PEERS)),
        default=["all"],
        metavar="P,...",
        help=f"all (default), none beside eager PyTorch, or some of {', '.join(PEERS)}",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--size", type=count, metavar="PX", help="side of the images (default: the net's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured, after each case")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")
    parser.add_argument("--seconds", type=seconds, default=3.0, metavar="S", help="of each entrant and case (default 3)")


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    draw = _checked(arguments)
    config = config_of(arguments.name)
    launches(config)  # raises where there is no bound to race against
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    peers = {"all": list(PEERS), "none": []}.get(arguments.peers[0], arguments.peers)
    size = arguments.size or config.resolution
    planned = plan(config.name, size, arguments.batch, arguments.dtype, device, peers)
    logs = Path(tempfile.mkdtemp(prefix="effnet-fast-bench-"))
    failed = False
    try:
        total = sum(steps(chosen, ROUNDS) for _, chosen in planned)
        # disable=None: only where stderr is a terminal; delay: only where it takes longer than that.
        with tqdm(total=total, unit="turn", delay=2, disable=None, leave=False) as bar:
            for results in compare(planned, arguments.seconds, logs, bar.update):
                if arguments.json:
                    write(results, arguments.json)
        print(_told(results))
        if draw:
            draw(results, arguments.plot)
        failed = any(entrant["status"] in ("failed", "refused") for _, entrant in _every(results))
    finally:
        if failed and any(logs.iterdir()):
            say("note", f"what the entrants printed is in {logs}")
        else:
            shutil.rmtree(logs)
    return WRONG if failed else 0


def _checked(arguments: argparse.Namespace) -> Any:
    """Raise for what cannot be done, before any work; returns what draws, if it is asked for."""
    for option in ("json", "plot"):
        path = getattr(arguments, option)
        if path:
            check_output(option, path, None if option == "json" else ".png")
    if len(arguments.peers) > 1 and {"all", "none"} & set(arguments.peers):
        raise ValueError(f"--peers is {','.join(arguments.peers)}; all or none stands alone")
    elsewhere = {"onnxruntime", "openvino"} & set(arguments.peers) if arguments.device == "cuda" else set()
    if elsewhere:
        raise ValueError(f"--peers is {','.join(arguments.peers)} and --device cuda; {' and '.join(sorted(elsewhere))} run on cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda and there is no CUDA device here; cpu would do")
    if arguments.size and arguments.size < _SMALLEST:
        raise ValueError(f"--size is {arguments.size}; {_SMALLEST} pixels or more would do")
    if not arguments.plot:
        return None
    from effnet_fast.benchmark.plot import draw

    return draw


def _every(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return [entrant for case in results["cases"] for entrant in case["entrants"].items()]


def _told(results: Results) -> str:
    """A table for each case, who was fastest, and what brings the peers that are not here."""
    parts = [described(results)]
    for case in in_order(results):
        parts += [f"\nbatch {case['batch']}, {case['dtype']}: {_leader(case)}\n", table(_HEADER, _rows(case), "lrrrrrrrl")]
    missing = {entrant["reason"].split()[0] for _, entrant in _every(results) if entrant.get("reason", "").endswith(NOT_INSTALLED)}
    if missing:
        parts.append(f"\nnot installed: {', '.join(sorted(missing))}; pip install 'effnet-fast[bench]' brings all peers")
    return "\n".join(parts)


def _rows(case: dict[str, Any]) -> list[tuple[object, ...]]:
    """Those that were timed, the fastest first, then the others with their reasons."""
    rows: list[tuple[object, ...]] = []
    for name, entrant in fastest_first(case):
        low, high = (f"{quarter / 1e3:.4g}" for quarter in entrant["quartiles_us"])
        ratio = f"{entrant['of_best_peer']:.2f}" if "of_best_peer" in entrant else None
        memory, share = si(entrant["memory_bytes"], "B"), f"{100 * entrant['share_of_bound']:.0f} %"
        times = (f"{entrant['median_us'] / 1e3:.4g}", f"{low} - {high}", f"{entrant['images_s']:.4g}")
        rows.append((name, *times, ratio, memory, share, f"{entrant['off_by']:.1e}", ""))
    for name, entrant in case["entrants"].items():
        if entrant["status"] != "timed":
            rows.append((name, *[None] * (len(_HEADER) - 2), f"{entrant['status']}: {entrant['reason']}"))
    return rows


def _leader(case: dict[str, Any]) -> str:
    timed = fastest_first(case)
    if not timed:
        return "nothing was timed"
    name, entrant = timed[0]
    if case["best_peer"] in (None, name):
        return f"{name} is the fastest"
    return f"{name} is the fastest: {entrant['of_best_peer']:.2f} times the speed of {case['best_peer']}"
