"""Aligned text: tables, and numbers with a unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> str:
    """Rows under a header; ``align`` has "l" or "r" for each column. Whole numbers get thousands separators, None is "-"."""
    lines = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    justify = {"l": str.ljust, "r": str.rjust}
    return "\n".join(
        "  ".join(justify[side](cell, width) for cell, width, side in zip(line, widths, align, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def si(value: float, unit: str = "") -> str:
    """Four significant digits and a decimal prefix: ``si(10266000000, "MACs")`` is "10.27 GMACs"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.99995:
            digits = f"{value / size:#.4g}".rstrip(".")
            return f"{digits} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()
