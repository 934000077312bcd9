"""Pretrained weights into a model: from their source, a file or a directory; for other classes or channels where asked."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from effnet_fast.scaling.names import names_of
from effnet_fast.weights.checkpoint import Net, check_net, fill
from effnet_fast.weights.files import locate, read
from effnet_fast.weights.layouts import detect, key_map
from effnet_fast.weights.sources import SOURCES, Source, fetch, source_of

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")


def load_pretrained(model: Net, pretrained: bool | str | os.PathLike[str]) -> None:
    """Load the default weights of the model's name (True), those of a tag, or those of a file or directory.

    A classifier for another number of classes is left as it is. A stem for other than three channels is given the pretrained one
    summed over the colours (one channel), or repeated and scaled by 3 / channels. What travels with the weights is adopted, as
    :func:`load_checkpoint` does, and ``default_cfg`` is set to theirs.

    Raises ValueError for an unknown tag (it lists the known ones), FileNotFoundError, PretrainedUnavailable (an OSError) without a
    network, and what load_checkpoint raises.
    """
    check_net("load_pretrained", model)
    name = model.config.name
    if pretrained is True:
        source: Source | None = source_of(name)
        path = fetch(source)  # type: ignore[arg-type]
    elif isinstance(pretrained, str) and pretrained in SOURCES.get(name, {}):
        source = source_of(name, pretrained)
        path = fetch(source)
    elif isinstance(pretrained, os.PathLike) or (isinstance(pretrained, str) and _is_path(pretrained)):
        path = locate(pretrained, *(known.file_name for known in SOURCES.get(name, {}).values() if known.url))
        source = None  # fill looks at the name of the file and beside it
    elif isinstance(pretrained, str) and pretrained:
        source_of(name, pretrained)  # raises: the tag is unknown
        return
    else:
        raise TypeError(f"load_pretrained: pretrained is {pretrained!r}; True, a tag or a path would do")
    checkpoint = read(path)
    _adapt_stem(checkpoint.state_dict, model)
    fill(model, path, checkpoint, new_head=True, source=source)


def _is_path(text: str) -> bool:
    return os.path.exists(os.path.expanduser(text)) or os.sep in text or text.endswith(_SUFFIXES)


def _adapt_stem(tensors: dict[str, Tensor], model: Net) -> None:
    channels = model.config.in_channels
    try:
        key = key_map(model.config, detect(tensors, model.config))[f"{names_of(model.config).stem[0]}.weight"]
    except ValueError:
        return  # fill says what is wrong
    weight = tensors.get(key)
    if weight is None or weight.dim() != 4 or weight.shape[1] != 3 or channels == 3:
        return
    exact = weight.to(torch.float32)
    if channels == 1:
        tensors[key] = exact.sum(1, keepdim=True)
    else:
        tensors[key] = exact.repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels] * (3 / channels)
