"""Images to train on and to be judged by: torchvision's data sets and augmentations, prepared as the network's weights want them.

Needs torchvision and Pillow, when they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.inference.images import EXTENSIONS, prepare, read_image
from effnet_fast.training.loop import Augment
from effnet_fast.training.policies import policy
from effnet_fast.training.recipes import Recipe
from effnet_fast.weights.preprocessing import Preprocessing

# Folders of one folder for each class have these names; else the class in torchvision.datasets, and how its splits are asked for:
# the first to train on, the second held out.
TRAIN_FOLDERS, HELD_OUT_FOLDERS = ("train",), ("val", "validation", "test")
_CIFAR = {"train": {"train": True}, "test": {"train": False}}
_TORCHVISION: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", _CIFAR),
    "cifar100": ("CIFAR100", _CIFAR),
    "flowers102": ("Flowers102", {name: {"split": name} for name in ("train", "val", "test")}),
    "stanford_cars": ("StanfordCars", {name: {"split": name} for name in ("train", "test")}),
}
DATASETS = ("folder", *_TORCHVISION)
Transform = Callable[[Any], Tensor]


class Images:
    """A data set's images through a transform: items (x [C, H, W] float32, label)."""

    def __init__(self, dataset: Any, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


def open_dataset(
    path: str | os.PathLike[str], *, training: bool, kind: str = "folder", split: str | None = None, download: bool = False
) -> Any:
    """One split of a data set on the disk, as torchvision's object: items (RGB image, label), and ``classes``, their names.

    path      "folder": a directory with ``train`` and ``val`` (or ``validation``, ``test``) of one directory of images a class;
              held out may be that directory itself. Else what torchvision calls root
    kind      one of ``DATASETS``
    split     in place of those: the directory in a "folder", else torchvision's name of a split
    download  fetch it where it is not there, as torchvision does (not Stanford Cars, whose server is gone)

    Raises FileNotFoundError or ValueError that says what is missing.
    """
    if kind not in DATASETS:
        raise ValueError(f"dataset is {kind!r}; one of {', '.join(DATASETS)} would do")
    root = Path(path)
    if not root.is_dir() and not download:
        raise FileNotFoundError(f"{root} is no directory; one that holds the data set would do")
    from torchvision import datasets

    if kind == "folder":
        folder = _split(root, training, split)
        try:
            return datasets.ImageFolder(folder, loader=read_image, is_valid_file=_is_image)
        except FileNotFoundError as error:
            raise ValueError(f"{folder} is no directory of one directory of images for each class: {error}") from error
    name, splits = _TORCHVISION[kind]
    split = list(splits)[0 if training else 1] if split is None else split
    if split not in splits:
        raise ValueError(f"the split is {split!r}; {' or '.join(splits)}, which {kind} has, would do")
    try:
        return getattr(datasets, name)(str(root), download=download, **splits[split])
    except RuntimeError as error:
        raise ValueError(f"{root} does not hold {kind} as torchvision's {name} wants it: {error}") from error


def _split(root: Path, training: bool, split: str | None) -> Path:
    names = (split,) if split else TRAIN_FOLDERS if training else HELD_OUT_FOLDERS
    for name in names:
        if (root / name).is_dir():
            return root / name
    if split or training or any((root / name).is_dir() for name in TRAIN_FOLDERS):
        raise FileNotFoundError(f"{root} has no directory {' or '.join(names)}, of one directory of images for each class")
    return root


def _is_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def held_out_transform(preprocessing: Preprocessing) -> Transform:
    """An image as ``predict`` prepares it: [C, crop, crop] float32."""
    return partial(_prepared, preprocessing=preprocessing)


def _prepared(image: Any, preprocessing: Preprocessing) -> Tensor:
    return torch.from_numpy(prepare(image, preprocessing))


def training_transform(recipe: Recipe, preprocessing: Preprocessing) -> Transform:
    """A random crop, mirrored, augmented and normalised, with a part erased, as the recipe says: [C, crop, crop] float32.

    All chance comes from torch's generator.
    """
    from torchvision.transforms import v2

    interpolation = v2.InterpolationMode(preprocessing.interpolation)
    jitter = recipe.color_jitter
    steps = [
        v2.RandomResizedCrop(preprocessing.crop, recipe.scale, recipe.ratio, interpolation=interpolation),
        v2.RandomHorizontalFlip(recipe.hflip),
    ]
    steps += [v2.RandomVerticalFlip(recipe.vflip)] if recipe.vflip else []
    steps += policy(recipe.aa, [round(255 * mean) for mean in preprocessing.mean], interpolation)
    steps += [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocessing.mean, preprocessing.std)]
    steps += [v2.RandomErasing(recipe.reprob, value="random" if recipe.remode == "pixel" else 0)] if recipe.reprob else []
    return v2.Compose(steps)


def mixing(recipe: Recipe, classes: int) -> Augment | None:
    """MixUp (arXiv 1710.09412), CutMix (1905.04899), or either by chance; the labels become shares [N, classes]."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    from torchvision.transforms import v2

    kinds: list[Any] = [v2.MixUp(alpha=recipe.mixup, num_classes=classes)] if recipe.mixup else []
    kinds += [v2.CutMix(alpha=recipe.cutmix, num_classes=classes)] if recipe.cutmix else []
    mixed = v2.RandomChoice(kinds, [1 - recipe.mixup_switch_prob, recipe.mixup_switch_prob] if len(kinds) == 2 else None)
    if recipe.mixup_prob == 1:
        return mixed

    def by_chance(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return mixed(x, y) if float(torch.rand(())) < recipe.mixup_prob else (x, F.one_hot(y, classes).float())

    return by_chance


def check_classes(classes: Sequence[str], others: Sequence[str]) -> None:
    """ValueError where held-out images have other classes than those trained on: labels would mean something else."""
    if list(classes) != list(others):
        differing = sorted({*classes} ^ {*others}) or ["their order"]
        raise ValueError(f"training and held-out images have different classes: {', '.join(map(str, differing[:5]))}")
