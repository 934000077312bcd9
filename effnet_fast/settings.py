"""The settings that a stored result was made with, beside those that are asked for now."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

_MOST = 200  # characters of a value in an error


def plain(value: Any) -> Any:
    """As JSON has it: dataclasses become objects, tuples lists."""
    return json.loads(json.dumps(value, default=asdict))


def differing(stored: Mapping[str, Any], asked: Any) -> str:
    """Each setting that is another, as "NAME STORED, not ASKED", of long ones where they differ first; "" where none is.

    asked  a mapping by name, or a dataclass; where one of its values is a dataclass, it is compared field by field. A field that
           ``stored`` has not is taken to have had its default: it came after that result.
    """
    return "; ".join(f"{name} {', not '.join(_told(there, here))}" for name, there, here in _differing(stored, asked))


def _told(*values: Any) -> list[str]:
    """Two values in words: of long ones the part where they differ first."""
    texts = list(map(repr, values))
    first = max(0, len(os.path.commonprefix(texts)) - _MOST // 2) if max(map(len, texts)) > _MOST else 0
    cut = [text[first : first + _MOST] for text in texts]
    return [f"{'...' * (first > 0)}{part}{'...' * (first + len(part) < len(text))}" for part, text in zip(cut, texts, strict=True)]


def _differing(stored: Mapping[str, Any], asked: Any) -> list[tuple[str, Any, Any]]:
    defaults: dict[str, Any] = {}
    if is_dataclass(asked):
        defaults = {field.name: field.default for field in fields(asked) if field.default is not MISSING}
        asked = {field.name: getattr(asked, field.name) for field in fields(asked)}
    found: list[tuple[str, Any, Any]] = []
    for name in {**asked, **stored}:
        there, here = stored.get(name, defaults.get(name)), asked.get(name)
        if is_dataclass(here) and isinstance(there, Mapping):
            found += [(f"{name}.{field}", *values) for field, *values in _differing(there, here)]
        elif plain(there) != plain(here):
            found.append((name, plain(there), plain(here)))
    return found
