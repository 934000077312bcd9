"""depthwise_conv_bn_act in Triton, over NHWC: for GPUs on which the compiled module is absent.

One program owns BLOCK_C channels of one piece of an image, and walks over it BLOCK_P output pixels at a time. Each tap is one load
of x (through L1: x is read k*k times from there, once from HBM) and one multiply-add; the norm, the activation and the sum over the
piece follow in registers. Those loads bind it, not HBM: 25 of them an output for 5x5.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.common import output_size
from effnet_fast.ops.depthwise import KERNELS, STRIDES, triton_pieces
from effnet_fast.ops.triton_common import (
    activate,
    alignment,
    cdiv,
    channels_last,
    converted,
    folded_norm,
    next_power_of_2,
    run,
    stored,
    vectors,
)


@triton.jit(
    do_not_specialize=["norm_eps", "height", "width", "out_height", "out_width", "top", "left", "pieces", "channel_groups"],
)
def _kernel(
    x,
    weight,
    norm_weight,
    norm_bias,
    norm_mean,
    norm_var,
    norm_eps,
    y,
    partial,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    pieces,
    channel_groups,
    ALIGN_C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channel_groups * ALIGN_C
    blocks = tl.cdiv(channels, BLOCK_C)
    block, owner = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, piece = (owner // pieces).to(tl.int64), owner % pieces
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < channels
    scale, shift = folded_norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps, c, c_inside)
    pixels = out_height * out_width
    x_image = x + image * height * width * channels
    y_image = y + image * pixels * channels
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(piece, tl.cdiv(pixels, BLOCK_P), pieces):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        p_inside = p < pixels
        row, column = p // out_width * STRIDE - top, p % out_width * STRIDE - left
        sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for dy in tl.static_range(KERNEL):
            for dx in tl.static_range(KERNEL):
                inside = (row + dy >= 0) & (row + dy < height) & (column + dx >= 0) & (column + dx < width) & p_inside
                at = (row + dy) * width + column + dx
                if WIDE:
                    at = at.to(tl.int64)
                values = tl.load(
                    x_image + (at * channels)[:, None] + c[None, :], mask=inside[:, None] & c_inside[None, :], other=0.0
                )
                tap = tl.load(weight + c * (KERNEL * KERNEL) + (dy * KERNEL + dx), mask=c_inside, other=0.0)
                sums += values.to(tl.float32) * converted(tap, x.dtype.element_ty).to(tl.float32)[None, :]
        out = stored(activate(sums * scale[None, :] + shift[None, :], ACTIVATION), y.dtype.element_ty)
        mask = p_inside[:, None] & c_inside[None, :]
        if WIDE:
            p = p.to(tl.int64)
        tl.store(y_image + (p * channels)[:, None] + c[None, :], out, mask=mask)
        if partial is not None:
            total += tl.where(mask, out.to(tl.float32), 0.0)  # of what was stored, as the reference's squeeze
    if partial is not None:
        tl.store(partial + (image * pieces + piece) * channels + c, tl.sum(total, 0), mask=c_inside)


@dataclass(frozen=True)
class Config:
    """A program's step: ``block_p`` output pixels of ``block_c`` channels."""

    block_p: int
    block_c: int
    num_warps: int


@functools.cache
def choose_config(pixels: int, channels: int, itemsize: int, kernel: int) -> Config:
    """A cache line of channels; two vectors of 16 bytes a thread, so that a tap of the weight is loaded once for two pixels.

    One vector for 5x5: with two, ptxas spills on sm_100.
    """
    block_c = min(max(next_power_of_2(channels), 16), 128 // itemsize)
    num_warps = 4
    block_p = num_warps * 32 * (2 if kernel == 3 else 1) * 16 // itemsize // block_c
    return Config(min(block_p, max(next_power_of_2(pixels), 8)), block_c, num_warps)


def launch(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor,
    norm_var: Tensor,
    norm_eps: float,
    stride: int,
    padding: list[int],
    activation: str,
    pieces: int,
    *,
    y: Tensor,
    partial: Tensor,
) -> None:
    """Write ``depthwise_conv_bn_act(...)`` into ``y`` and ``partial``."""
    op = "depthwise_conv_bn_act"
    images, channels, height, width = x.shape
    kernel = weight.shape[2]
    top, bottom, left, right = padding
    out_height = output_size(height, kernel, stride, top, bottom)
    out_width = output_size(width, weight.shape[3], stride, left, right)
    if (kernel, weight.shape[3]) not in KERNELS or stride not in STRIDES:
        raise ValueError(f"{op}: kernel {tuple(weight.shape[2:])}, stride {stride}; 3x3 or 5x5 and 1 or 2 would do")
    if y.numel() == 0:
        return
    config = choose_config(out_height * out_width, channels, x.element_size(), kernel)
    owners = pieces or triton_pieces(x, out_height, out_width)
    run(
        _kernel,
        images * owners * cdiv(channels, config.block_c),
        channels_last(x),
        weight.contiguous(),
        *vectors(norm_weight, norm_bias, norm_mean, norm_var),
        norm_eps,
        y,
        partial if pieces else None,
        height,
        width,
        out_height,
        out_width,
        top,
        left,
        owners,
        channels // alignment(channels),
        ALIGN_C=alignment(channels),
        KERNEL=kernel,
        STRIDE=stride,
        ACTIVATION=activation,
        WIDE=channels * max(height * width, out_height * out_width) >= 2**31,
        BLOCK_P=config.block_p,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
