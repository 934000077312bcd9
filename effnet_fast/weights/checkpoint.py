"""Checkpoints into and out of the models, in any layout: checked whole before anything is copied."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effnet_fast.scaling.config import NetConfig
from effnet_fast.scaling.names import names_of
from effnet_fast.weights.files import Checkpoint, locate, metadata_of, read, write
from effnet_fast.weights.layouts import COUNT, LAYOUTS, Convention, convention, detect, few, key_map, native, shapes
from effnet_fast.weights.preprocessing import HALF, Preprocessing
from effnet_fast.weights.sources import Source, library_default, published_as

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class _Faults:
    """What is wrong with a checkpoint: names of tensors, and a clause on each of another shape."""

    missing: list[str]
    surplus: list[str]
    of_another_shape: list[str]

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.surplus) + len(self.of_another_shape)

    def __str__(self) -> str:
        return "; ".join(f"{len(names)} {kind.replace('_', ' ')} ({few(names)})" for kind, names in vars(self).items() if names)


class Net(Protocol):
    """What is asked of a model here: those of effnet_fast.models have it."""

    config: NetConfig
    default_cfg: dict[str, Any]

    def get_submodule(self, target: str) -> nn.Module: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def set_weights_convention(self, padding: str | None, bn_eps: float | None, bn_momentum: float | None) -> None: ...


def default_cfg(config: NetConfig, source: Source | None = None) -> dict[str, Any]:
    """The preprocessing and provenance of a net's weights under timm's names; sizes are those the weights are evaluated at.

    Without a source: the paper's preprocessing (crop of crop + 32, bicubic, ImageNet's mean and std; 0.5 for lite and MobileNetV1)
    at the config's resolution; for nets under torchvision's names bilinear, and where they are meant for small images no crop.
    """
    names = names_of(config)
    if source is None and config.family != "efficientnet":
        preprocessing = Preprocessing.of(config.resolution, 1.0 if config.stem_stride == 1 else None, interpolation="bilinear")
    elif source is None:
        colours: dict[str, Any] = {"mean": HALF, "std": HALF} if config.activation == "relu6" else {}
        preprocessing = Preprocessing.of(config.resolution, **colours)
    else:
        preprocessing = source.preprocessing
    cfg = {
        "architecture": config.name,
        "num_classes": config.num_classes if source is None else source.num_classes,
        "first_conv": names.stem[0],
        "classifier": names.classifier,
        **_preprocessing_entries(config, preprocessing),
    }
    if source is not None:
        cfg["tag"] = source.tag
        cfg |= {"url": source.url} if source.url else {"hf_hub_id": source.hub_id}
    return cfg


def preprocessing_of(model: Net) -> Preprocessing:
    """How images are prepared for the weights that the model has."""
    cfg = model.default_cfg or default_cfg(model.config)
    settings = {name: cfg[name] for name in ("crop_mode", "interpolation", "mean", "std")}
    return Preprocessing.of(cfg["input_size"][-1], cfg["crop_pct"], **settings)


def load_checkpoint(model: Net, path: str | os.PathLike[str], ema: bool = False) -> None:
    """Load a checkpoint file, or the one in a directory, in timm's, torchvision's or lukemelas' layout (told by its keys).

    Every tensor is checked first: where one is missing, surplus or of another shape a ValueError names it and nothing is changed. A
    model without a head takes a checkpoint with one. The padding, batch norm's eps and momentum and the preprocessing that travel
    with the weights are adopted: from the metadata, else those of the published weights that the file is by its name, else as the
    layout's library has them; timm's plain layout says nothing and changes nothing. The model's dtype and device stay. ``ema`` as
    in :func:`effnet_fast.weights.files.read`.
    """
    check_net("load_checkpoint", model)
    path = locate(path)
    fill(model, path, read(path, ema))


def save_checkpoint(
    model: Net,
    path: str | os.PathLike[str],
    layout: str | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    force: bool = False,
) -> None:
    """Write the model's tensors in a layout, with what :func:`load_checkpoint` wants to know, to .safetensors or .pth; atomic.

    layout         the net's own where None: "timm" of an EfficientNet
    classes        the names of the classes, in order, for ``effnet-fast predict``
    preprocessing  how images were prepared in training, where ``model.default_cfg`` does not say so
    force          write it even where the layout's library would run the net with another padding or eps, and warn

    Raises ValueError for that, and where the library has no such net; OSError where the file cannot be written.
    """
    check_net("save_checkpoint", model)
    state, layout = model.state_dict(), layout or native(model.config)
    names = key_map(model.config, layout)
    homeless = [key for key in state if key not in names]
    if homeless and layout != native(model.config):
        raise ValueError(f"save_checkpoint: layout {layout!r} has no name for {few(homeless)}; {native(model.config)!r} would do")
    # A norm_layer of the user's may have brought settings of its own.
    norm = model.get_submodule(names_of(model.config).stem[1])
    config = replace(
        model.config,
        bn_eps=getattr(norm, "eps", model.config.bn_eps),
        bn_momentum=getattr(norm, "momentum", model.config.bn_momentum),
    )
    _check_convention("save_checkpoint", config, layout, force)
    prepared = preprocessing or preprocessing_of(model)
    metadata = {**metadata_of(config), "layout": layout, "preprocessing": prepared.to_dict()}
    if classes is not None:
        if len(classes) != model.config.num_classes:
            raise ValueError(f"save_checkpoint: {len(classes)} classes for a model of {model.config.num_classes}")
        metadata["classes"] = list(classes)
    write(path, {names.get(key, key): value for key, value in state.items()}, metadata)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    layout: str,
    configs: Iterable[NetConfig] = (),
    architecture: str | None = None,
    ema: bool = False,
    force: bool = False,
) -> NetConfig:
    """Rewrite a checkpoint in another layout; returns the net that it is of. ``ema`` as in reading, ``force`` as in saving it.

    The net is the one named ``architecture`` among ``configs``, else the one that the file says it was saved from, else the one of
    ``configs`` whose tensors are the file's. Raises ValueError where none fits, several do and only their padding tells them
    apart (name the architecture), the layout has no such net, or its library would run it with another padding or eps.
    """
    path = locate(source)
    checkpoint, configs = read(path, ema), list(configs)
    named = next((config for config in configs if config.name == architecture), checkpoint.config)
    written = _detect(path, checkpoint, named)
    config = _deduce(path, checkpoint, written, configs, architecture)
    names = key_map(config, layout)
    tensors = _fit(path, checkpoint.state_dict, config, written, _present(checkpoint.state_dict, config, written))
    rules = _convention(checkpoint, config, written)
    if rules:
        config = replace(config, **rules._asdict())
    _check_convention("convert", config, layout, force)
    preprocessing, _ = _preprocessing(path, checkpoint, config, written)
    metadata = {**metadata_of(config), "layout": layout}
    if preprocessing:
        metadata["preprocessing"] = preprocessing.to_dict()
    if "classes" in checkpoint.metadata:
        metadata["classes"] = checkpoint.metadata["classes"]
    write(target, {names[key]: tensor for key, tensor in tensors.items()}, metadata)
    return config


def check_net(who: str, model: Any) -> None:
    if not isinstance(getattr(model, "config", None), NetConfig) or not hasattr(model, "set_weights_convention"):
        raise TypeError(f"{who}: the model is a {type(model).__name__}; one of effnet_fast's (create_model) would do")


def net_of(path: Path, checkpoint: Checkpoint) -> NetConfig | None:
    """The net that the metadata names, where there is one; ValueError where the tensors are not its."""
    if checkpoint.config is None:
        return None
    return _deduce(path, checkpoint, _detect(path, checkpoint, checkpoint.config), [], None)


def fill(model: Net, path: Path, checkpoint: Checkpoint, new_head: bool = False, source: Source | None = None) -> None:
    """Check, copy, adopt.

    new_head  leave the classifier as it is where the file has none or one for other classes
    source    the published weights that these are, where they have been fetched
    """
    written = _detect(path, checkpoint, model.config)
    state, tensors, classifier = model.state_dict(), checkpoint.state_dict, names_of(model.config).classifier
    wanted = {key: tuple(value.shape) for key, value in state.items()}
    if new_head and f"{classifier}.weight" in wanted:
        given = tensors.get(key_map(model.config, written)[f"{classifier}.weight"])
        if given is None or tuple(given.shape) != wanted[f"{classifier}.weight"]:
            wanted = {key: shape for key, shape in wanted.items() if not key.startswith(f"{classifier}.")}
    fitted = _fit(path, tensors, model.config, written, wanted)
    rules = _convention(checkpoint, model.config, written)
    preprocessing, published = _preprocessing(path, checkpoint, model.config, written, source)
    entries = default_cfg(model.config, published) if published else {}
    if preprocessing:
        entries |= _preprocessing_entries(model.config, preprocessing)
    with torch.no_grad():
        for key, tensor in fitted.items():
            state[key].copy_(tensor)
    if rules:
        model.set_weights_convention(*rules)
    for provenance in ("tag", "hf_hub_id", "url"):
        model.default_cfg.pop(provenance, None)
    model.default_cfg.update(entries)


def _preprocessing_entries(config: NetConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    adapted = preprocessing.for_channels(config.in_channels)
    return {
        "input_size": (config.in_channels, adapted.crop, adapted.crop),
        "pool_size": (-(-adapted.crop // config.reduction),) * 2,
        "crop_pct": adapted.crop_pct,
        "crop_mode": adapted.crop_mode,
        "interpolation": adapted.interpolation,
        "mean": adapted.mean,
        "std": adapted.std,
    }


def _detect(path: Path, checkpoint: Checkpoint, config: NetConfig | None) -> str:
    try:
        return detect(checkpoint.state_dict, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _head(config: NetConfig) -> tuple[str, ...]:
    """How the keys begin of what comes after the last block."""
    names = names_of(config)
    return tuple(f"{name}." for name in (*names.head, names.classifier) if name)


def _with_head(config: NetConfig) -> NetConfig:
    return config if config.num_classes else replace(config, num_classes=1)


def _faults(tensors: Mapping[str, Tensor], config: NetConfig, written: str, wanted: Shapes) -> _Faults:
    """What keeps a checkpoint from being all of ``wanted`` (under timm's keys) and no more."""
    names = key_map(_with_head(config), written)
    homeless = [key for key in wanted if key not in names]
    if written == native(config):  # also what a norm_layer of the user's keeps
        names |= {key: key for key in homeless}
        homeless = []
    expected = {names[key]: shape for key, shape in wanted.items() if key in names}
    spare = {name for key, name in names.items() if key not in wanted and key.startswith(_head(config))}
    missing = [name for name in expected if name not in tensors and not name.endswith(COUNT)]
    surplus = [name for name in tensors if name not in expected and name not in spare]
    shaped = [
        f"{name} is {list(tensors[name].shape)} where {list(shape)} would do"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    return _Faults(missing + homeless, surplus, shaped)


def _fit(path: Path, tensors: Mapping[str, Tensor], config: NetConfig, written: str, wanted: Shapes) -> dict[str, Tensor]:
    """The checkpoint's tensors under timm's keys, all of ``wanted`` and no other; ValueError that names what does not fit."""
    faults = _faults(tensors, config, written, wanted)
    if faults.count:
        raise ValueError(f"{path} ({written} layout) does not fit {config.name}: {faults}")
    names = key_map(_with_head(config), written)
    # Checkpoints older than the count have none; it matters only to a momentum of None.
    return {key: tensors.get(names.get(key, key), torch.zeros((), dtype=torch.long)) for key in wanted}


def _convention(checkpoint: Checkpoint, config: NetConfig, written: str) -> Convention | None:
    """From the metadata, else what the layout's library does."""
    metadata = checkpoint.metadata
    if "padding" not in metadata:
        return convention(config, written)
    return Convention(metadata["padding"], metadata["bn_eps"], metadata["bn_momentum"])


def _preprocessing(
    path: Path, checkpoint: Checkpoint, config: NetConfig, written: str, source: Source | None = None
) -> tuple[Preprocessing | None, Source | None]:
    """From the metadata, else of the published weights that these are, else the layout's library's for such a net."""
    if checkpoint.preprocessing:
        return checkpoint.preprocessing, None
    source = source or published_as(path, config.name)
    known = source or (library_default(config.name, written) if written != "timm" else None)
    return known.preprocessing if known else None, source


def _check_convention(who: str, config: NetConfig, layout: str, force: bool) -> None:
    """Refuse, or with ``force`` warn of, a layout whose library runs the net with other padding or eps and so answers wrongly."""
    rules = convention(config, layout)
    if rules is None or _agrees(config, rules):
        return
    wrong = (
        f"{who}: {layout} runs {config.name} with {rules.padding} padding and eps {rules.bn_eps:g}, and these weights want "
        f"{config.padding} padding and eps {config.bn_eps:g}: its answers would be wrong"
    )
    if not force:
        others = [other for other in LAYOUTS if other != layout and _runs(config, other)]
        raise ValueError(f"{wrong}; layout {' or '.join(map(repr, others))} would do, or force")
    warnings.warn(wrong, stacklevel=3)


def _runs(config: NetConfig, layout: str) -> bool:
    """Whether the layout's library has the net and gives its answers."""
    try:
        key_map(config, layout)
    except ValueError:
        return False
    rules = convention(config, layout)
    return rules is None or _agrees(config, rules)


def _agrees(config: NetConfig, rules: Convention) -> bool:
    return (config.padding, config.bn_eps) == (rules.padding, rules.bn_eps)


def _present(tensors: Mapping[str, Tensor], config: NetConfig, written: str) -> Shapes:
    """The shapes to expect of a file that may hold no classifier, or no head at all."""
    names = key_map(_with_head(config), written)
    wanted = shapes(config)
    if config.head_channels and names[f"{names_of(config).head[0]}.weight"] not in tensors:
        return {key: shape for key, shape in wanted.items() if not key.startswith(_head(config))}
    return wanted


def _deduce(path: Path, checkpoint: Checkpoint, written: str, configs: list[NetConfig], architecture: str | None) -> NetConfig:
    tensors = checkpoint.state_dict
    if architecture is not None:
        configs = [config for config in configs if config.name == architecture]
        if not configs:
            raise ValueError(f"convert: unknown architecture {architecture!r}; the name of a net would do")
    elif checkpoint.config:
        configs = [checkpoint.config]
    tried: list[tuple[_Faults, NetConfig]] = []
    for candidate in configs:
        try:
            names = key_map(_with_head(candidate), written)
        except ValueError:
            continue  # that library has no such net
        own = names_of(candidate)
        stem, classifier = (tensors.get(names[f"{name}.weight"]) for name in (own.stem[0], own.classifier))
        config = replace(
            candidate,
            in_channels=stem.shape[1] if stem is not None and stem.dim() == 4 else candidate.in_channels,
            num_classes=classifier.shape[0] if classifier is not None and classifier.dim() == 2 else 0,
        )
        faults = _faults(tensors, config, written, _present(tensors, config, written))
        tried.append((faults, config))
    fitting = [config for faults, config in tried if not faults.count]
    if len(fitting) > 1:
        padding = [rules.padding for config in fitting if (rules := convention(config, written))]
        fitting = [config for config in fitting if config.padding in padding] or fitting
    if len(fitting) > 1:
        raise ValueError(
            f"{path} fits {' and '.join(config.name for config in fitting)}, which differ in padding and batch norm's eps; "
            "naming the architecture would do"
        )
    if not fitting:
        if not tried:
            raise ValueError(f"{path} is in {written}'s layout, which none of the nets asked about has")
        faults, nearest = min(tried, key=lambda row: row[0].count)
        raise ValueError(f"{path} ({written} layout) fits no known net; the nearest is {nearest.name}: {faults}")
    return fitting[0]
