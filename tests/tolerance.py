"""The one rule of comparison: a result may be at most twice as far from the fp64 reference as plain PyTorch is, plus one ulp."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ulp(value: float, dtype: torch.dtype) -> float:
    """The spacing of ``dtype`` at ``value``."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_2x(out: Tensor, plain: Tensor, ref64: Tensor, what: str = "") -> None:
    """``max|out - ref64| <= 2 * max|plain - ref64| + 1 ulp of max|ref64|``, maxima over the tensor.

    out, plain  the result under test and plain PyTorch's, in the same dtype
    ref64       the same quantity in float64
    """
    assert out.shape == ref64.shape == plain.shape, f"{what}: shapes {out.shape}, {plain.shape}, {ref64.shape}"
    assert out.dtype == plain.dtype and ref64.dtype == torch.float64, f"{what}: dtypes {out.dtype}, {plain.dtype}, {ref64.dtype}"
    assert torch.isfinite(ref64).all(), f"{what}: the reference is not finite"
    error, plain_error = largest(out.double() - ref64), largest(plain.double() - ref64)
    limit = 2 * plain_error + ulp(largest(ref64), out.dtype)
    assert error <= limit, f"{what}: off by {error:.3e}; plain PyTorch {plain_error:.3e}, limit {limit:.3e}"
