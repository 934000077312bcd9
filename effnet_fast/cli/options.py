"""Values of command-line options, and the model that several commands are given."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LOADERS = min(4, CORES)
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_QUANTITY = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)


def count(text: str) -> int:
    """A whole number >= 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def index(text: str) -> int:
    """A whole number >= 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 0")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """(0, 4) from 0/4: which share, and of how many. From nothing: this rank's, as torchrun says."""
    if not text:
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise argparse.ArgumentTypeError("RANK and WORLD_SIZE are not set, as torchrun does; --shard I/N would do without")
        text = f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}"
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; 0/2 and 1/2 would do, or --shard alone, and last, under torchrun")
    return int(found[1]), int(found[2])


def listed(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Several of what ``one`` reads, with commas; each once."""
    return lambda text: list(dict.fromkeys(one(part) for part in text.split(",")))


def one_of(*words: str) -> Callable[[str], str]:
    """One of the words."""

    def word(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(words)}")
        return text

    return word


def seconds(text: str) -> float:
    """A number > 0."""
    return positive(text, " of seconds")


def positive(text: str, unit: str = "") -> float:
    """A number > 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number{unit} > 0")
    return value


def check_output(option: str, path: Path, suffix: str | None) -> None:
    """Raise ValueError, before any work, where a file cannot be written there or its name does not end as it must."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--{option} is {path}; a file in a directory that exists would do")
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"--{option} is {path}; a name that ends in {suffix} would do")


def amount(text: str) -> float:
    """A number with a decimal prefix, such as 390M or 1.5G."""
    found = _QUANTITY.fullmatch(text.strip())
    if not found or found[3] or found[4]:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount; 390M or 1.5G would do")
    return float(found[1]) * _PREFIXES[found[2].lower()]


def memory(text: str) -> float:
    """Bytes: 500MB (decimal) or 2GiB (binary)."""
    found = _QUANTITY.fullmatch(text.strip())
    if not found or not found[4] or (found[3] and not found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; 500MB or 2GiB would do")
    if found[3]:
        return float(found[1]) * 1024 ** " kmgt".index(found[2].lower())
    return float(found[1]) * _PREFIXES[found[2].lower()]


def resolution(text: str) -> tuple[float, str]:
    """(260, "px") from 260px, (1.15, "x") from 1.15."""
    found = re.fullmatch(r"(\d+)px", text)
    if found:
        return float(found[1]), "px"
    try:
        return float(text), "x"
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no resolution; 1.15 (a multiplier) or 260px would do") from None
