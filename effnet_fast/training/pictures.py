"""Small images in memory for the laboratory: CIFAR-10 where its files are, else scikit-learn's scanned digits, made as large."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.training.batches import Batches, seed_of
from effnet_fast.training.data import open_dataset
from effnet_fast.training.recipes import Recipe

HELD_OUT = 360  # digits
SIDE = 32
_CIFAR10, _USUAL = "cifar-10-batches-py", ("data", ".", "cifar10")
_AT_ONCE = 4096  # images that are resized together


class Digits(NamedTuple):
    """Scans [N, 8, 8] uint8, their digits [N], and which of them are trained on and held out (the same share of each digit)."""

    scans: np.ndarray
    digits: np.ndarray
    train: np.ndarray
    held_out: np.ndarray


def load_digits() -> Digits:
    """The 1797 scans, grey values 0 to 16 made 0 to 255; the split is always the same."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    values, digits = load(return_X_y=True)
    scans = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, held_out = train_test_split(np.arange(len(digits)), test_size=HELD_OUT, stratify=digits, random_state=0)
    return Digits(scans, digits, np.sort(train), np.sort(held_out))


class _Normalised:
    """Items (x [3, H, W] float32, label) of images [N, 3, H, W] uint8."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> None:
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (self.images[index] / 255 - self.mean) / self.std, self.labels[index]


@dataclass(frozen=True)
class Pictures:
    """Images [N, 3, 32, 32] uint8 and labels [N] to learn from, and those held out.

    name      what they are, in words
    mirrored  a mirrored image is as good
    """

    name: str
    seen: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    mirrored: bool

    def batches(self, side: int, recipe: Recipe) -> tuple[Batches, Batches]:
        """Of images resized to ``side`` pixels and normalised by those learnt from: to learn from, and to be judged by."""
        seen = self.seen[0] / 255
        mean, std = (seen.mean((0, 2, 3)).view(3, 1, 1), seen.std((0, 2, 3)).view(3, 1, 1))
        made = [_Normalised(_resized(images, side), labels, mean, std) for images, labels in (self.seen, self.held_out)]
        settings = {"batch_size": recipe.batch_size, "seed": recipe.seed}
        return Batches(made[0], training=True, **settings), Batches(made[1], training=False, **settings)

    def augment(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Each image moved by up to an eighth of its side, zeros behind it, and mirrored by chance where that is as good."""
        images, _, height, width = x.shape
        reach = height // 8
        padded = F.pad(x, (reach,) * 4)
        down, right = torch.randint(0, 2 * reach + 1, (2, images, 1), device=x.device)
        rows, columns = down + torch.arange(height, device=x.device), right + torch.arange(width, device=x.device)
        if self.mirrored:
            turned = torch.rand(images, 1, device=x.device) < 0.5
            columns = torch.where(turned, columns.flip(1), columns)
        every = torch.arange(images, device=x.device)[:, None, None]
        return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2), y


def load_pictures(path: str | os.PathLike[str] | None = None, images: int | None = None, seed: int = 0) -> Pictures:
    """CIFAR-10 from what torchvision calls its root, or from a usual place; where it is in none, the digits.

    path    None: ``data``, the working directory, or ``cifar10``
    images  at most so many to learn from, and to be judged by, drawn by ``seed``; None: all

    Raises FileNotFoundError or ValueError where ``path`` does not hold CIFAR-10, ImportError without torchvision or scikit-learn.
    """
    root = path if path is not None else next((place for place in _USUAL if (Path(place) / _CIFAR10).is_dir()), None)
    if root is None:
        scans, digits, *parts = load_digits()
        pixels = _resized(torch.from_numpy(scans)[:, None].expand(-1, 3, -1, -1), SIDE)
        splits = [(pixels[part], torch.from_numpy(digits[part])) for part in parts]
        name = "scikit-learn's digits"
    else:
        opened = [open_dataset(root, kind="cifar10", training=training) for training in (True, False)]
        splits = [(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in opened]
        name = "CIFAR-10"
    drawn = []
    for number, (x, y) in enumerate(splits):
        chosen = np.random.default_rng(seed_of(seed, number)).permutation(len(x))[:images]
        drawn.append((x[chosen], y[chosen]))
    return Pictures(
        f"{name} ({len(drawn[0][0]):,} images, {len(drawn[1][0]):,} held out)", drawn[0], drawn[1], mirrored=root is not None
    )


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    made = [
        F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True).round_().to(torch.uint8)
        for part in images.split(_AT_ONCE)
    ]
    return torch.cat(made)
