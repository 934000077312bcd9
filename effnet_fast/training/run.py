"""A whole run: epochs, scores, files, and a stop that loses nothing."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.training import checkpoint, distributed
from effnet_fast.training.batches import Batches
from effnet_fast.training.checkpoint import History
from effnet_fast.training.log import draw_curves, write_csv
from effnet_fast.training.loop import Augment, Trainer, evaluate
from effnet_fast.training.recipes import Recipe
from effnet_fast.weights.files import locate, sweep

LAST, LOG, CURVES = "last.pth", "log.csv", "curves.png"
_ASK_EVERY = 8  # batches: whether the loss is finite, and over NCCL whether to stop; both wait for the device


class Stopped(Exception):
    """Training was asked by ``signal`` to stop, and has saved what it needs to go on."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {path} is where it can go on from")
        self.signal, self.path = number, path


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    validation: Batches | None = None,
    augment: Augment | None = None,
    teacher: nn.Module | None = None,
    device: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    same: Mapping[str, Any] | None = None,
    after_epoch: Callable[[nn.Module, History], None] | None = None,
    log_interval: int = 0,
) -> History:
    """Train a classifier in place; returns for each epoch its number, learning rate, losses, accuracies (shares) and seconds.

    model, batches, augment, teacher, device   as :class:`effnet_fast.training.loop.Trainer` takes them
    validation   held-out batches, scored after every epoch
    out          a folder for ``last.pth``, from which a run goes on, ``log.csv`` and ``curves.png``; each is replaced whole. A
                 SIGTERM or SIGINT then ends the run after the step or held-out batch it is at, with ``last.pth`` written, by
                 raising Stopped
    resume       a ``last.pth``, or its folder: go on where it stopped, also within an epoch: on a CPU as if it had not, to the last
                 bit
    same         what else a resumed run must have in common, as plain values by name
    after_epoch  called in the first process with the model that is judged (the average where there is one) and the history
    log_interval  steps of an epoch between lines on stderr with its mean loss so far; 0: one line an epoch

    With ``torchrun`` and a process group every process calls this with batches of its own; the first writes. Progress is told on
    stderr. Raises ValueError for a loss that is not finite, an ``out`` that holds another run, and what resuming finds wrong.
    """
    from tqdm import tqdm

    folder, first, same = None if out is None else Path(out), distributed.rank() == 0, same or {}
    begun = None if resume is None else locate(resume, LAST)
    if folder is not None:
        if (folder / LAST).exists() and (begun is None or not begun.samefile(folder / LAST)):
            raise ValueError(f"{folder} holds a run already; to resume from its {LAST}, or another folder, would do")
        importlib.import_module("matplotlib.figure")  # what the curves will want: missing, it is told before any work
    trainer = Trainer(model, recipe, batches, augment=augment, teacher=teacher, device=device)
    history = [] if begun is None else checkpoint.load(begun, trainer, same)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if first:
            sweep(folder)
    every = max(1, _ASK_EVERY // recipe.grad_accum_steps)
    done = trainer.epoch * trainer.steps + trainer.step
    bar = tqdm(
        total=recipe.epochs * trainer.steps, initial=done, unit="step", disable=None if first else True, leave=False, delay=2
    )
    with bar, _signals(folder is not None) as caught:
        while trainer.epoch < recipe.epochs:
            started = time.perf_counter()
            for _ in trainer.run_epoch():
                bar.update()
                told = log_interval > 0 and trainer.step % log_interval == 0
                if told or trainer.step % every == 0:
                    total = trainer.finite_total()
                    if told and first:
                        bar.write(_step_line(trainer, total / (trainer.step * distributed.processes())), file=sys.stderr)
                if folder is not None and trainer.step < trainer.steps and (number := _agreed(caught, trainer.step, every)):
                    checkpoint.save(folder / LAST, trainer, history, same)
                    raise Stopped(number, folder / LAST)
            if folder is not None and validation is not None:
                checkpoint.save(folder / LAST, trainer, history, same)
            row = {"epoch": trainer.epoch + 1, "lr": trainer.lr}
            row["train_loss"] = trainer.end_epoch()
            if validation is not None:
                held_out = tqdm(
                    _till_stopped(validation, caught, folder),
                    "held out",
                    len(validation),
                    unit="batch",
                    disable=bar.disable,
                    leave=False,
                    delay=2,
                )
                with trainer.autocast(), held_out:
                    scores = evaluate(trainer.judged, held_out, trainer.device)
                shares = {"top1": scores.top1, "top5": scores.top5}
                row |= {"loss": scores.loss, **{name: share for name, share in shares.items() if share is not None}}
            history.append({**row, "seconds": time.perf_counter() - started})
            if first:
                bar.write(_line(history[-1], recipe.epochs), file=sys.stderr)
            if first and after_epoch is not None:
                after_epoch(trainer.judged, history)
            if folder is not None:
                checkpoint.save(folder / LAST, trainer, history, same)
                if first:
                    write_csv(history, folder / LOG)
                    draw_curves(history, folder / CURVES)
                if trainer.epoch < recipe.epochs and (number := _agreed(caught)):
                    raise Stopped(number, folder / LAST)
    return history


def _till_stopped(batches: Batches, caught: list[int], folder: Path | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out batches; before each that every process has, over NCCL before some, they ask whether to stop."""
    shared = -(-(len(batches.dataset) // distributed.processes()) // batches.batch_size)
    for number, batch in enumerate(batches.of_epoch(0)):
        if folder is not None and number < shared and (stop := _agreed(caught, number, _ASK_EVERY)):
            raise Stopped(stop, folder / LAST)
        yield batch


@contextmanager
def _signals(wanted: bool) -> Iterator[list[int]]:
    """SIGTERM and SIGINT into a list; the second one has its usual effect. Only a main thread is told of signals."""
    caught: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()


def _agreed(caught: list[int], step: int = 0, every: int = 1) -> int:
    """The signal to stop by, or 0; all processes get the same answer, at the same step: over NCCL at each ``every`` steps.

    Others wait for no device, and have slow ones: torchrun ends what has not stopped half a minute after a SIGTERM.
    """
    if distributed.processes() == 1:
        return caught[0] if caught else 0
    waits = torch.distributed.get_backend() == "nccl"
    if waits and step % every:
        return 0
    number = torch.tensor(caught[0] if caught else 0, device=torch.device("cuda", torch.cuda.current_device()) if waits else "cpu")
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


def _step_line(trainer: Trainer, mean: float) -> str:
    place = f"epoch {trainer.epoch + 1} of {trainer.recipe.epochs}, step {trainer.step} of {trainer.steps}"
    return f"{place}: training loss {mean:.3f}, learning rate {trainer.lr:.3g}"


def _line(row: dict[str, float], epochs: int) -> str:
    told = f"epoch {row['epoch']:.0f} of {epochs}: training loss {row['train_loss']:.3f}"
    return told + (f", held out: loss {row['loss']:.3f}, {100 * row['top1']:.2f} % right" if "top1" in row else "")
