"""A short real training run as the accuracy of a scaled net, for :mod:`effnet_fast.scaling`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from effnet_fast.models import build
from effnet_fast.scaling import ScaledNet
from effnet_fast.scaling.config import is_whole
from effnet_fast.training.batches import Batches
from effnet_fast.training.loop import Augment, Trainer, evaluate
from effnet_fast.training.recipes import Recipe


@dataclass(frozen=True)
class Trial:
    """``trial(net)`` trains the net from scratch with each seed and returns the mean share of held-out images that it gets right.

    It follows from the net alone, to the last bit on one machine, whatever runs beside it: on the CPU, by one thread. It can be
    pickled where ``data`` and ``augment`` are functions of modules.

    data      of an image side in pixels: the data sets to train on and to judge by, of items (x [C, side, side], label)
    recipe    of each run but for its seed
    seeds     one or more, each once
    settings  of the net, such as in_channels and num_classes

    Raises ValueError for other seeds.
    """

    data: Callable[[int], tuple[Any, Any]]
    recipe: Recipe
    seeds: tuple[int, ...] = (0,)
    augment: Augment | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        seeds = self.seeds
        if not isinstance(seeds, tuple) or not all(is_whole(seed, 0) for seed in seeds) or not 0 < len(seeds) == len(set(seeds)):
            raise ValueError(f"Trial: seeds is {seeds!r}; a tuple of one or more whole numbers >= 0, each once, would do")

    def __call__(self, net: ScaledNet) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            scores = [self._trained(net, seed) for seed in self.seeds]
        finally:
            torch.set_num_threads(threads)
        return sum(scores) / len(scores)

    def _trained(self, net: ScaledNet, seed: int) -> float:
        config, recipe = replace(net.config, **dict(self.settings)), replace(self.recipe, seed=seed)
        seen, held_out = self.data(config.resolution)
        torch.manual_seed(seed)
        trainer = Trainer(
            build(config),
            recipe,
            Batches(seen, recipe.batch_size, training=True, seed=seed),
            augment=self.augment,
        )
        while trainer.epoch < recipe.epochs:
            for _ in trainer.run_epoch():
                pass
            trainer.end_epoch()
        return evaluate(trainer.judged, Batches(held_out, 256, training=False).of_epoch(0)).top1
