"""The one rule of comparison: a result may be at most twice as far from the fp64 reference as plain PyTorch is, plus one ulp."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.benchmark.tolerance import largest, ulp, why_wrong

__all__ = ["assert_2x", "assert_2x_of_all", "largest", "ulp"]


def assert_2x(out: Tensor, plain: Tensor, ref64: Tensor, what: str = "") -> None:
    """``max|out - ref64| <= 2 * max|plain - ref64| + 1 ulp of max|ref64|``, maxima over the tensor.

    out, plain  the result under test and plain PyTorch's, in the same dtype
    ref64       the same quantity in float64
    """
    assert out.shape == ref64.shape == plain.shape, f"{what}: shapes {out.shape}, {plain.shape}, {ref64.shape}"
    assert out.dtype == plain.dtype and ref64.dtype == torch.float64, f"{what}: dtypes {out.dtype}, {plain.dtype}, {ref64.dtype}"
    assert torch.isfinite(ref64).all(), f"{what}: the reference is not finite"
    assert torch.isfinite(plain).all(), f"{what}: plain PyTorch's is not finite, and would excuse anything"
    wrong = why_wrong(out, plain, ref64)
    assert wrong is None, f"{what}: {wrong}"


OUTLIERS = 0.1  # of many tensors, the share that may break the rule, or two
FACTOR = 8  # in place of 2 for those


def assert_2x_of_all(out: dict[str, Tensor], plain: dict[str, Tensor], ref64: dict[str, Tensor], what: str = "") -> None:
    """The rule for each of many tensors, such as a net's gradients; a tenth of them, or two, may have FACTOR for 2.

    Of hundreds of pairs of equally large rounding errors some differ by more than twice, above all where a tensor has few elements.
    """
    assert out.keys() == plain.keys() == ref64.keys(), what
    broken = []
    for key, reference in ref64.items():
        told, given, unit = f"{what} {key}", out[key], ulp(reference.abs().max().item(), out[key].dtype)
        assert given.shape == reference.shape == plain[key].shape and given.dtype == plain[key].dtype, told
        assert torch.isfinite(reference).all() and torch.isfinite(given).all(), f"{told}: not finite"
        error, theirs = ((t.double() - reference).abs().max().item() for t in (given, plain[key]))
        assert error <= FACTOR * (theirs + unit), f"{told}: off by {error:.3e}; plain PyTorch {theirs:.3e}, one ulp {unit:.3e}"
        if error > 2 * theirs + unit:
            broken.append(f"{key}: off by {error:.3e}; plain PyTorch {theirs:.3e}, one ulp {unit:.3e}")
    told = "\n".join([f"{what}: {len(broken)} of {len(ref64)} break the rule", *broken])
    assert len(broken) <= max(2, OUTLIERS * len(ref64)), told
