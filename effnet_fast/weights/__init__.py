"""Checkpoints, where pretrained weights come from, and the preprocessing that travels with them."""

from __future__ import annotations

from effnet_fast.weights.checkpoint import convert, default_cfg, load_checkpoint, net_of, preprocessing_of, save_checkpoint
from effnet_fast.weights.files import Checkpoint, read, write
from effnet_fast.weights.layouts import LAYOUTS, detect, key_map
from effnet_fast.weights.preprocessing import Preprocessing
from effnet_fast.weights.pretrained import load_pretrained
from effnet_fast.weights.sources import SOURCES, PretrainedUnavailable, Source, fetch, source_of

__all__ = [
    "LAYOUTS",
    "SOURCES",
    "Checkpoint",
    "Preprocessing",
    "PretrainedUnavailable",
    "Source",
    "convert",
    "default_cfg",
    "detect",
    "fetch",
    "key_map",
    "load_checkpoint",
    "load_pretrained",
    "net_of",
    "preprocessing_of",
    "read",
    "save_checkpoint",
    "source_of",
    "write",
]
