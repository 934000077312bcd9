"""Where pretrained weights come from: a table of tags for each name, and the way to fetch one.

A name's default tag is the first of its rows; every default was trained for ImageNet's 1000 classes. Names that timm has weights
for start with timm's own default; the others have torchvision's. The first row of a library is that library's own default.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effnet_fast.weights.files import FILE_NAMES
from effnet_fast.weights.preprocessing import HALF, Preprocessing

_TIMEOUT = 10.0
_TORCHVISION = "https://download.pytorch.org/models/"
_LUKEMELAS = "https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/"


@dataclass(frozen=True)
class Source:
    """One set of pretrained weights, and how images are prepared for them where they are evaluated.

    url   of the file, whose name holds the start of its SHA-256; None: ``model.safetensors`` of ``hub_id`` on the Hugging Face hub
    """

    name: str
    tag: str
    preprocessing: Preprocessing
    num_classes: int = 1000
    url: str | None = None

    @property
    def hub_id(self) -> str:
        """Of timm's repository; where there is a url, it is the url that counts."""
        return f"timm/{self.name}.{self.tag}"

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1] if self.url else FILE_NAMES[0]

    @property
    def layout(self) -> str:
        """Of the file: the library that published it."""
        if self.url is None:
            return "timm"
        return "torchvision" if self.url.startswith(_TORCHVISION) else "lukemelas"


class PretrainedUnavailable(OSError):
    """Weights could not be had from where they are published."""


_HALF: dict[str, Any] = {"mean": HALF, "std": HALF}


def _hub(
    name: str, tag: str, crop: int, crop_pct: float | None = None, num_classes: int = 1000, half: bool = False, **settings: str
) -> Source:
    return Source(name, tag, Preprocessing.of(crop, crop_pct, **settings, **(_HALF if half else {})), num_classes)


def _torchvision(name: str, file: str, crop: int, resize: int, interpolation: str = "bicubic", tag: str = "tv_in1k") -> Source:
    return Source(name, tag, Preprocessing(crop, resize, interpolation=interpolation), url=_TORCHVISION + file)


def _lukemelas(size: str, crop: int, digest: str, adversarial: bool = False) -> Source:
    url = f"{_LUKEMELAS}{'adv-' if adversarial else ''}efficientnet-{size}-{digest}.pth"
    preprocessing = Preprocessing(crop, crop, **(_HALF if adversarial else {}))
    return Source(f"tf_efficientnet_{size}", f"lukemelas_{'adv_' if adversarial else ''}in1k", preprocessing, url=url)


# Of the weights ported from TensorFlow: size, crop, tags by timm. Those trained with AdvProp ("ap") take 0.5 for mean and std.
_PORTED = (
    ("b0", 224, ("ns_jft_in1k", "ap_in1k", "aa_in1k", "in1k")),
    ("b1", 240, ("ns_jft_in1k", "ap_in1k", "aa_in1k", "in1k")),
    ("b2", 260, ("ns_jft_in1k", "ap_in1k", "aa_in1k", "in1k")),
    ("b3", 300, ("ns_jft_in1k", "ap_in1k", "aa_in1k", "in1k")),
    ("b4", 380, ("ns_jft_in1k", "ap_in1k", "aa_in1k", "in1k")),
    ("b5", 456, ("ns_jft_in1k", "ap_in1k", "ra_in1k", "aa_in1k", "in1k")),
    ("b6", 528, ("ns_jft_in1k", "ap_in1k", "aa_in1k")),
    ("b7", 600, ("ns_jft_in1k", "ap_in1k", "ra_in1k", "aa_in1k")),
    ("b8", 672, ("ap_in1k", "ra_in1k")),
)

