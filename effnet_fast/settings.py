"""The settings that a stored result was made with, beside those that are asked for now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any


def plain(value: Any) -> Any:
    """As JSON has it: dataclasses become objects, tuples lists."""
    return json.loads(json.dumps(value, default=asdict))


def differing(stored: Mapping[str, Any], asked: Any) -> str:
    """Each setting that is another, as "NAME STORED, not ASKED"; "" where none is.

    asked  a mapping by name, or a dataclass; where one of its values is a dataclass, it is compared field by field. A field that
           ``stored`` has not is taken to have had its default: it came after that result.
    """
    return "; ".join(f"{name} {there!r:.200}, not {here!r:.200}" for name, there, here in _differing(stored, asked))


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
