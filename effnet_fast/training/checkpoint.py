"""The file that a run goes on from: written whole or not at all, and refused by another run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnet_fast.settings import differing, plain
from effnet_fast.training import distributed
from effnet_fast.training.loop import Trainer
from effnet_fast.training.recipes import Recipe
from effnet_fast.weights.files import locate, whole

History = list[dict[str, float]]


def save(path: Path, trainer: Trainer, history: History, same: Mapping[str, Any]) -> None:
    """Write, in the first process, all that :func:`load` wants. Every process calls this."""
    state = trainer.state_dict()
    if distributed.rank() == 0:
        with whole(path) as aside:
            torch.save({**state, "history": history, "run": _run(trainer, same)}, aside)
    distributed.barrier()


def load(path: str | os.PathLike[str], trainer: Trainer, same: Mapping[str, Any]) -> History:
    """Put the trainer where :func:`save` found one; returns the history. It is the same for any number of loading workers.

    Raises FileNotFoundError, and ValueError that names what differs where the file is no such checkpoint, or one of another model,
    recipe, data set or number of processes.
    """
    path = locate(path)
    try:
        content = torch.load(path, map_location=trainer.device, weights_only=True)
    except Exception as error:  # an unpickler raises whatever garbage makes it raise
        raise ValueError(f"{path} is damaged or no checkpoint of a run") from error
    if not isinstance(content, dict) or not {"run", "history", "optimizer", "state_dict"} <= content.keys():
        raise ValueError(f"{path} holds no run to go on with; the last.pth of one would do")
    there = plain(Recipe()) | content["run"]  # a setting that came after that run had its default
    if told := differing(there, _run(trainer, same)):
        raise ValueError(f"{path} is of a run with {told}; the same would do")
    trainer.load_state_dict(content)
    return content["history"]


def _run(trainer: Trainer, same: Mapping[str, Any]) -> dict[str, Any]:
    """What two processes must agree on to be of one run, as plain values."""
    return {
        "model": _describe(trainer.model),
        "images": len(trainer.batches.dataset),
        "processes": distributed.processes(),
        **plain(trainer.recipe),
        **same,
    }


def _describe(model: nn.Module) -> str:
    """One line that is another for another net: its class and size, and of ours what the weights do not show."""
    config = getattr(model, "config", None)
    settings = [f"{name} {getattr(config, name)}" for name in ("name", "num_classes", "padding", "bn_eps", "drop_path") if config]
    settings += [f"dropout {model.drop_rate}"] if hasattr(model, "drop_rate") else []
    return ", ".join([type(model).__name__, f"{sum(p.numel() for p in model.parameters()):,} parameters", *settings])
