"""Fair timing: each entrant in a process of its own, all of them taking turns.

Entrants that share a process fight over its threads, its allocator and its caches of compiled code; entrants timed one after the
other meet a different clock. So a :class:`Lane` is a process that prepares one entrant and then runs it only when asked, and
:func:`race` asks the lanes in turn, round after round. A lane that crashes or hangs costs its own entrant alone.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

Step = Callable[[int], Any]


class Refused(Exception):
    """An entrant whose result is not correct: it is not timed."""


class Skipped(Exception):
    """An entrant that cannot run here, and why."""


class Summary(NamedTuple):
    """Seconds a call: median and quartiles of two passes together, and the median of each."""

    median: float
    passes: tuple[float, float]
    quartiles: tuple[float, float]
    calls: int


def summarize(passes: list[list[float]]) -> Summary:
    every = sorted(passes[0] + passes[1])
    quarters = statistics.quantiles(every, n=4) if len(every) > 1 else [every[0]] * 3
    first, again = map(statistics.median, passes)
    return Summary(statistics.median(every), (first, again), (quarters[0], quarters[2]), len(every))


def copies(held: int, cache: int, most: int = 1024) -> int:
    """How many sets of inputs to go round, so that none is still in the last-level cache of ``cache`` bytes when its turn comes
    again: together more than three times as large, or ``most`` of them where a set holds too little. ``held``: bytes of one set.
    A result is no part of it: where a call's result is dropped, the next one is written to the same memory."""
    return max(2, min(most, math.ceil(3 * cache / max(1, held)) + 1))


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each call on the CPU, in turn, in this process: for a quick comparison of two forms of one forward."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-warm_up, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class HostTimer:
    """Times calls on the CPU. ``step(i)`` runs the entrant on input set i of ``sets``."""

    def __init__(self, step: Step, sets: int) -> None:
        self.step, self.sets, self.turn = step, sets, 0
        self.facts: dict[str, Any] = {}
        before = resident("VmRSS", reset=True)
        step(0)
        self.peak_bytes = max(0, resident("VmHWM") - before)

    def burst(self, seconds: float) -> list[float]:
        """Seconds of each call, for about ``seconds`` and at least three calls."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            self.turn = (self.turn + 1) % self.sets
            start = time.perf_counter()
            self.step(self.turn)
            times.append(time.perf_counter() - start)
        return times


class EventTimer:
    """Times calls on a GPU between two events each, gaps between launches included: what eager PyTorch and compiled nets pay."""

    def __init__(self, step: Step, sets: int) -> None:
        self.step, self.sets, self.turn = step, sets, 0
        self.facts: dict[str, Any] = {}
        for i in range(3):
            step(i % sets)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step(0)
        torch.cuda.synchronize()
        self.estimate = time.perf_counter() - start
        self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def burst(self, seconds: float) -> list[float]:
        calls = max(3, min(500, math.ceil(seconds / self.estimate)))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.turn = (self.turn + 1) % self.sets
            self.step(self.turn)
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``call`` as a CUDA graph, and its result, which every replay writes again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


class Replayed:
    """``run`` as one CUDA graph, replayed on a copy of what it is called with: what torch.compile's reduce-overhead does too."""

    def __init__(self, run: Callable[[torch.Tensor], Any], x: torch.Tensor) -> None:
        self.x, self.run = x.clone(memory_format=torch.preserve_format), run  # whose weights the graph reads, and does not keep
        self.graph, self.result = captured(lambda: run(self.x))

    def __call__(self, x: torch.Tensor) -> Any:
        self.x.copy_(x)
        self.graph.replay()
        return self.result


class GraphTimer:
    """Times calls on a GPU inside one CUDA graph over all input sets, so that a small launch is not lost in the launching of it.

    Results stay alive until their set's next turn: a call does not write into the lines that the last one left in the cache.
    """

    def __init__(self, step: Step, sets: int, least: float = 2e-3) -> None:
        once = EventTimer(step, sets)
        self.sets = sets
        self.facts: dict[str, Any] = {}
        self.peak_bytes = once.peak_bytes
        each = statistics.median(once.burst(0.01))
        self.calls = sets * max(1, min(40, math.ceil(least / (each * sets))))
        self.kept: list[Any] = [None] * sets

        def round_and_round() -> None:
            for i in range(self.calls):
                self.kept[i % sets] = step(i % sets)

        self.graph, _ = captured(round_and_round)
        for _ in range(2):
            self.graph.replay()
        start = time.perf_counter()
        self.graph.replay()
        torch.cuda.synchronize()
        self.estimate = time.perf_counter() - start

    def burst(self, seconds: float) -> list[float]:
        replays = max(3, min(200, math.ceil(seconds / self.estimate)))
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
        for first, last in marks:
            first.record()
            self.graph.replay()
            last.record()
        torch.cuda.synchronize()
        return [first.elapsed_time(last) / 1e3 / self.calls for first, last in marks]


