"""What is measured, and by whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from effnet_fast.benchmark.roofline import Launch
from effnet_fast.benchmark.timing import Timer

CHECKED = 16  # images of a batch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A peer less accurate than plain PyTorch is timed all the same, which flatters it, not us: torch.compile's mean adds up one number
# after another and was seen 18 times as far off as eager's.
PEER_FACTOR = 32.0


@dataclass(frozen=True)
class Case:
    """One op on one shape, or one net: ``batch`` images of ``dtype`` on ``device``.

    group      the op, or the net: what the report's lines are about
    nets       those that have this shape, or the net itself
    launch     the op's launch, of an op
    net, size  the name in effnet_fast.models and the side of the images, of a net
    weights    a file with the net's weights and the right answer; written before entrants are prepared
    """

    name: str
    group: str
    nets: tuple[str, ...]
    batch: int
    dtype: str
    device: str
    launch: Launch | None = None
    net: str = ""
    size: int = 0
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
    groups  likewise
    beside  on a GPU it may be prepared while others are: it compiles and chooses nothing by timing it, as autotuning does
    quick   whether it also runs with --quick
    least   images of the smallest batch that it takes
    peer    what it is of, as ``effnet-fast bench --peers`` has it; "" for ours and eager PyTorch
    """

    name: str
    prepare: Callable[..., Timer]
    arguments: tuple = ()
    nets: tuple[str, ...] | None = None
    beside: bool = False
    quick: bool = True
    least: int = 1
    peer: str = ""
    groups: tuple[str, ...] | None = None

    def takes(self, case: Case) -> bool:
        chosen = self.nets is None or any(net in self.nets for net in case.nets)
        return chosen and case.batch >= self.least and (self.groups is None or case.group in self.groups)


def is_ours(name: str) -> bool:
    """Of an entrant, by its name: as files of timings tell."""
    return name.startswith(("ours", "accelerated"))
