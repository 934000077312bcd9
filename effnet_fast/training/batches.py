"""Batches whose order and augmentation depend on nothing but (seed, epoch, index): a resumed run meets the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from effnet_fast.training import distributed


def seed_of(*numbers: int) -> int:
    """A seed for torch's generators from whole numbers >= 0, as unlike its neighbours' as any other."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class _Seeded(Dataset):
    """Items under (epoch, index); what draws from torch's generator on the way draws the same for the same pair."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, *key))
            return self.dataset[key[1]]


class Batches:
    """The batches (x [B, ...], y [B]) of a data set that is asked for items by number.

    dataset     with ``len`` and items (x, y); its transforms may draw from torch's generator
    batch_size  of each process
    training    in an order drawn for each epoch, without the images that fill no batch of all processes; else all images in
                order, each in one process
    workers     that load ahead; they change nothing but the speed

    Raises ValueError where the images fill no batch.
    """

    def __init__(self, dataset: Any, batch_size: int, *, training: bool, seed: int = 0, workers: int = 0) -> None:
        self.dataset, self.batch_size, self.training, self.seed = dataset, batch_size, training, seed
        self._epoch, self._first = 0, 0
        if len(self) == 0 and distributed.rank() == 0:
            wanted = batch_size * distributed.processes() if training else 1
            raise ValueError(f"the {len(dataset)} images fill no batch of {wanted}; a smaller batch_size or more images would do")
        self._loader: DataLoader = DataLoader(
            _Seeded(dataset, seed),
            batch_sampler=self,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        if self.training:
            return len(self.dataset) // (self.batch_size * distributed.processes())
        return -(-len(self._share(np.arange(len(self.dataset)))) // self.batch_size)

    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from number ``first`` on."""
        self._epoch, self._first = epoch, first
        return iter(self._loader)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """What the loader is to fetch: the keys of each batch."""
        if not self.training:
            share = self._share(np.arange(len(self.dataset)))
            batches = [share[at : at + self.batch_size] for at in range(0, len(share), self.batch_size)]
        else:
            order = np.random.default_rng(seed_of(self.seed, self._epoch)).permutation(len(self.dataset))
            size = self.batch_size * distributed.processes()
            mine = slice(distributed.rank() * self.batch_size, (distributed.rank() + 1) * self.batch_size)
            batches = [order[at * size : (at + 1) * size][mine] for at in range(len(self))]
        for batch in batches[self._first :]:
            yield [(self._epoch, int(index)) for index in batch]

    @staticmethod
    def _share(indices: np.ndarray) -> np.ndarray:
        return indices[distributed.rank() :: distributed.processes()]
