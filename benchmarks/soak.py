"""Whether a frozen copy stays right and stays small: mixed images from several threads for minutes, every answer checked, the
memory of the process sampled.

    python -m benchmarks.soak --out benchmarks/results/soak-cpu.json

One optimize_for_inference(B0) is given batches of more shapes and layouts than it keeps plans for, some far more often than others,
so that plans are used, evicted and made again all the time. What must hold is in RULES. Exits with 1 where it does not.
"""

from __future__ import annotations

import argparse
import copy
import random
import shlex
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

import effnet_fast
from effnet_fast.benchmark import calibrate, images, nets
from effnet_fast.benchmark.machine import facts
from effnet_fast.benchmark.results import write
from effnet_fast.benchmark.timing import resident
from effnet_fast.benchmark.tolerance import why_wrong
from effnet_fast.cli.options import count, seconds
from effnet_fast.inference import graphs, optimize
from effnet_fast.inference.graphs import CudaPool, Graph
from effnet_fast.inference.optimize import InferenceModel
from effnet_fast.inference.plan import NativePlan
from effnet_fast.ops.conv.reference import normalised

NET = "efficientnet_b0"
PLANS = 16  # that the copy keeps meanwhile, of 32 shapes and layouts
SIZES = ((64, 64), (224, 224), (33, 47), (96, 128), (32, 32), (75, 61), (160, 160), (1, 200))
BATCHES = (1, 3, 8)
FORMS: dict[str, Callable[[Tensor], Tensor]] = {  # of the images that are given, from [N, C, H, W]
    "float32 NCHW": torch.Tensor.contiguous,
    "uint8 NHWC": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "float32 channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "uint8 NCHW": torch.Tensor.contiguous,
}
INTERVAL = 1.0  # seconds between samples of the memory
WARM_UP = 0.2  # of the run
GROWTH = 0.02
KEPT = 8  # answers that a thread holds before it checks the oldest: one that a later call wrote over shows too
RULES = (
    "alone, the copy's answers are at most twice as far from float64 as plain PyTorch's in float32, by the largest error",
    f"in the crowd each is the same to the bit, {KEPT} calls later: a plan's, or of a shape that is new its blocks'",
    f"after the first {100 * WARM_UP:.0f} % of the run, memory in the last third is at most {100 * GROWTH:.0f} % over that in the"
    " first third, largest by largest",
    f"plans are evicted meanwhile, and at the end no more are alive than are kept: {PLANS}; or graphs, on CUDA: {graphs.GRAPHS}",
)


class Case(NamedTuple):
    """A batch, and the frozen copy's answers to it when nothing else ran: of its blocks, and of a plan or graph."""

    name: str
    images: Tensor
    answers: tuple[Tensor, Tensor]


@dataclass
class Tally:
    """Of one thread: calls and images, and how many answers were wrong in which way."""

    calls: int = 0
    images: int = 0
    wrong: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.calls + other.calls, self.images + other.images, self.wrong + other.wrong)


def _answers(model: InferenceModel, x: Tensor) -> tuple[Tensor, Tensor]:
    laid_out = model._checked(x)
    if not laid_out.is_contiguous(memory_format=torch.channels_last):
        laid_out = laid_out.contiguous()
    return model._run_blocks(laid_out), [model(x) for _ in range(2)][-1]


@torch.no_grad()
def cases(model: InferenceModel, sizes: Sequence[tuple[int, int]], batches: Sequence[int]) -> tuple[list[Case], str | None]:
    """Every size, form and batch; and why the answers of ``model``, which is NET in float32, are wrong even alone, or None."""
    plain = nets.plain_net(NET).eval()
    plain.load_state_dict(model.frozen.state_dict())
    plain.to(model.device)
    exact, wide = copy.deepcopy(plain).double(), model.pixels.double()
    made, plains, references = [], [], []
    for size in sizes:
        floats = images(max(batches), size).to(model.device)
        uint8 = (128 + 40 * floats).clamp(0, 255).byte()
        answers = {  # plain PyTorch's and float64's
            "float32": (plain(floats), exact(floats.double())),
            "uint8": (plain(normalised(uint8, model.pixels, torch.float32)), exact(normalised(uint8, wide, torch.float64))),
        }
        for form, laid_out in FORMS.items():
            dtype = form.split()[0]
            for batch in batches:
                x = laid_out((uint8 if dtype == "uint8" else floats)[:batch])
                made.append(Case(f"{batch}x3x{size[0]}x{size[1]} {form}", x, _answers(model, x)))
                plains.append(answers[dtype][0][:batch])
                references.append(answers[dtype][1][:batch])
    whys = [
        why_wrong(torch.cat([case.answers[call] for case in made]), torch.cat(plains), torch.cat(references)) for call in range(2)
    ]
    return made, next((why for why in whys if why is not None), None)


