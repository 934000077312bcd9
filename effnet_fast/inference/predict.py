"""Batched prediction: images from files to labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from effnet_fast.inference.images import read_image, resize_and_crop
from effnet_fast.inference.optimize import InferenceModel, optimize_for_inference
from effnet_fast.inference.pixels import scale_and_shift
from effnet_fast.weights.preprocessing import Preprocessing

_READERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Label:
    """A class, its name where one is known, and its probability (softmax)."""

    index: int
    name: str | None
    probability: float


class Prediction(NamedTuple):
    """The most probable labels of an image, best first."""

    path: Path
    labels: tuple[Label, ...]


def predict(
    model: nn.Module,
    paths: Sequence[str | os.PathLike[str]],
    preprocessing: Preprocessing,
    *,
    top: int = 5,
    batch: int = 16,
    channels: int = 3,
    classes: Sequence[str] | None = None,
    unreadable: Callable[[Exception], None] | None = None,
) -> Iterator[Prediction]:
    """Classify image files in order, ``batch`` at a time, on the model's device and in its dtype.

    model       a classifier in eval mode, which :func:`optimize_for_inference` takes, or what that has made of one:
                [N, channels, H, W] -> logits [N, K]
    top         labels for each image, at most K
    channels    of the images and of the model: 3 (RGB) or 1 (greyscale)
    classes     K names
    unreadable  called with the error of a file that cannot be decoded, which is then left out; by default the error is raised

    Threads decode the next batch while the network's frozen copy runs, which is given the images as they are decoded. Raises
    ValueError for a model in training mode, a copy that normalises by other numbers than ``preprocessing``, a wrong number of
    channels or names, and logits that are not finite.
    """
    if top < 1 or batch < 1:
        raise ValueError(f"predict: top is {top} and batch is {batch}; whole numbers >= 1 would do")
    serving = _frozen(model, preprocessing)
    wanted = serving.pixels.shape[1]
    if channels != wanted or channels not in (1, 3):
        better = wanted if wanted in (1, 3) else "a model of 1 (greyscale) or 3 (RGB)"
        raise ValueError(f"predict: channels is {channels}, and the model takes images of {wanted}; {better} would do")

    def load(path: Path) -> np.ndarray:
        image = read_image(path, channels)
        try:
            return resize_and_crop(image, preprocessing)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    with ThreadPoolExecutor(_READERS) as pool:
        for files, images in _batches(pool, load, [Path(path) for path in paths], batch, unreadable):
            x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            labels = top_labels(class_probabilities(serving, x), top, classes)
            for file, best in zip(files, labels, strict=True):
                yield Prediction(file, best)


def _frozen(model: nn.Module, preprocessing: Preprocessing) -> InferenceModel:
    if model.training:
        raise ValueError("predict: the model is in training mode; model.eval() would do")
    if not isinstance(model, InferenceModel):
        return optimize_for_inference(model, preprocessing=preprocessing)
    if not torch.equal(model.pixels, scale_and_shift(model.frozen, preprocessing)):
        raise ValueError("predict: the copy normalises by another mean or std; optimize_for_inference(preprocessing=) would do")
    return model


def class_probabilities(model: InferenceModel, x: Tensor) -> Tensor:
    """uint8 images [N, C, H, W] -> probabilities [N, K] float32 on the CPU."""
    logits = model(x.to(model.pixels.device)).float().cpu()
    if not logits.isfinite().all():
        raise ValueError("predict: the model gives logits that are not finite; its weights are damaged, or too large for its dtype")
    return logits.softmax(1)


def top_labels(probabilities: Tensor, top: int, classes: Sequence[str] | None = None) -> list[tuple[Label, ...]]:
    """For each row of [N, K] the ``top`` labels, best first."""
    count = probabilities.shape[1]
    if classes is not None and len(classes) != count:
        raise ValueError(f"predict: {len(classes)} class names for a model of {count} classes")
    values, indices = probabilities.topk(min(top, count), dim=1)
    return [
        tuple(Label(index, classes[index] if classes else None, value) for index, value in zip(row, best, strict=True))
        for row, best in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def _batches(
    pool: ThreadPoolExecutor,
    load: Callable[[Path], np.ndarray],
    paths: list[Path],
    batch: int,
    unreadable: Callable[[Exception], None] | None,
) -> Iterator[tuple[list[Path], list[np.ndarray]]]:
    """Batches of decoded files, the next one being decoded while the caller works on one."""
    ahead: list[Future[np.ndarray]] = []
    chunks = [paths[start : start + batch] for start in range(0, len(paths), batch)]
    for number, chunk in enumerate(chunks):
        loading = ahead or [pool.submit(load, path) for path in chunk]
        ahead = [pool.submit(load, path) for path in chunks[number + 1]] if number + 1 < len(chunks) else []
        files, images = [], []
        for path, future in zip(chunk, loading, strict=True):
            try:
                images.append(future.result())
                files.append(path)
            except (ValueError, OSError) as error:
                if unreadable is None:
                    raise
                unreadable(error)
        if files:
            yield files, images
