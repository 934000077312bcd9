"""One case and its entrants: prepared in processes of their own, raced, and what came of each."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from effnet_fast.benchmark.case import Case, Entrant
from effnet_fast.benchmark.timing import Answer, Lane, Summary, race

PREPARE_SECONDS = 900.0  # a large net's max-autotune
NO_TIME = Answer("skipped", "no time was left")


class Clock:
    """How much of the ``seconds`` that the run may take is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


@contextlib.contextmanager
def lanes_of(names: list[str], beside: Path) -> Iterator[dict[str, Lane]]:
    """A lane for each name and one for "weights". What they print goes to files beside ``beside``; empty ones are removed."""
    lanes = {name: Lane(beside.with_suffix(f".{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log")) for name in [*names, "weights"]}
    patience = 0.0  # where the race is broken off
    try:
        yield lanes
        patience = 3.0
    finally:
        for lane in lanes.values():
            lane.stop(patience)
            if lane.log.exists() and not lane.log.stat().st_size:
                lane.log.unlink()


def outcomes(
    case: Case,
    chosen: list[Entrant],
    lanes: dict[str, Lane],
    clock: Clock,
    turns: tuple[int, float],
    write_weights: Callable[[Case], None] | None,
    advance: Callable[[int], Any] = lambda steps: None,
) -> dict[str, dict[str, Any]]:
    """Prepare the entrants in their order, race those that are ready; of each its times, or why there are none.

    On a GPU neighbours that may be are prepared at once. Where the clock's time is short, who would take more than leaves enough
    for the race of the others is given up.

    turns          rounds of a pass and seconds of a turn
    write_weights  writes ``case.weights`` if it is not there
    advance        called with the steps done, of :func:`steps` in all
    """
    answers: dict[str, Answer] = {}
    for entrant in chosen:  # start the processes, all at once
        lanes[entrant.name].send("release")
    for entrant in chosen:
        lanes[entrant.name].answer(120)
    if write_weights is not None and not Path(case.weights).exists() and clock.left > 0:
        made = lanes["weights"].ask(min(PREPARE_SECONDS, clock.left), "prepare", write_weights, case)
        lanes["weights"].stop()
        if made.status != "ok":
            answers = {entrant.name: Answer(made.status, f"no weights to compare with: {made.value}") for entrant in chosen}
    waiting = [entrant for entrant in chosen if entrant.name not in answers]
    racing = 2 * steps(chosen, turns[0]) * turns[1]  # twice, as a turn of a slow call is longer
    for group in _groups(waiting, case.device):
        if clock.left <= racing:
            answers |= {entrant.name: NO_TIME for entrant in group}
            continue
        for entrant in group:
            lanes[entrant.name].send("prepare", entrant.prepare, case, *entrant.arguments)
        for entrant in group:
            answer = lanes[entrant.name].answer(min(PREPARE_SECONDS, clock.left - racing))
            answers[entrant.name] = NO_TIME if answer.status == "late" and clock.left <= racing else answer
            advance(1)
    ready = {name: lanes[name] for name, answer in answers.items() if answer.status == "ok"}
    raced = race(ready, *turns, advance=advance) if ready and clock.left > 0 else dict.fromkeys(ready, NO_TIME)
    for entrant in chosen:  # so that the next case finds the memory free
        lane = lanes[entrant.name]
        if write_weights is not None and case.device == "cpu":  # and what malloc keeps is not taken for a net's
            lane.stop()
        elif lane.process is not None:
            lane.ask(60, "release")
    return {entrant.name: _outcome(answers[entrant.name], raced.get(entrant.name)) for entrant in chosen}


def _groups(entrants: list[Entrant], device: str) -> list[list[Entrant]]:
    """Who is prepared at once."""
    groups: list[list[Entrant]] = []
    for entrant in entrants:
        if groups and device == "cuda" and entrant.beside and groups[-1][-1].beside:
            groups[-1].append(entrant)
        else:
            groups.append([entrant])
    return groups


def steps(chosen: list[Entrant], rounds: int) -> int:
    """Of a case in :func:`outcomes`, if all its entrants can be timed."""
    return len(chosen) * (1 + 2 * rounds)


def _outcome(prepared: Answer, raced: Answer | None) -> dict[str, Any]:
    if raced is None or raced.status != "ok":
        lost = raced or prepared
        return {"status": "failed" if lost.status == "late" else lost.status, "reason": lost.value}
    times: Summary = raced.value
    return {
        "status": "timed",
        "median_us": times.median * 1e6,
        "passes_us": [median * 1e6 for median in times.passes],
        "quartiles_us": [quarter * 1e6 for quarter in times.quartiles],
        "calls": times.calls,
        **prepared.value,
    }