def soak(
    model: InferenceModel,
    batches: list[Case],
    threads: int,
    duration: float,
    interval: float,
    advance: Callable[[float], Any] = lambda seconds: None,
) -> dict[str, Any]:
    """``duration`` seconds of it, JSON-ready; the first of ``batches`` come most often. ``advance`` is told how many are over.

    It is a copy of ``model`` that is called: one without plans, so that all that it has are followed.
    """
    model = copy.deepcopy(model)
    memory = {"resident": lambda: resident("VmRSS")}
    if model.device.type == "cuda":
        memory["CUDA"] = torch.cuda.memory_reserved
    samples: dict[str, list[int]] = {name: [] for name in memory}
    stop = threading.Event()
    with followed() as plans, ThreadPoolExecutor(threads) as pool:
        working = [pool.submit(_work, model, batches, number, stop) for number in range(threads)]
        try:
            for _ in range(round(duration / interval)):
                time.sleep(interval)
                for name, told in memory.items():
                    samples[name].append(told())
                advance(interval)
        finally:
            stop.set()
        tally = sum((work.result() for work in working), Tally())
        alive = len(plans.alive)
    grown = {name: growth(series) for name, series in samples.items()}
    kept = graphs.GRAPHS if model.device.type == "cuda" else PLANS
    return {
        "calls": tally.calls,
        "images": tally.images,
        "wrong": sum(tally.wrong.values()),
        "wrong_in_words": dict(tally.wrong.most_common(10)),
        "plans": {"kept": kept, "made": plans.made, "evicted": plans.made - alive, "alive": alive},
        "growth": grown,
        "passed": not tally.wrong and max(grown.values()) <= GROWTH and plans.made > alive and alive <= kept,
        "warm_up_s": WARM_UP * duration,
        "interval_s": interval,
        "memory_bytes": samples,
    }


def _work(model: InferenceModel, batches: list[Case], seed: int, stop: threading.Event) -> Tally:
    """One thread's calls, until it is to stop; every answer is checked."""
    draw, tally, kept = random.Random(seed), Tally(), deque[tuple[Case, Tensor]]()
    weights = [1 / (1 + rank) for rank in range(len(batches))]
    while not stop.is_set():
        case = draw.choices(batches, weights)[0]
        tally.calls += 1
        tally.images += len(case.images)
        try:
            kept.append((case, model(case.images)))
        except Exception as error:  # counted: the others go on
            tally.wrong[f"{case.name}: {type(error).__name__}: {error}"] += 1
        if len(kept) > KEPT:
            _check(*kept.popleft(), tally)
    for case, answer in kept:
        _check(case, answer, tally)
    return tally


def _check(case: Case, answer: Tensor, tally: Tally) -> None:
    if not any(torch.equal(answer, alone) for alone in case.answers):
        tally.wrong[f"{case.name}: the answer is not what it was alone"] += 1


def growth(series: list[int]) -> float:
    """By how much of itself the first third's largest value is surpassed in the last third, once the warm-up is over.

    Raises ValueError where there are too few for thirds.
    """
    after = series[round(WARM_UP * len(series)) :]
    third = len(after) // 3
    if third == 0:
        raise ValueError(f"growth: there are {len(series)} samples of the memory; {round(3 / (1 - WARM_UP))} or more would do")
    return max(after[-third:]) / max(after[:third]) - 1


class Plans:
    """Those that were made, on CUDA graphs, and which of them are alive."""

    def __init__(self) -> None:
        self.made, self.alive = 0, weakref.WeakSet[Any]()

    def add(self, plan: Any) -> None:
        self.made += 1
        self.alive.add(plan)


@contextmanager
def followed() -> Iterator[Plans]:
    """The plans and graphs that one InferenceModel makes meanwhile, one at a time, so that they can be counted. It keeps few."""
    plans = Plans()
    capture = CudaPool.capture

    class Followed(NativePlan):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            plans.add(self)

    def captured(self: CudaPool, *args: Any) -> Graph:
        graph = capture(self, *args)
        plans.add(graph.replay.__self__)  # torch's graph
        return graph

    with (
        patch.object(optimize, "NativePlan", Followed),
        patch.object(optimize, "PLANS", PLANS),
        patch.object(CudaPool, "capture", captured),
    ):
        yield plans


def summary(results: dict[str, Any]) -> str:
    plans, series = results["plans"], results["memory_bytes"]
    memory = (
        f"{name} memory {max(values) / 1e6:.0f} MB at most, grown by {100 * results['growth'][name]:.2f} %"
        for name, values in series.items()
    )
    lines = [
        f"{results['net']} on {results['device']}, {results['seconds']:g} s, {results['threads']} threads:"
        f" {'passed' if results['passed'] else 'FAILED'}",
        f"{results['calls']:,} calls, {results['images']:,} images in {results['cases']} forms: {results['wrong']} wrong",
        f"{plans['made']:,} plans made, {plans['evicted']:,} evicted, {plans['alive']} alive at the end",
        *memory,
        *(f"{number} times {what}" for what, number in results["wrong_in_words"].items()),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=seconds, default=600.0, metavar="S", help="default 600")
    parser.add_argument("--threads", type=count, default=4, metavar="N", help="that call the copy, default 4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--plot", action="store_true", help="draw the memory beside the JSON file")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = effnet_fast.optimize_for_inference(calibrate(effnet_fast.create_model(NET)).to(options.device))
    batches, wrong = cases(model, SIZES, BATCHES)
    if wrong is not None:
        print(f"soak: an answer is wrong even alone: {wrong}", file=sys.stderr)
        return 1
    with tqdm(total=options.seconds, unit="s", disable=None) as bar:
        told = soak(model, batches, options.threads, options.seconds, INTERVAL, bar.update)
    results = {
        "suite": "soak",
        "device": options.device,
        "net": NET,
        "dtype": "fp32",
        "seconds": options.seconds,
        "threads": options.threads,
        "cases": len(batches),
        "rules": RULES,
        "command": shlex.join(["python", "-m", "benchmarks.soak", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": facts(),
        **told,
    }
    write(results, options.out)
    print(summary(results))
    if options.plot:
        from benchmarks import plots

        plots.draw_memory(options.out)
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
