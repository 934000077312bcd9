"""The reference of global_average_pool."""

from __future__ import annotations

from torch import Tensor


def global_average_pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))
