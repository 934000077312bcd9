"""Checkpoint files: tensors under the names a library gave them, and what travels with them."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_fast.scaling.config import NetConfig, StageConfig
from effnet_fast.weights.layouts import few

# The file in a directory that holds the weights, in order of preference.
FILE_NAMES = ("model.safetensors", "pytorch_model.bin")

_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_EMA_NAMES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PLAIN_NAMES = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_METADATA = "effnet_fast"


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

    Wrapping dicts ("state_dict", "model", ...) are opened and the prefixes of wrapping modules taken off. ``ema``: the averaged
    weights of a training checkpoint in place of the raw ones; where it has only averaged ones, they are taken either way.

    Raises FileNotFoundError; ValueError for a damaged file, one that would run code, and one without tensors.
    """
    path = locate(path)
    if path.suffix == ".safetensors":
        if ema:
            raise ValueError(f"{path} is a safetensors file, which holds one set of weights; ema=False would do")
        tensors, metadata = _read_safetensors(path)
    else:
        tensors, metadata = _open(path, _read_torch(path), ema)
    return Checkpoint(_without_prefixes(tensors), metadata)


def write(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write .safetensors, or .pth, .pt, .bin by ``torch.save`` as ``{"state_dict": ..., "effnet_fast": metadata}``.

    Atomic: a reader sees the old file or the new one, whole; a failure leaves the old one. ``metadata`` holds plain values (JSON).
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors" and path.suffix not in _TORCH_SUFFIXES:
        raise ValueError(f"checkpoint {path} ends in {path.suffix!r}; .safetensors or {', '.join(_TORCH_SUFFIXES)} would do")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint {path} cannot be written: there is no directory {path.parent}")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            if path.suffix == ".safetensors":
                text = {"format": "pt", _METADATA: json.dumps(dict(metadata))}
                file.write(_safetensors().save(tensors, metadata=text))
            else:
                torch.save({"state_dict": tensors, _METADATA: dict(metadata)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("a .safetensors file needs the safetensors package: pip install effnet-fast[weights] would do") from error
    return safetensors.torch


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {}).get(_METADATA, "{}")
        metadata = json.loads(text)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors, metadata


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
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        reason = (str(error).splitlines() or ["it ends early"])[0]
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from error


def _open(path: Path, content: Any, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict within wrapping dicts, and the metadata beside it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; a state dict would do")
    metadata = content.get(_METADATA)
    averaged = next((content[name] for name in _EMA_NAMES if _has_tensors(content.get(name))), None)
    plain = next((content[name] for name in _PLAIN_NAMES if _has_tensors(content.get(name))), None)
    if averaged is None and plain is None and _has_tensors(content):
        plain = content
    if ema and averaged is None and plain is not None and "n_averaged" in plain:
        averaged = plain
    if ema and averaged is None:
        raise ValueError(f"{path} holds no averaged weights ({', '.join(_EMA_NAMES)}); ema=False would do")
    chosen = averaged if ema or plain is None else plain
    if chosen is None:
        raise ValueError(f"{path} holds no tensors; its entries are {few(map(str, content), 6) or 'none'}")
    return {str(key): value for key, value in chosen.items() if isinstance(value, Tensor)}, dict(metadata or {})


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        # The count that torch.optim.swa_utils.AveragedModel keeps beside its module.
        tensors = {key: value for key, value in tensors.items() if key != "n_averaged"}
        prefix = next((prefix for prefix in _PREFIXES if tensors and all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
