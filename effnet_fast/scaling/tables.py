"""The paper's tables made again: each printed figure beside what the cost model counts, and whether the one follows from the other.

Nothing is fitted to the print: the convention (:mod:`effnet_fast.scaling.rules`) is the package's own. Where a figure does not
follow from it, what other rules give is told, and where none gives it, the figure is not reproduced. Accuracies are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from effnet_fast.scaling.coefficients import PUBLISHED
from effnet_fast.scaling.config import B0
from effnet_fast.scaling.cost import Cost
from effnet_fast.scaling.published import (
    B0_SCALED,
    FAMILY,
    OF_FAMILY,
    PAPER,
    RIVALS,
    SCALED_UP,
    TRANSFER,
    VERSIONS,
    Figure,
    PublishedNet,
    Rival,
    Transfer,
)
from effnet_fast.scaling.rules import Alternative, alternatives, convention

REPRODUCED, WITHIN, OTHERWISE, NOT_REPRODUCED = VERDICTS = (
    "reproduced",
    "within the rounding of its figures",
    "by another rule",
    "not reproduced",
)


@dataclass(frozen=True)
class Comparison:
    """A printed figure beside the computed one.

    Where they do not agree, ``tried`` holds what other rules give, and ``unrounded`` the nearest that a ratio comes to the printed
    one when its two figures are any that round to those printed.
    """

    quantity: str
    published: Figure
    computed: float
    tried: tuple[Alternative, ...] = ()
    unrounded: float | None = None

    @property
    def difference(self) -> float:
        """Computed less published."""
        return self.computed - self.published.value

    @cached_property
    def fits(self) -> tuple[Alternative, ...]:
        """Those of ``tried`` that round to the printed figure."""
        return tuple(one for one in self.tried if self.published.agrees(one.value))

    @property
    def nearest(self) -> Alternative | None:
        """The one of ``tried`` that comes nearest."""
        return min(self.tried, key=lambda one: abs(one.value - self.published.value), default=None)

    @property
    def verdict(self) -> str:
        """One of ``VERDICTS``, the first that holds."""
        if self.published.agrees(self.computed):
            return REPRODUCED
        if self.unrounded is not None and self.published.agrees(self.unrounded):
            return WITHIN
        return OTHERWISE if self.fits else NOT_REPRODUCED


class TableRow(NamedTuple):
    """A row: accuracies in percent as published, and its comparisons."""

    name: str
    top1: float
    top5: float | None
    comparisons: tuple[Comparison, ...]


class PaperTable(NamedTuple):
    """A table of the paper; ``source`` says where."""

    name: str
    title: str
    source: str
    rows: tuple[TableRow, ...]


def family_table() -> PaperTable:
    """B0 to B7, by the published coefficients."""
    return PaperTable("family", "EfficientNet-B0 to B7", f"{PAPER}, table 2; {OF_FAMILY}", _rows(FAMILY))


def versions_table() -> PaperTable:
    """The accuracies of B0 to B7 in two versions of the paper; nothing is computed."""
    rows = tuple(
        TableRow(f"{name}, {version}", *accuracies, ()) for version, nets in VERSIONS.items() for name, accuracies in nets.items()
    )
    return PaperTable("versions", "EfficientNet-B0 to B7 in other versions", "arXiv 1905.11946v1 and v5, table 2", rows)


def scaled_up_table() -> PaperTable:
    """MobileNets and ResNet-50, scaled by one dimension and by all three."""
    return PaperTable("scaled-up", "MobileNets and ResNet-50, scaled up", f"{PAPER}, table 3", _rows(SCALED_UP))


def b0_scaled_table() -> PaperTable:
    """B0, scaled by one dimension and by all three."""
    return PaperTable("b0-scaled", "EfficientNet-B0, scaled up", f"{PAPER}, table 7", _rows(B0_SCALED))


def rivals_table() -> PaperTable:
    """The nets of others: how many times the figures of the EfficientNet beside them, by the table's own print."""
    family = {net.name: net for net in FAMILY}
    rows = tuple(TableRow(one.name, one.top1, one.top5, tuple(_ratios(one, family[one.group]))) for one in RIVALS)
    return PaperTable("rivals", "The nets of others, over the EfficientNet of their group", f"{PAPER}, table 2", rows)


def transfer_table() -> PaperTable:
    """Accuracies on other data sets, with the parameters of the net that has as many classes."""
    rows = tuple(TableRow(f"{one.dataset}, {one.net}", one.accuracy, None, _transferred(one)) for one in TRANSFER)
    return PaperTable("transfer", "EfficientNets on other data sets", f"{PAPER}, table 5", rows)


TABLES: dict[str, Callable[[], PaperTable]] = {
    "family": family_table,
    "versions": versions_table,
    "scaled-up": scaled_up_table,
    "b0-scaled": b0_scaled_table,
    "rivals": rivals_table,
    "transfer": transfer_table,
}


def _ratios(rival: Rival, net: PublishedNet) -> Iterator[Comparison]:
    cost = convention(net)
    for quantity, ratio, above, below, counted in (
        ("parameters", rival.parameters_ratio, rival.parameters, net.parameters, cost.parameters),
        ("FLOPs", rival.flops_ratio, rival.flops, net.flops, cost.macs),
    ):
        if ratio is None or above is None or below is None:
            continue
        computed = above.value / below.value
        tried: tuple[Alternative, ...] = ()
        unrounded = None
        if not ratio.agrees(computed):
            least = (above.value - above.tolerance) / (below.value + below.tolerance)
            most = (above.value + above.tolerance) / (below.value - below.tolerance)
            tried = (Alternative(f"over our count of {net.name}", above.value / counted),)
            unrounded = min(max(ratio.value, least), most)
        yield Comparison(f"{quantity}, {above.text} / {below.text}", ratio, computed, tried, unrounded)


def _transferred(row: Transfer) -> tuple[Comparison, ...]:
    if row.parameters is None:
        return ()
    published = PUBLISHED[row.net.lower()]
    with_classes, without = (
        Cost.of(B0.scaled(published.depth, published.width, num_classes=classes)).parameters for classes in (row.classes, 0)
    )
    tried = () if row.parameters.agrees(with_classes) else (Alternative("without a classifier", without),)
    return (Comparison(f"parameters, {row.classes} classes", row.parameters, with_classes, tried),)


def _rows(nets: Sequence[PublishedNet]) -> tuple[TableRow, ...]:
    return tuple(TableRow(net.name, net.top1, net.top5, _compared(net)) for net in nets)


def _compared(net: PublishedNet) -> tuple[Comparison, ...]:
    cost = convention(net)
    counted = [("parameters", net.parameters, cost.parameters), ("FLOPs", net.flops, cost.macs)]
    return tuple(
        Comparison(quantity, figure, value, () if figure.agrees(value) else alternatives(net, quantity))
        for quantity, figure, value in counted
        if figure is not None
    )
