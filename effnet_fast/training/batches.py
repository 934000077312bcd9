"""Batches whose order and augmentation depend on nothing but (seed, epoch, index): a resumed run meets the same ones."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from effnet_fast.training import distributed


def seed_of(*numbers: int) -> int:
    """A seed for torch's generators from whole numbers >= 0, as unlike its neighbours' as any other."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class _Seeded(Dataset):
    """Items under (epoch, index); what draws from torch's generator on the way draws the same for the same pair.

    An item that cannot be had is its error, which a worker of the loader would wrap in a traceback.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, *key))
            try:
                return self.dataset[key[1]]
            except (ValueError, OSError) as error:
                return error


def _collated(items: list[Any]) -> Any:
    """The batch, or the first error among its items."""
    return next((item for item in items if isinstance(item, Exception)), None) or default_collate(items)


def _outlive_a_signal(worker: int) -> None:
    """A signal to the whole process group leaves a worker loading, for the run to save; the next, such as the loader's, ends it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


class _Keys:
    """What the loader is to fetch: the (epoch, index) pairs of each batch of this process, from number ``first`` on."""

    def __init__(self, images: int, batch_size: int, training: bool, seed: int) -> None:
        self.images, self.batch_size, self.training, self.seed = images, batch_size, training, seed
        self.rank, self.processes = distributed.rank(), distributed.processes()
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        if self.training:
            return self.images // (self.batch_size * self.processes)
        return -(-len(range(self.rank, self.images, self.processes)) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.training:
            order = np.random.default_rng(seed_of(self.seed, self.epoch)).permutation(self.images)
            size, at = self.batch_size * self.processes, self.rank * self.batch_size
        else:
            order = np.arange(self.rank, self.images, self.processes)
            size, at = self.batch_size, 0
        for number in range(self.first, len(self)):
            start = number * size + at
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


class Batches:
    """The batches (x [B, ...], y [B]) of a data set that is asked for items by number.

    dataset     with ``len`` and items (x, y); its transforms may draw from torch's generator
    batch_size  of each process
    training    in an order drawn for each epoch, without the images that fill no batch of all processes; else all images in
                order, each in one process
    workers     that load ahead; they change nothing but the speed

    Raises ValueError where the images fill no batch. A ValueError or OSError of an item, such as a damaged file, is raised with its
    batch, as it is also where a worker had it.
    """

    def __init__(self, dataset: Any, batch_size: int, *, training: bool, seed: int = 0, workers: int = 0) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self._keys = _Keys(len(dataset), batch_size, training, seed)
        least = batch_size * distributed.processes() if training else 1
        if len(dataset) < least:
            raise ValueError(f"the {len(dataset)} images fill no batch of {least}; a smaller batch_size or more images would do")
        self._loader: DataLoader = DataLoader(
            _Seeded(dataset, seed),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_collated,
            worker_init_fn=_outlive_a_signal,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return len(self._keys)

    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from number ``first`` on."""
        self._keys.epoch, self._keys.first = epoch, first
        for batch in self._loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch
