"""The model that ``predict`` and ``cam`` are given, and the device it runs on."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effnet_fast.cli import say
from effnet_fast.models import Classifier, build, config_of, create_model
from effnet_fast.scaling import NetConfig
from effnet_fast.scaling.names import names_of
from effnet_fast.weights import Preprocessing, detect, key_map, load_checkpoint, net_of, preprocessing_of, read
from effnet_fast.weights.files import locate

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


class Loaded(NamedTuple):
    """A model in eval mode on its device; ``trained`` is False where its weights are random."""

    model: Classifier
    preprocessing: Preprocessing
    classes: list[str] | None
    trained: bool


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name, NAME.TAG for one set of pretrained weights, or the path of a checkpoint that says its net (./NAME, NAME.pth)",
    )
    weights_from = parser.add_mutually_exclusive_group()
    weights_from.add_argument(
        "--checkpoint", metavar="FILE", help="weights of MODEL, in the layout of timm, torchvision or lukemelas"
    )
    weights_from.add_argument("--pretrained", action="store_true", help="MODEL's default weights, fetched once")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    parser.add_argument(
        "--classes", metavar="FILE", help="class names, one a line (default: the checkpoint's own, else class indices)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one (default); of cuda each of torchrun's ranks gets its own",
    )


def load_model(arguments: argparse.Namespace) -> Loaded:
    """Build MODEL and its weights as the options say."""
    device = device_of(arguments.device)
    classes = None
    saved = is_path(arguments.model)
    if arguments.ema and not (saved or arguments.checkpoint):
        raise ValueError("--ema chooses among the weights of a checkpoint; it needs one, as MODEL or --checkpoint")
    if saved:
        if arguments.checkpoint or arguments.pretrained:
            raise ValueError(f"MODEL is the checkpoint {arguments.model}; it needs no --checkpoint or --pretrained")
        model, classes = load_saved(arguments.model, arguments.ema)
    elif arguments.checkpoint:
        model, classes = load_into(config_of(arguments.model), arguments.checkpoint, arguments.ema)
    else:
        model = create_model(arguments.model, arguments.pretrained)  # type: ignore[assignment]
    trained = bool(saved or arguments.checkpoint or arguments.pretrained or Path(arguments.model).suffix)
    return ready(model, classes, trained, device, arguments.classes)


def ready(model: Classifier, classes: list[str] | None, trained: bool, device: torch.device, file: str | None) -> Loaded:
    """The model on its device, with the names of its classes: those in ``file``, one a line, in place of its own."""
    if file:
        classes = _names_in(file)
    if classes is not None and len(classes) != model.num_classes:
        raise ValueError(f"{len(classes)} class names for a model of {model.num_classes} classes")
    return Loaded(model.to(device).eval(), preprocessing_of(model), classes, trained)


def is_path(model: str) -> bool:
    """Whether MODEL is the path of a checkpoint, and not a name."""
    return Path(model).suffix in _SUFFIXES or os.sep in model


def load_saved(path: str | Path, ema: bool = False) -> tuple[Classifier, list[str] | None]:
    """The network that a checkpoint of effnet_fast's carries, its weights, and its class names if it has them."""
    checkpoint = read(path, ema)
    config = net_of(locate(path), checkpoint)
    if config is None:
        raise ValueError(f"{path} does not say which network it is of; a name as MODEL and --checkpoint {path} would do")
    model = build(config)
    load_checkpoint(model, path, ema)
    return model, checkpoint.metadata.get("classes")


def load_into(config: NetConfig, path: str, ema: bool) -> tuple[Classifier, list[str] | None]:
    """The network of ``config``, its classes and channels as many as the checkpoint has; its weights, and class names if any."""
    checkpoint = read(path, ema)
    tensors = checkpoint.state_dict
    try:
        names = key_map(config, detect(tensors, config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    sizes: dict[str, Any] = {}
    own = names_of(config)
    for field, place, dimension in (("num_classes", own.classifier, 0), ("in_channels", own.stem[0], 1)):
        tensor = tensors.get(names[f"{place}.weight"])
        if tensor is not None and tensor.dim() > dimension:
            sizes[field] = tensor.shape[dimension]
    model = build(replace(config, **sizes))
    load_checkpoint(model, path, ema)
    return model, checkpoint.metadata.get("classes")


def _names_in(path: str) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes is {path}, which is no UTF-8 text; class names, one a line, would do") from error


def note_if_random(loaded: Loaded, would_do: str = "--checkpoint or --pretrained") -> None:
    """Say on stderr that the results mean nothing. Called after them: an error is to stand alone."""
    if not loaded.trained:
        say("note", f"the weights are random, so this means nothing; {would_do} would do")


def device_of(text: str) -> torch.device:
    """The device of a name, shown to work, and for auto and cuda each of torchrun's ranks its own; ValueError otherwise."""
    if text == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if text in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if text.startswith("cuda:") and "LOCAL_RANK" in os.environ:
        raise ValueError(f"--device is {text!r} for each of torchrun's processes; cuda, which gives each its own, would do")
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device is {text!r}, which cannot be used here; cpu or auto would do") from error
    return device
