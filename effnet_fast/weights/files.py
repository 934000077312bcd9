"""Checkpoint files: tensors under the names a library gave them, and what travels with them."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_fast.scaling.config import NetConfig, StageConfig, check_convention
from effnet_fast.weights.layouts import COUNT, STEMS, few
from effnet_fast.weights.preprocessing import Preprocessing

# The file in a directory that holds the weights, in order of preference.
FILE_NAMES = ("model.safetensors", "pytorch_model.bin")

_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_EMA_NAMES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PLAIN_NAMES = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "module")
_AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])")  # in the name of a wrapping module
_DEEPEST = 8  # wrapping dicts: one may hold itself
_METADATA = "effnet_fast"
_ASIDE = ".effnet_fast-*.tmp"  # what a file is called till it is whole


@dataclass
class Checkpoint:
    """Tensors by name, on the CPU, and the metadata that :func:`write` put beside them (empty where another program wrote)."""

    state_dict: dict[str, Tensor]
    metadata: dict[str, Any]

    @property
    def config(self) -> NetConfig | None:
        """The net that was saved, where the metadata has it."""
        if "stages" not in self.metadata:
            return None
        values = {field.name: self.metadata[field.name] for field in fields(NetConfig) if field.name in self.metadata}
        stages = tuple(StageConfig(**stage) for stage in values.pop("stages"))
        return NetConfig(name=self.metadata["architecture"], stages=stages, **values)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images were prepared, where the metadata has it."""
        return Preprocessing.from_dict(self.metadata["preprocessing"]) if "preprocessing" in self.metadata else None

    def check(self) -> None:
        """Raise KeyError, TypeError or ValueError where the metadata is not what :func:`write` was given."""
        metadata = self.metadata
        if not isinstance(metadata, Mapping):
            raise TypeError(f"it is a {type(metadata).__name__}; a mapping would do")
        if "padding" in metadata:
            check_convention("the metadata", *(metadata[name] for name in ("padding", "bn_eps", "bn_momentum")))
        names = metadata.get("classes", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"classes is {type(names).__name__}; a list of strings would do")
        # Each raises where it cannot be made.
        _ = self.config, self.preprocessing


def metadata_of(config: NetConfig) -> dict[str, Any]:
    """The config's fields as plain values, its name under "architecture": what :attr:`Checkpoint.config` reads."""
    values = asdict(config)
    return {"architecture": values.pop("name"), **values, "stages": list(values["stages"])}


def locate(path: str | os.PathLike[str], *names: str) -> Path:
    """The checkpoint file that ``path`` is, or that it holds as a directory, under one of ``names`` or a usual one."""
    found = Path(path).expanduser()
    if found.is_dir():
        names = (*names, *FILE_NAMES)
        for name in names:
            if (found / name).is_file():
                return found / name
        raise FileNotFoundError(f"checkpoint directory {found} holds none of {', '.join(names)}")
    if not found.is_file():
        raise FileNotFoundError(f"checkpoint {found} does not exist")
    return found


