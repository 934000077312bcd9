"""pointwise_conv_bn_act in Triton: a GEMM of x as [N*H*W, C] with the weight [K, C]. On CUDA for what the native kernel leaves:
float32, odd channels, and few pixels.

A program owns some tiles of BLOCK_M pixels, one after the other, and BLOCK_N output channels. Where C fits one step it keeps the
weight, with the norm folded once and an image's gate multiplied in, and streams the tiles; else it walks over C for each, and the
gate is multiplied into x. C or K is small in EfficientNet: x is read and y is written once, C*K/(C+K) multiply-adds an element
moved, and HBM, L2 or the instructions of the epilogue bind: an expanded output takes 13 to 15 of them (sm_90), where 18 are free at
HBM's rate. Programs that share pixels are neighbours, so that L2 serves all but the first read of x.

On an H200, B0 at batch 256, a tile a program took 444 us for 16 to 96 channels at 112x112 and 609 for 24 to 144 at 56x56; tiles
that stream past a weight 235 and 113.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.triton_common import (
    INTERPRETED,
    activate,
    alignment,
    cdiv,
    channels_last,
    converted,
    dot,
    fold_norm,
    load_norm,
    matmul_precision,
    next_power_of_2,
    processors,
    run,
    stored,
    vectors,
)

IMAGE = 49  # pixels from which on a tile is of one image: 7x7 is three quarters of 64

# Products of two halves at once. A fused multiply-add with -0 is what sm_80 has for bf16.
_BF16_PAIRS: tl.constexpr = tl.constexpr("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }")
_FP16_PAIRS: tl.constexpr = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")


@triton.jit
def _product(a, gate):
    """``a * gate`` in the dtype of ``a``; ``gate`` is fp32, and rounded to halves first."""
    if a.dtype == tl.float32:
        return a * gate
    else:
        g = stored(gate, a.dtype)
        if INTERPRETED:
            return stored(a.to(tl.float32) * g.to(tl.float32), a.dtype)
        else:
            a, g = tl.broadcast(a, g)
            pairs: tl.constexpr = _BF16_PAIRS if a.dtype == tl.bfloat16 else _FP16_PAIRS
            return tl.inline_asm_elementwise(pairs, "=r,r,r", [a, g], dtype=a.dtype, is_pure=True, pack=2)


@triton.jit
def _tile_norm(variance, norm_weight, mean, norm_bias, inside, BLOCK_N: tl.constexpr, SPREAD: tl.constexpr):
    """The folded norm of BLOCK_N columns, each made by one thread and passed on to those that want it. Triton would have all of
    them made by every thread where there are fewer than threads; so there are SPREAD times as many, zeros where not ``inside``."""
    scale, shift = fold_norm(variance, norm_weight, mean, norm_bias)
    if SPREAD > 1:
        scale = tl.sum(tl.reshape(tl.where(inside, scale, 0.0), [SPREAD, BLOCK_N]), 0)
        shift = tl.sum(tl.reshape(tl.where(inside, shift, 0.0), [SPREAD, BLOCK_N]), 0)
    return scale, shift


@triton.jit(do_not_specialize=["norm_eps", "rows", "pixels", "tiles", "channel_groups", "output_groups"])
def _kernel(
    x,
    weight,
    norm_weight,
    norm_bias,
    norm_mean,
    norm_var,
    norm_eps,
    gate,
    residual,
    y,
    rows,
    pixels,
    tiles,
    channel_groups,
    output_groups,
    ALIGN_C: tl.constexpr,
    ALIGN_K: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_STEP: tl.constexpr,
    SPREAD: tl.constexpr,
    OUTER_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    channels, outputs = channel_groups * ALIGN_C, output_groups * ALIGN_K
    tiles_n, tiles_m = tl.cdiv(outputs, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    tile_n, owner = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    shares = tl.cdiv(tiles_m, tiles)
    group = (owner // shares).to(tl.int64)  # of rows: an image, or all of them
    first = owner % shares * tiles
    m, n, k = tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end repeat the last one: only the walk over C needs a mask.
    n_inside = tl.minimum(n, outputs - 1)
    weight_columns = weight + (n_inside * channels)[None, :]
    # The norm sets out before all else and is waited for last: its trip to L2 is then no link of the chain.
    column = tl.arange(0, SPREAD * BLOCK_N)
    of_norm = (column < BLOCK_N) & (tile_n * BLOCK_N + column < outputs)
    at = tl.minimum(tile_n * BLOCK_N + column % BLOCK_N, outputs - 1)
    variance, factor, mean, bias = load_norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps, at, of_norm)
    if ONE_STEP:
        b = tl.load(weight_columns + k[:, None], mask=(k < channels)[:, None], other=0.0)
        if gate is not None:
            g = tl.load(gate + group * channels + k, mask=k < channels, other=0.0)
            b = stored(b.to(tl.float32) * g[:, None], x.dtype.element_ty)
        else:
            b = converted(b, x.dtype.element_ty)
        scale, shift = _tile_norm(variance, factor, mean, bias, of_norm, BLOCK_N, SPREAD)
    for tile in tl.range(first, tl.minimum(first + tiles, tiles_m), num_stages=OUTER_STAGES):
        # The tile's first row carries the 64 bits; offsets within the tile fit in 32.
        row = tl.cast(tile, tl.int64) * BLOCK_M
        left = tl.minimum(rows - row, BLOCK_M).to(tl.int32)
        row += group * rows
        m_inside = tl.minimum(m, left - 1)
        x_rows = x + row * channels + (m_inside * channels)[:, None]
        offsets, mask = m[:, None] * outputs + n[None, :], (m < left)[:, None] & (n < outputs)[None, :]
        if ONE_STEP:
            if residual is not None:
                rest = tl.load(residual + row * outputs + offsets, mask=mask, other=0.0)
            a = tl.load(x_rows + k[None, :], mask=(k < channels)[None, :], other=0.0)
            sums = dot(a, b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        else:
            if residual is not None and BLOCK_M * BLOCK_N <= 512:  # as far as registers allow
                rest = tl.load(residual + row * outputs + offsets, mask=mask, other=0.0)
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, channels, BLOCK_K):
                inside = start + k < channels
                a = tl.load(x_rows + (start + k)[None, :], mask=inside[None, :], other=0.0)
                b = tl.load(weight_columns + (start + k)[:, None], mask=inside[:, None], other=0.0)
                b = converted(b, x.dtype.element_ty)
                if gate is not None:
                    if BY_IMAGE:
                        g = tl.load(gate + group * channels + start + k, mask=inside, other=0.0)
                        a = _product(a, g[None, :])
                    else:
                        gates = gate + ((row + m_inside) // pixels * channels)[:, None]
                        g = tl.load(gates + (start + k)[None, :], mask=inside[None, :], other=0.0)
                        a = _product(a, g)
                sums = dot(a, b, sums, PRECISION)
            scale, shift = _tile_norm(variance, factor, mean, bias, of_norm, BLOCK_N, SPREAD)
            if residual is not None and BLOCK_M * BLOCK_N > 512:
                rest = tl.load(residual + row * outputs + offsets, mask=mask, other=0.0)
        out = activate(sums * scale[None, :] + shift[None, :], ACTIVATION, True)
        if residual is not None:
            out += rest.to(tl.float32)
        tl.store(y + row * outputs + offsets, stored(out, y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """A program's share: ``tiles`` tiles of ``block_m`` pixels and ``block_n`` outputs, ``block_k`` input channels at a step.

    one_step  ``block_k`` holds all channels: a program keeps its weight and streams the tiles through ``num_stages`` buffers
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tiles: int = 1
    one_step: bool = False
    max_registers: int | None = None


