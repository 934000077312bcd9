"""State dicts, compared."""

from __future__ import annotations

import torch
from torch import Tensor


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether they hold the same tensors, to the bit, under the same keys."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