_SOURCES = (
    _hub("efficientnet_b0", "ra_in1k", 224, 0.875),
    _hub("efficientnet_b0", "ra4_e3600_r224_in1k", 256, 1.0, half=True),
    _hub("efficientnet_b1", "ra4_e3600_r240_in1k", 288, 1.0, half=True),
    _hub("efficientnet_b1", "ft_in1k", 256, 1.0),
    _hub("efficientnet_b2", "ra_in1k", 288, 1.0),
    _hub("efficientnet_b3", "ra2_in1k", 320, 1.0),
    _hub("efficientnet_b4", "ra2_in1k", 384, 1.0),
    _hub("efficientnet_b5", "sw_in12k_ft_in1k", 448, 1.0, crop_mode="squash"),
    _hub("efficientnet_b5", "sw_in12k", 416, 0.95, num_classes=11821),
    _hub("efficientnet_lite0", "ra_in1k", 224, 0.875),
    _torchvision("efficientnet_b0", "efficientnet_b0_rwightman-7f5810bc.pth", 224, 256),
    _torchvision("efficientnet_b1", "efficientnet_b1-c27df63c.pth", 240, 255, "bilinear", tag="tv_in1k_v2"),
    _torchvision("efficientnet_b1", "efficientnet_b1_rwightman-bac287d4.pth", 240, 256),
    _torchvision("efficientnet_b2", "efficientnet_b2_rwightman-c35c1473.pth", 288, 288),
    _torchvision("efficientnet_b3", "efficientnet_b3_rwightman-b3899882.pth", 300, 320),
    _torchvision("efficientnet_b4", "efficientnet_b4_rwightman-23ab8bcd.pth", 380, 384),
    _torchvision("efficientnet_b5", "efficientnet_b5_lukemelas-1a07897c.pth", 456, 456),
    _torchvision("efficientnet_b6", "efficientnet_b6_lukemelas-24a108a5.pth", 528, 528),
    _torchvision("efficientnet_b7", "efficientnet_b7_lukemelas-c5b4e57e.pth", 600, 600),
    _torchvision("efficientnetv2_s", "efficientnet_v2_s-dd5fe13b.pth", 384, 384, "bilinear"),
    _torchvision("efficientnetv2_m", "efficientnet_v2_m-dc08266a.pth", 480, 480, "bilinear"),
    Source("efficientnetv2_l", "tv_in1k", Preprocessing(480, 480, **_HALF), url=f"{_TORCHVISION}efficientnet_v2_l-59c71312.pth"),
    *(_hub(f"tf_efficientnet_{size}", tag, crop, half=tag == "ap_in1k") for size, crop, tags in _PORTED for tag in tags),
    _hub("tf_efficientnet_l2", "ns_jft_in1k_475", 475),
    _hub("tf_efficientnet_l2", "ns_jft_in1k", 800),
    _hub("tf_efficientnet_lite0", "in1k", 224, half=True),
    _hub("tf_efficientnet_lite1", "in1k", 240, half=True),
    _hub("tf_efficientnet_lite2", "in1k", 260, half=True),
    _hub("tf_efficientnet_lite3", "in1k", 300, half=True, interpolation="bilinear"),
    _hub("tf_efficientnet_lite4", "in1k", 380, 0.92, half=True, interpolation="bilinear"),
    _hub("tf_efficientnetv2_b0", "in1k", 224),
    _hub("tf_efficientnetv2_b1", "in1k", 240),
    _hub("tf_efficientnetv2_b2", "in1k", 260),
    _hub("tf_efficientnetv2_b3", "in21k_ft_in1k", 300, 0.9, half=True, crop_mode="squash"),
    _hub("tf_efficientnetv2_b3", "in1k", 300),
    _hub("tf_efficientnetv2_b3", "in21k", 300, num_classes=21843, half=True),
    _hub("tf_efficientnetv2_s", "in21k_ft_in1k", 384, 1.0, half=True),
    _hub("tf_efficientnetv2_s", "in1k", 384, 1.0, half=True),
    _hub("tf_efficientnetv2_s", "in21k", 384, 1.0, num_classes=21843, half=True),
    _hub("tf_efficientnetv2_m", "in21k_ft_in1k", 480, 1.0, half=True, crop_mode="squash"),
    _hub("tf_efficientnetv2_m", "in1k", 480, 1.0, half=True, crop_mode="squash"),
    _hub("tf_efficientnetv2_m", "in21k", 480, 1.0, num_classes=21843, half=True, crop_mode="squash"),
    _hub("tf_efficientnetv2_l", "in21k_ft_in1k", 480, 1.0, half=True, crop_mode="squash"),
    _hub("tf_efficientnetv2_l", "in1k", 480, 1.0, half=True, crop_mode="squash"),
    _hub("tf_efficientnetv2_l", "in21k", 480, 1.0, num_classes=21843, half=True, crop_mode="squash"),
    _hub("tf_efficientnetv2_xl", "in21k_ft_in1k", 512, 1.0, half=True, crop_mode="squash"),
    _hub("tf_efficientnetv2_xl", "in21k", 512, 1.0, num_classes=21843, half=True, crop_mode="squash"),
    _lukemelas("b0", 224, "355c32eb"),
    _lukemelas("b1", 240, "f1951068"),
    _lukemelas("b2", 260, "8bb594d6"),
    _lukemelas("b3", 300, "5fb5a3c3"),
    _lukemelas("b4", 380, "6ed6700e"),
    _lukemelas("b5", 456, "b6417697"),
    _lukemelas("b6", 528, "c76e70fd"),
    _lukemelas("b7", 600, "dcc49843"),
    _lukemelas("b0", 224, "b64d5a18", adversarial=True),
    _lukemelas("b1", 240, "0f3ce85a", adversarial=True),
    _lukemelas("b2", 260, "6e9d97e5", adversarial=True),
    _lukemelas("b3", 300, "cdd7c0f4", adversarial=True),
    _lukemelas("b4", 380, "44fb3a87", adversarial=True),
    _lukemelas("b5", 456, "86493f6b", adversarial=True),
    _lukemelas("b6", 528, "ac80338e", adversarial=True),
    _lukemelas("b7", 600, "4652b6dd", adversarial=True),
    _lukemelas("b8", 672, "22a8fe65", adversarial=True),
)

