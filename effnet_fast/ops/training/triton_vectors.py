"""What is of size K around a norm in training, in Triton: one launch where PyTorch's own ops are five or six."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.training.triton import of_channels
from effnet_fast.ops.triton_common import cdiv, run, vectors

BLOCK_C = 128


@triton.jit(do_not_specialize=["channels"])
def _norm_vectors(mean, var, weight, bias, norm, inverse, eps, channels, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    root = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + c, mask=inside, other=1.0) + eps))
    tl.store(inverse + c, root, mask=inside)
    tl.store(norm + c, tl.load(mean + c, mask=inside), mask=inside)
    scale, shift = root, tl.zeros([BLOCK_C], tl.float32)
    if weight is not None:
        scale *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(norm + channels + c, scale, mask=inside)
    tl.store(norm + 2 * channels + c, shift, mask=inside)


@triton.jit(do_not_specialize=["values", "channels"])
def _norm_coefficients(
    sums, norm, inverse, coefficients, grad_weight, values, channels, FROZEN: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    _, scale, _ = of_channels(norm, channels, c, inside)
    total = tl.load(sums + c, mask=inside, other=0.0)
    root = tl.load(inverse + c, mask=inside, other=0.0)
    of_weight = tl.load(sums + channels + c, mask=inside, other=0.0) * root
    tl.store(grad_weight + c, of_weight, mask=inside)
    if FROZEN:
        of_y = tl.zeros([BLOCK_C], tl.float32)
        shift = of_y
    else:
        share = tl.div_rn(scale, -values.to(tl.float32))
        of_y, shift = of_weight * root * share, total * share
    tl.store(coefficients + c, scale, mask=inside)
    tl.store(coefficients + channels + c, of_y, mask=inside)
    tl.store(coefficients + 2 * channels + c, shift, mask=inside)


def norm_vectors(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, norm: Tensor, inverse: Tensor
) -> None:
    channels = mean.shape[0]
    arguments = *vectors(mean, var, weight, bias), norm, inverse, eps, channels
    run(_norm_vectors, cdiv(channels, BLOCK_C), *arguments, BLOCK_C=BLOCK_C, num_warps=4)


def norm_coefficients(
    sums: Tensor, norm: Tensor, inverse: Tensor, values: int | None, *, coefficients: Tensor, grad_weight: Tensor
) -> None:
    channels, frozen = inverse.shape[0], values is None
    arguments = *vectors(sums, norm, inverse), coefficients, grad_weight, 1 if frozen else values, channels
    run(_norm_coefficients, cdiv(channels, BLOCK_C), *arguments, FROZEN=frozen, BLOCK_C=BLOCK_C, num_warps=4)
