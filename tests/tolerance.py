"""The one rule of comparison: a result may be at most twice as far from the fp64 reference as plain PyTorch is, plus one ulp."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.benchmark.tolerance import largest, ulp, why_wrong

__all__ = ["assert_2x", "largest", "ulp"]


def assert_2x(out: Tensor, plain: Tensor, ref64: Tensor, what: str = "") -> None:
    """``max|out - ref64| <= 2 * max|plain - ref64| + 1 ulp of max|ref64|``, maxima over the tensor.

    out, plain  the result under test and plain PyTorch's, in the same dtype
    ref64       the same quantity in float64
    """
    assert out.shape == ref64.shape == plain.shape, f"{what}: shapes {out.shape}, {plain.shape}, {ref64.shape}"
    assert out.dtype == plain.dtype and ref64.dtype == torch.float64, f"{what}: dtypes {out.dtype}, {plain.dtype}, {ref64.dtype}"
    assert torch.isfinite(ref64).all(), f"{what}: the reference is not finite"
    wrong = why_wrong(out, plain, ref64)
    assert wrong is None, f"{what}: {wrong}"
