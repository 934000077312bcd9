"""What is measured, and by whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from effnet_fast.benchmark.roofline import Launch
from effnet_fast.benchmark.timing import Timer

CHECKED = 16  # images of a batch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One op on one shape, or one net at its own resolution: ``batch`` images of ``dtype`` on ``device``.

    group    the op, or the net: what the report's lines are about
    nets     those that have this shape, or the net itself
    launch   the op's launch, for the kernel suite
    weights  a file with the net's weights and its float64 answer, for the model suite; written before entrants are prepared
    """

    name: str
    group: str
    nets: tuple[str, ...]
    batch: int
    dtype: str
    device: str
    launch: Launch | None = None
    weights: str = ""

    @property
    def shape(self) -> dict[str, int]:
        assert self.launch is not None
        return dict(self.launch.shape)

    @property
    def checked(self) -> list[int]:
        """The images that are held to float64: all of a batch up to CHECKED, else so many, evenly spaced from first to last."""
        count = min(self.batch, CHECKED)
        return [i * (self.batch - 1) // max(1, count - 1) for i in range(count)]


@dataclass(frozen=True)
class Entrant:
    """``prepare(case, *arguments)`` runs in the entrant's own process: it checks the result and gives the timer.

    nets    the nets on whose cases it runs, None for all: compiling every shape of eight nets would take hours
    beside  on a GPU it may be prepared while others are: it compiles and chooses nothing by timing it, as autotuning does
    quick   whether it also runs with --quick
    """

    name: str
    prepare: Callable[..., Timer]
    arguments: tuple = ()
    nets: tuple[str, ...] | None = None
    beside: bool = False
    quick: bool = True

    def takes(self, case: Case) -> bool:
        return self.nets is None or any(net in self.nets for net in case.nets)
