"""Whether a result is correct: its distance from float64 against that of plain PyTorch in the same dtype."""

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


def why_wrong(out: Tensor, plain: Tensor, ref64: Tensor, factor: float = 2.0) -> str | None:
    """None where ``max|out - ref64| <= factor * max|plain - ref64| + 1 ulp of max|ref64|``, maxima over the tensor; else why.

    out, plain  the result under judgement and plain PyTorch's
    ref64       the same quantity in float64
    """
    if out.shape != ref64.shape:
        return f"shape {tuple(out.shape)}; {tuple(ref64.shape)} would do"
    error, plain_error = largest(out.double() - ref64), largest(plain.double() - ref64)
    limit = factor * plain_error + ulp(largest(ref64), out.dtype)
    if error <= limit:  # false for NaN
        return None
    return f"off by {error:.3e}; plain PyTorch {plain_error:.3e}, limit {limit:.3e}"