def _power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``size``, between ``least`` and ``most``."""
    return min(max(next_power_of_2(size), least), most)


@functools.cache
def choose_config(
    rows: int, groups: int, channels: int, outputs: int, itemsize: int, tensor_cores: bool, streams: bool, sms: int
) -> Config:
    """The default launch for ``groups`` of ``rows``, from the shape of the GEMM and the GPU's number of multiprocessors.

    streams  whether a program may keep its weight: no row has another gate than the next
    fp32 without tensor cores multiplies from registers: small tiles, short steps.
    """
    if not tensor_cores:
        block_n, block_m = _power_of_2(outputs, 16, 64), _power_of_2(rows, 16, 64)
        block_m, block_n = _spread(rows, groups, outputs, block_m, block_n, sms)
        # All registers that a thread can have, said outright: ptxas would spill a few of them to fit a sixth program.
        return Config(block_m, block_n, 16, 2 if block_m * block_n <= 512 else 4, 2, max_registers=255)
    # Every column costs its epilogue, padding too, and every tile of columns reads x again.
    # 128 of them were a tenth cheaper by this, but ptxas spills the registers of their epilogue.
    widths = [width for width in (16, 32, 64) if width < 2 * outputs or width == 16]
    block_n = min(widths, key=lambda width: cdiv(outputs, width) * (14 * width + 4 * channels))
    block_m = _power_of_2(rows, 16, 128 if block_n <= 32 else 64)
    block_m, block_n = _spread(rows, groups, outputs, block_m, block_n, sms)
    small = block_m * block_n <= 512
    # Two programs are to fit in the 164 KB of an sm_80, with the epilogue's scratch: 64 KB for the weight and its stages.
    deep = _power_of_2(channels, 16, 512 // itemsize)
    one_step = streams and not small and deep >= channels and deep * (block_n + 2 * block_m) * itemsize <= 65536
    if one_step:
        # A residual is streamed beside x, and fp32 leaves room for two of each.
        stages = min(3 if itemsize == 2 else 2, (65536 // itemsize // deep - block_n) // block_m)
        tiles = groups * cdiv(rows, block_m) * cdiv(outputs, block_n)
        return Config(block_m, block_n, deep, 4, stages, min(max(tiles // (16 * sms), 1), 16), True)
    # 128 bytes of x a row and step: whole cache lines. Small tiles wait for L2 rather than for HBM: twice the bytes in flight.
    block_k = _power_of_2(channels, 16, (256 if small else 128) // itemsize)
    stages = min(cdiv(channels, block_k) + 1, 4 if small else 3, 65536 // (block_k * (block_m + block_n) * itemsize))
    return Config(block_m, block_n, block_k, 2 if small else 4, max(stages, 2))


def _spread(rows: int, groups: int, outputs: int, block_m: int, block_n: int, sms: int) -> tuple[int, int]:
    """7x7 and 14x14 at batch 1: smaller tiles until every multiprocessor has one. First fewer pixels: what is read again then is
    the weight, which L2 holds; then fewer outputs."""
    while groups * cdiv(rows, block_m) * cdiv(outputs, block_n) < sms and block_m > 16:
        block_m //= 2
    while groups * cdiv(rows, block_m) * cdiv(outputs, block_n) < sms and block_n > 16:
        block_n //= 2
    return block_m, block_n


def launch(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor,
    norm_var: Tensor,
    norm_eps: float,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    *,
    y: Tensor,
) -> None:
    """Write ``pointwise_conv_bn_act(...)`` into ``y``."""
    images, channels, height, width = x.shape
    outputs, pixels = weight.shape[0], height * width
    if y.numel() == 0:
        return
    precision = matmul_precision(x.dtype)
    tensor_cores = x.dtype != torch.float32 or precision == "tf32"
    # With a gate a tile is of one image where that does not pad it much: all of it has one gate then.
    by_image = gate is not None and pixels >= IMAGE
    rows, groups = (pixels, images) if by_image else (images * pixels, 1)
    streams = by_image or gate is None
    config = choose_config(rows, groups, channels, outputs, x.element_size(), tensor_cores, streams, processors(x.device))
    shares = cdiv(cdiv(rows, config.block_m), config.tiles)
    run(
        _kernel,
        groups * shares * cdiv(outputs, config.block_n),
        channels_last(x),
        weight.contiguous(),
        *vectors(norm_weight, norm_bias, norm_mean, norm_var),
        norm_eps,
        None if gate is None else gate.contiguous(),
        None if residual is None else channels_last(residual),
        y,
        rows,
        pixels,
        config.tiles,
        channels // alignment(channels),
        outputs // alignment(outputs),
        ALIGN_C=alignment(channels),
        ALIGN_K=alignment(outputs),
        BY_IMAGE=by_image,
        ACTIVATION=activation,
        PRECISION=precision,
        ONE_STEP=config.one_step,
        SPREAD=max(1, 32 * config.num_warps // config.block_n),
        OUTER_STAGES=config.num_stages if config.one_step else 1,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )
