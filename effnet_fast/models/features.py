"""Where a network's feature maps are: the last block before each halving of the resolution, and the last of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effnet_fast.scaling.config import NetConfig


class FeatureInfo(list[dict[str, Any]]):
    """One dict a feature map: ``stage`` (0 the stem, i + 1 for ``blocks.i``), ``module``, ``num_chs``, ``reduction``, ``index``."""

    def __init__(self, config: NetConfig, out_indices: Sequence[int] | None = None) -> None:
        rows = []
        if config.stages[0].stride == 2:
            rows.append({"stage": 0, "module": "bn1", "num_chs": config.stem_channels, "reduction": config.stem_stride})
        reduction = config.stem_stride
        for number, stage in enumerate(config.stages, start=1):
            reduction *= stage.stride
            if number == len(config.stages) or config.stages[number].stride == 2:
                rows.append(
                    {"stage": number, "module": f"blocks.{number - 1}", "num_chs": stage.out_channels, "reduction": reduction}
                )
        rows = [{**row, "index": index} for index, row in enumerate(rows)]
        super().__init__(rows if out_indices is None else [rows[i] for i in out_indices])

    def channels(self) -> list[int]:
        return [row["num_chs"] for row in self]

    def reduction(self) -> list[int]:
        return [row["reduction"] for row in self]

    def module_name(self) -> list[str]:
        return [row["module"] for row in self]

    def get_dicts(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self]


def take_indices(who: str, indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Which of ``count`` feature maps: all (None), the last n (a number), or those listed, ascending."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"{who}: {indices} maps asked for; 1 to {count} would do")
        return list(range(count - indices, count))
    taken = sorted(index + count if index < 0 else index for index in indices)
    if not taken or taken[0] < 0 or taken[-1] >= count or len(set(taken)) != len(taken):
        raise ValueError(f"{who}: {list(indices)}; different indices within 0 to {count - 1} would do")
    return taken
