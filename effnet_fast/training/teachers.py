"""Teachers of other libraries: a classifier of timm or torchvision by name, with its pretrained weights or a checkpoint's."""

from __future__ import annotations

import difflib
import os
from typing import Any, NamedTuple

from torch import nn

from effnet_fast.weights import PretrainedUnavailable, read
from effnet_fast.weights.layouts import few

LIBRARIES = ("timm", "torchvision")


class Teacher(NamedTuple):
    """A classifier, and the mean and deviation of the colours of the images that it wants."""

    model: nn.Module
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_teacher(name: str, path: str | os.PathLike[str] | None = None, num_classes: int = 1000) -> Teacher:
    """``timm:NAME``, with the tag of its weights or without, or ``torchvision:NAME``.

    path  a checkpoint of it for ``num_classes``, under the library's names; None: the library's default weights, fetched once, with
          the classes that they have

    mean and std are those of the library's weights for that name, also where a checkpoint's are loaded. Raises ValueError for an
    unknown name and a checkpoint of another net, FileNotFoundError, ImportError without the library, and PretrainedUnavailable (an
    OSError) where it has no weights or they cannot be fetched.
    """
    library, _, of = name.partition(":")
    if library not in LIBRARIES:
        raise ValueError(f"the teacher is {name!r}; {' or '.join(f'{known}:NAME' for known in LIBRARIES)} would do")
    make = _of_timm if library == "timm" else _of_torchvision
    try:
        teacher = make(of, None if path is None else num_classes)
    except ModuleNotFoundError as error:
        raise ImportError(f"the teacher {name} needs {library}: pip install {library} would do") from error
    if path is not None:
        _fill(teacher.model, name, path, num_classes)
    return teacher


def _of_timm(name: str, num_classes: int | None) -> Teacher:
    """With the pretrained weights, or untrained for so many classes."""
    import timm

    _check("timm", name, timm.list_models(), known=timm.is_model(name))
    try:
        model: Any = timm.create_model(name, **({"pretrained": True} if num_classes is None else {"num_classes": num_classes}))
    except Exception as error:  # whatever the network and the hub's library may raise
        raise _unavailable(f"timm:{name}", error) from error
    wanted = model.pretrained_cfg
    return Teacher(model, model.num_classes, tuple(wanted["mean"]), tuple(wanted["std"]))


def _of_torchvision(name: str, num_classes: int | None) -> Teacher:
    from torchvision import models

    names = models.list_models(module=models)
    _check("torchvision", name, names, known=name in names)
    weights: Any = models.get_model_weights(name).DEFAULT
    try:
        made = {"weights": weights} if num_classes is None else {"num_classes": num_classes}
        model = models.get_model(name, **made)
    except Exception as error:  # whatever the network may raise
        raise _unavailable(f"torchvision:{name}", error) from error
    wanted = weights.transforms()
    return Teacher(model, num_classes or len(weights.meta["categories"]), tuple(wanted.mean), tuple(wanted.std))


def _check(library: str, name: str, names: list[str], known: bool) -> None:
    if not known:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"the teacher is '{library}:{name}', which {library} has not; '{library}:{nearest}' would do")


def _unavailable(name: str, error: Exception) -> PretrainedUnavailable:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return PretrainedUnavailable(f"the teacher {name} cannot be had ({lines[0]}); a checkpoint of it, as path, would do")


def _fill(model: nn.Module, name: str, path: str | os.PathLike[str], num_classes: int) -> None:
    state, wanted = read(path).state_dict, model.state_dict()
    wrong = [
        key for key in {**wanted, **state} if getattr(state.get(key), "shape", None) != getattr(wanted.get(key), "shape", None)
    ]
    if wrong:
        raise ValueError(f"{path} is no checkpoint of {name} with {num_classes} classes: {few(wrong)} would be missing or other")
    model.load_state_dict(state)