def read(path: str | os.PathLike[str], ema: bool = False) -> Checkpoint:
    """Read a .safetensors file or anything that ``torch.save`` wrote, running no code that is in it.

    Wrapping dicts ("state_dict", "model", ...) are opened and the prefixes of wrapping modules taken off; tensors beside the
    wrapped net, such as a criterion's, are left out. ``ema``: the averaged weights of a training checkpoint in place of the raw
    ones; where it has only averaged ones, they are taken either way.

    Raises FileNotFoundError; ValueError for a damaged file or metadata, one that would run code, one without tensors or with
    several nets, and tensors that no weights are made of (sparse, complex, whole numbers).
    """
    path = locate(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; a state dict would do")
    chosen = _choose(path, content, ema)
    odd = [f"{name} is {kind}" for name, value in chosen.state_dict.items() if (kind := _odd_kind(name, value))]
    if odd:
        raise ValueError(f"{path}: {few(odd)}; dense tensors of floating-point numbers would do")
    try:
        chosen.check()
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: the metadata beside its tensors is damaged: {reason}") from error
    return chosen


def read_any(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of any net, under their own names but for a leading ``module.``, running no code that is in it.

    Wrapping dicts are opened; averaged weights are taken where there are any. Raises as :func:`read` for what is no such file.
    """
    path = locate(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; a state dict would do")
    found = _inside(content, _EMA_NAMES) or _inside(content, ())
    if found is None:
        raise ValueError(f"{path} holds no tensors; its entries are {few(map(str, content), 6) or 'none'}")
    return {str(key).removeprefix("module."): value for key, value in found.items() if isinstance(value, Tensor)}


def write(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write .safetensors, or .pth, .pt, .bin by ``torch.save`` as a plain state dict, which is what each library's loader reads.

    The metadata, plain values (JSON), is the file's metadata in .safetensors, and else an attribute of the OrderedDict, where
    PyTorch's own state dicts have their ``_metadata``. Atomic: a reader sees the old file or the new one, whole; a failure leaves
    the old one.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors" and path.suffix not in _TORCH_SUFFIXES:
        raise ValueError(f"checkpoint {path} ends in {path.suffix!r}; .safetensors or {', '.join(_TORCH_SUFFIXES)} would do")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint {path} cannot be written: there is no directory {path.parent}")
    tensors = OrderedDict((key, value.detach().cpu().contiguous()) for key, value in state_dict.items())
    text = json.dumps(dict(metadata))
    with whole(path) as aside, open(aside, "xb") as file:
        if path.suffix == ".safetensors":
            file.write(_safetensors().save(tensors, metadata={"format": "pt", _METADATA: text}))
        else:
            setattr(tensors, _METADATA, json.loads(text))
            torch.save(tensors, file)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` once it is written and on the disk; a failure leaves what was there.

    Of several that write at once each has its own, and the last one's stays; what a killed process leaves :func:`sweep` takes away.
    Raises OSError that names ``path``.
    """
    aside = path.with_name(_ASIDE.replace("*", uuid.uuid4().hex))
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left when they wrote to files of a folder; nobody may write to one now."""
    for left in folder.glob(_ASIDE):
        left.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "a .safetensors file needs the safetensors package: pip install 'effnet-fast[weights]' would do"
        ) from error
    return safetensors.torch


def _read_safetensors(path: Path) -> OrderedDict[str, Tensor]:
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            text = (file.metadata() or {}).get(_METADATA, "{}")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        setattr(tensors, _METADATA, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata beside its tensors is damaged: {error}") from error
    return tensors


def _read_torch(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        # timm's and torchvision's training scripts save their parsed arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ValueError(
                f"{path} holds more than tensors, and reading it would run code from it: "
                "a file with only the state dict in it would do (torch.save(model.state_dict(), ...))"
            ) from error
        raise ValueError(f"{path} is damaged or no checkpoint") from error
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["it cannot be read"])[0]
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from error
    except OSError:
        raise
    except Exception as error:  # an unpickler raises whatever garbage makes it raise, and what it says of it helps nobody
        raise ValueError(f"{path} is damaged or no checkpoint") from error


def _choose(path: Path, content: Mapping[Any, Any], ema: bool) -> Checkpoint:
    """The net within wrapping dicts and modules, and the metadata beside it."""
    mean, raw = _inside(content, _EMA_NAMES), _inside(content, ())
    if mean is not None and raw is content:
        raw = None  # a tensor or two beside the averaged weights: a loss, a step
    if raw is None and mean is None:
        raise ValueError(f"{path} holds no tensors; its entries are {few(map(str, content), 6) or 'none'}")
    averaged = {} if mean is None else _nets(mean)
    plain: dict[str, dict[str, Tensor]] = {}
    for prefix, net in ({} if raw is None else _nets(raw)).items():
        # What torch.optim.swa_utils.AveragedModel keeps beside its module is "n_averaged".
        (averaged if _AVERAGED.search(prefix) or "n_averaged" in (raw or ()) else plain)[prefix] = net
    if ema and not averaged:
        raise ValueError(f"{path} holds no averaged weights ({', '.join(_EMA_NAMES)}); its only weights would do")
    nets = averaged if ema or not plain else plain
    if len(nets) > 1:
        raise ValueError(f"{path} holds {len(nets)} nets, under {few(map(repr, nets))}; a file with one of them would do")
    (tensors,) = nets.values()
    holder = raw if mean is None or nets is plain else mean
    return Checkpoint(tensors, getattr(holder, _METADATA, {}))


def _inside(content: Mapping[Any, Any], names: Iterable[str], depth: int = 0) -> Mapping[Any, Any] | None:
    """The first mapping with tensors under one of ``names``, whatever dicts wrap it; without names any that is no average."""
    if depth > _DEEPEST:
        return None
    for name in names:
        if isinstance(content.get(name), Mapping) and (found := _inside(content[name], (), depth + 1)) is not None:
            return found
    for name in _PLAIN_NAMES:
        if isinstance(content.get(name), Mapping) and (found := _inside(content[name], names, depth + 1)) is not None:
            return found
    return content if not names and any(isinstance(value, Tensor) for value in content.values()) else None


def _nets(state: Mapping[Any, Any]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each net by the prefix of the modules that wrap it, told by its stem; all of them where none has one."""
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    ends = [key.removesuffix(stem) for key in tensors for stem in STEMS if key.endswith(stem)]
    prefixes = sorted(dict.fromkeys(end for end in ends if not end or end.endswith(".")), key=len, reverse=True) or [""]
    nets: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for key, value in tensors.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is not None:
            nets[prefix][key.removeprefix(prefix)] = value
    return nets


def _odd_kind(name: str, tensor: Tensor) -> str:
    """What a tensor is, where that is nothing to copy weights from."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_meta:
        return "on the meta device, without numbers"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    whole = name.endswith(COUNT) and not tensor.is_complex() and not tensor.is_quantized
    return "" if whole or tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