Timer = HostTimer | EventTimer | GraphTimer


class Answer(NamedTuple):
    """``status`` is "ok", "refused", "skipped", "late" or "failed"; ``value`` what was asked for, or the reason."""

    status: str
    value: Any


class Lane:
    """A process that prepares entrants, one at a time, and runs the prepared one when asked. Its output goes to ``log``."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, str(self.log)), daemon=False)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # an interrupt is this process's to handle
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def send(self, request: str, *arguments: Any) -> None:
        """Ask without waiting for the answer: "prepare" (function, arguments...), "burst" (seconds) or "release"."""
        if self.process is None or not self.process.is_alive():
            self.start()
        self.connection.send((request, arguments))

    def answer(self, timeout: float) -> Answer:
        """The answer to the last request. A lane that dies or takes longer is ended; the next request starts a new process."""
        try:
            if self.connection.poll(max(0.0, timeout)):
                return self.connection.recv()
            status, reason = "late", f"no answer within {timeout:.0f} s"
        except (EOFError, ConnectionError):
            self.process.join(5)
            status, reason = "failed", f"its process ended with {self.process.exitcode}"
        self.stop(0.0)
        return Answer(status, f"{reason}; see {self.log.name}")

    def ask(self, timeout: float, request: str, *arguments: Any) -> Answer:
        self.send(request, *arguments)
        return self.answer(timeout)

    def stop(self, patience: float = 3.0) -> None:
        """End the process, politely for so many seconds, and what it started (compile workers)."""
        if self.process is not None:
            self.connection.close()
            self.process.join(patience)
        if self.process is not None and self.process.is_alive():
            try:
                os.killpg(self.process.pid, 9)
            except (ProcessLookupError, PermissionError):
                self.process.kill()
            self.process.join(10)
        self.process = None


def race(
    lanes: dict[str, Lane],
    rounds: int,
    seconds: float,
    timeout: float = 600.0,
    advance: Callable[[int], Any] = lambda turns: None,
) -> dict[str, Answer]:
    """Two passes of ``rounds`` rounds over lanes that are prepared, ``seconds`` a turn: a :class:`Summary` each, or why not.

    Each round begins with another lane, so that none always follows the same one, whose threads may still be spinning.
    ``advance`` is called with 1 after each turn.
    """
    passes: dict[str, list[list[float]]] = {name: [[], []] for name in lanes}
    lost: dict[str, Answer] = {}
    order = list(lanes)
    for number in range(2):
        for _ in range(rounds):
            order.append(order.pop(0))
            for name in order:
                if name not in lost:
                    answer = lanes[name].ask(timeout, "burst", seconds)
                    if answer.status == "ok":
                        passes[name][number] += answer.value
                    else:
                        lost[name] = answer
                advance(1)
    return {name: lost.get(name) or Answer("ok", summarize(passes[name])) for name in lanes}


def _serve(connection: Connection, log: str) -> None:
    """What a lane's process runs: one request after another until its pipe closes."""
    os.setpgrp()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_grad_enabled(False)
    timer: Timer | None = None
    while True:
        try:
            request, arguments = connection.recv()
        except EOFError:
            return
        try:
            if request == "prepare":
                timer = None
                _release()
                timer = arguments[0](*arguments[1:])
                facts = None if timer is None else {"sets": timer.sets, "peak_bytes": timer.peak_bytes, **timer.facts}
                answer = Answer("ok", facts)
            elif request == "burst":
                assert timer is not None
                answer = Answer("ok", timer.burst(*arguments))
            else:
                timer = None
                _release()
                answer = Answer("ok", None)
        except Refused as error:
            timer, answer = None, Answer("refused", str(error))
        except Skipped as error:
            timer, answer = None, Answer("skipped", str(error))
        except Exception as error:
            traceback.print_exc()
            timer, answer = None, Answer("failed", f"{type(error).__name__}: {str(error)[:400]}")
        connection.send(answer)
        if answer.status == "failed" and torch.cuda.is_initialized() and _context_is_dead():
            os._exit(1)


def _release() -> None:
    """Forget the last entrant: its memory and what was compiled for it."""
    torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _context_is_dead() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def held(device: str) -> int:
    """Bytes of memory that this process has: on the CPU what is resident, on a GPU what PyTorch keeps of it."""
    _give_back(device)
    return torch.cuda.memory_reserved() if device == "cuda" else resident("VmRSS")


def peak(call: Callable[[], Any], device: str) -> int:
    """Bytes of memory that this process has at most, as :func:`held` counts them, while ``call`` runs."""
    _give_back(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_reserved()
    resident("VmRSS", reset=True)
    call()
    return resident("VmHWM")


def _give_back(device: str) -> None:
    """Memory that is free goes back to where it came from: what a call needs of it is then counted as the call's."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def resident(field: str, reset: bool = False) -> int:
    """Bytes of this process in memory, now ("VmRSS") or at most since the last reset ("VmHWM"); 0 where Linux does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)
