"""The tables of the EfficientNet paper (arXiv 1905.11946v5) made again: what is counted here beside what is printed there, the
difference, and whether the print is the count, rounded. Accuracies are the paper's own, which its versions have differently.
Ratios to the nets of others are of the table's own figures. One convention holds for all rows: layers
rounded up, channels to the nearest multiple of 8 (90 % at least), the image side to the nearest pixel, and multiply-adds counted,
those of convolutions and the classifier. Where a figure does not follow from it, other rules are tried, each combination of them:
one that fits is named, though of so many some fit by chance, and where none does, the nearest is. A ratio that the figures give
before they are rounded is "within the rounding of its figures". At last, what courses say, and what is so.

examples: effnet-fast tables
          effnet-fast tables --only scaled-up --json tables.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effnet_fast.cli.options import check_output
from effnet_fast.cli.table import table
from effnet_fast.scaling.courses import claims
from effnet_fast.scaling.grid import write_json
from effnet_fast.scaling.published import B0_SCALED, FAMILY, SCALED_UP, UNITS, Figure
from effnet_fast.scaling.rules import AXES, COUNTS, given_by_rule
from effnet_fast.scaling.tables import REPRODUCED, TABLES, VERDICTS, WITHIN, Comparison, PaperTable

_COURSES = "courses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=[*TABLES, _COURSES], help="one of them (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them there too, with all that other rules give")


def run(arguments: argparse.Namespace) -> int:
    if arguments.json:
        check_output("json", arguments.json, None)
    names = [arguments.only] if arguments.only else [*TABLES, _COURSES]
    made = [TABLES[name]() for name in names if name != _COURSES]
    answers = claims() if _COURSES in names else ()
    for one in made:
        print(f"{one.title} ({one.source})\n")
        print(table(_HEADER, _lines(one), "lrrlrrrll") + "\n")
    if made:
        comparisons = [comparison for one in made for row in one.rows for comparison in row.comparisons]
        verdicts = Counter(comparison.verdict for comparison in comparisons)
        print(
            f"{verdicts[REPRODUCED]} of {len(comparisons)} figures follow from the one convention (effnet-fast tables --help says "
            "which); " + ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS[1:])
        )
        if not arguments.only:
            nets = (*FAMILY, *SCALED_UP, *B0_SCALED)
            most = max(given_by_rule(nets).values())
            print(f"no single rule gives more than {most} of the {len(nets)} multiply-add counts")
        print("rules that are combined, the convention's first: " + "; ".join(" | ".join(axis) for axis in (*AXES, COUNTS)))
    for claim in answers:
        print(f"\nsaid  {claim.said}\nso    {claim.so}")
    if arguments.json:
        told: dict[str, Any] = {one.name: _json(one) for one in made}
        write_json(arguments.json, told | ({_COURSES: [claim._asdict() for claim in answers]} if answers else {}))
    return 0


_HEADER = ("", "top-1", "top-5", "figure", "published", "computed", "difference", "verdict", "other rules")


def _lines(made: PaperTable) -> Iterator[tuple[Any, ...]]:
    for row in made.rows:
        name: tuple[Any, ...] = row.name, f"{row.top1:.1f}", row.top5 and f"{row.top5:.1f}"
        if not row.comparisons:
            yield (*name, "", None, None, None, "", "")
        for one in row.comparisons:
            computed = _in_unit(one.computed, one.published)
            difference = _in_unit(one.difference, one.published, "+.2g")
            yield (*name, one.quantity, one.published.text, computed, difference, one.verdict, _others(one))
            name = "", "", ""


def _in_unit(value: float, figure: Figure, digits: str = ".4g") -> str:
    return f"{value / UNITS[figure.unit]:{digits}}{figure.unit}"


def _others(one: Comparison) -> str:
    if one.nearest is None:
        return ""
    if one.verdict == WITHIN:
        return f"{one.published.text}: of figures that round to these"
    told = one.fits[0] if one.fits else one.nearest
    return f"{len(one.fits) or 'none'} of {len(one.tried)} fit; {_in_unit(told.value, one.published)}: {told.rule}"


def _json(made: PaperTable) -> dict[str, Any]:
    def compared(one: Comparison) -> dict[str, Any]:
        return {
            "figure": one.quantity,
            "published": one.published.text,
            "computed": one.computed,
            "difference": one.difference,
            "tolerance": one.published.tolerance,
            "verdict": one.verdict,
            "unrounded": one.unrounded,
            "tried": [alternative._asdict() for alternative in one.tried],
        }

    rows = [{**row._asdict(), "comparisons": [compared(one) for one in row.comparisons]} for row in made.rows]
    return {**made._asdict(), "rows": rows}
