"""Teachers of other libraries: a classifier of timm or torchvision by name, with its pretrained weights or a checkpoint's."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_fast.weights import PretrainedUnavailable
from effnet_fast.weights.files import COUNT, read_any
from effnet_fast.weights.layouts import few

LIBRARIES = ("timm", "torchvision")


class Teacher(NamedTuple):
    """A classifier, and the mean and deviation of the colours of the images that it wants."""

    model: nn.Module
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def for_images(self, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        """The classifier for images [N, 3, H, W] that were normalised by another mean and deviation."""
        return self.model if (mean, std) == (self.mean, self.std) else _Renormalised(self, mean, std)


class _Renormalised(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, teacher: Teacher, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = teacher.model
        theirs, wanted = (torch.tensor([*zip(*pair, strict=True)])[:, :, None, None] for pair in ((mean, std), teacher[2:]))
        self.register_buffer("scale", theirs[:, 1] / wanted[:, 1], persistent=False)
        self.register_buffer("shift", (theirs[:, 0] - wanted[:, 0]) / wanted[:, 1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x * self.scale + self.shift)


def load_teacher(name: str, path: str | os.PathLike[str] | None = None, num_classes: int = 1000) -> Teacher:
    """``timm:NAME``, with the tag of its weights or without, or ``torchvision:NAME``.

    path  a checkpoint of it, under the library's names; None: the library's default weights, fetched once

    mean and std are those of the library's weights for that name, also where a checkpoint's are loaded. Raises ValueError for an
    unknown name, weights for other than ``num_classes`` and a checkpoint of another net, FileNotFoundError, ImportError without the
    library, and PretrainedUnavailable (an OSError) where it has no weights or they cannot be fetched.
    """
    library, _, of = name.partition(":")
    if library not in LIBRARIES:
        raise ValueError(f"the teacher is {name!r}; {' or '.join(f'{known}:NAME' for known in LIBRARIES)} would do")
    make = _of_timm if library == "timm" else _of_torchvision
    try:
        teacher = make(of, num_classes, path is None)
    except ModuleNotFoundError as error:
        raise ImportError(f"the teacher {name} needs {library}: pip install {library} would do") from error
    if path is not None:
        _fill(teacher.model, name, path, num_classes)
    return teacher


def _of_timm(name: str, num_classes: int, pretrained: bool) -> Teacher:
    import timm

    _check("timm", name, timm.list_models(), known=timm.is_model(name))
    wanted = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    if pretrained:
        _check_classes(f"timm:{name}", wanted.num_classes, num_classes)
    model = _made(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained, num_classes=num_classes), pretrained)
    return Teacher(model, num_classes, tuple(wanted.mean), tuple(wanted.std))


def _of_torchvision(name: str, num_classes: int, pretrained: bool) -> Teacher:
    from torchvision import models

    names = models.list_models(module=models)
    _check("torchvision", name, names, known=name in names)
    weights: Any = models.get_model_weights(name).DEFAULT
    if pretrained:
        _check_classes(f"torchvision:{name}", len(weights.meta["categories"]), num_classes)
    given = {"weights": weights} if pretrained else {"num_classes": num_classes}
    model = _made(f"torchvision:{name}", lambda: models.get_model(name, **given), pretrained)
    wanted = weights.transforms()
    return Teacher(model, num_classes, tuple(wanted.mean), tuple(wanted.std))


def _check(library: str, name: str, names: list[str], known: bool) -> None:
    if not known:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"the teacher is '{library}:{name}', which {library} has not; '{library}:{nearest}' would do")


def _check_classes(name: str, having: int, wanted: int) -> None:
    if having != wanted:
        raise ValueError(
            f"the teacher {name}'s pretrained weights have {having} classes, not {wanted}; a checkpoint with these would do"
        )


def _made(name: str, make: Callable[[], nn.Module], pretrained: bool) -> nn.Module:
    try:
        return make()
    except Exception as error:  # whatever the network and the hub's library may raise
        if not pretrained:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PretrainedUnavailable(
            f"the teacher {name} cannot be had ({lines[0]}); a checkpoint of it, as path, would do"
        ) from error


def _fill(model: nn.Module, name: str, path: str | os.PathLike[str], num_classes: int) -> None:
    state, wanted = read_any(path), model.state_dict()
    ours, theirs = ({key: value.shape for key, value in tensors.items()} for tensors in (wanted, state))
    theirs |= {key: shape for key, shape in ours.items() if key.endswith(COUNT) and key not in theirs}  # older files have none
    wrong = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if wrong:
        raise ValueError(f"{path} is no checkpoint of {name} with {num_classes} classes: {few(wrong)} would be missing or other")
    model.load_state_dict(state, strict=False)