# name -> tag -> source, the default tag first.
SOURCES: dict[str, dict[str, Source]] = {}
for _source in _SOURCES:
    SOURCES.setdefault(_source.name, {})[_source.tag] = _source


def source_of(name: str, tag: str | None = None) -> Source:
    """The weights of ``name`` under ``tag``, by default its first; ValueError where it has none, or none of that tag."""
    if name not in SOURCES:
        ported = f"those of tf_{name}, which pads as TensorFlow does, or " if f"tf_{name}" in SOURCES else ""
        raise ValueError(f"{name} has no pretrained weights; {ported}the path of a checkpoint would do")
    known = SOURCES[name]
    if tag is not None and tag not in known:
        tags = ", ".join(map(repr, known))
        raise ValueError(f"{name} has no pretrained weights {tag!r}; {tags} or the path of a checkpoint would do")
    return known[tag] if tag is not None else next(iter(known.values()))


def published_as(path: Path, name: str | None = None) -> Source | None:
    """Which published weights a local file is: by the hash in its name, or by the config.json of a copy of the hub's directory.

    Raises ValueError where that config.json is damaged, or is of another net than ``name``.
    """
    for known in SOURCES.values():
        for source in known.values():
            if source.url and source.file_name == path.name:
                return source
    described = path.with_name("config.json")
    if path.name not in FILE_NAMES or not described.is_file():
        return None
    try:
        card = json.loads(described.read_text(encoding="utf-8"))
        architecture, tag = card.get("architecture", name), card.get("pretrained_cfg", {}).get("tag")
        known = SOURCES.get(architecture, {})
        source_here = known.get(tag)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{described} is damaged: {error}") from error
    if known and name not in (None, architecture):
        raise ValueError(f"{path} holds weights of {architecture}, by the config.json beside it, and the model is {name}")
    return source_here


def library_default(name: str, layout: str) -> Source | None:
    """The weights that a library publishes first for a net of that name, with or without ``tf_``."""
    plain = name.removeprefix("tf_")
    found = (source for form in (plain, f"tf_{plain}") for source in SOURCES.get(form, {}).values() if source.layout == layout)
    return next(found, None)


def fetch(source: Source) -> Path:
    """The weights' file, from the cache of huggingface_hub or torch.hub, or downloaded into it and checked.

    Raises PretrainedUnavailable where that fails, ImportError where the hub's package is missing.
    """
    try:
        return _fetch_url(source.url) if source.url else _fetch_hub(source.hub_id)
    except ImportError:
        raise
    except Exception as error:  # whatever the network and two libraries of others may raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PretrainedUnavailable(
            f"the weights {source.name}.{source.tag} could not be fetched from {source.url or source.hub_id} "
            f"({lines[0]}); offline, the path of a copy of {source.file_name}, or of its directory, would do"
        ) from error


def _fetch_hub(hub_id: str) -> Path:
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"the weights of {hub_id} need huggingface_hub: pip install 'effnet-fast[weights]' would do") from error
    try:
        return Path(hf_hub_download(hub_id, FILE_NAMES[0], local_files_only=True))
    except LocalEntryNotFoundError:
        # One request without retries: hf_hub_download itself tries an unreachable hub six times.
        get_hf_file_metadata(hf_hub_url(hub_id, FILE_NAMES[0]), timeout=_TIMEOUT)
        return Path(hf_hub_download(hub_id, FILE_NAMES[0]))


def _fetch_url(url: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rsplit("/", 1)[1]
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rsplit("-", 1)[1]
        with _socket_timeout(_TIMEOUT):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
    return path


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # torch.hub gives its request no timeout of its own.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
