"""Training's pointwise convolution forward in Triton, a GEMM over x as [N*H*W, C], and what it shares with the backward: the
activation made again as x is read, and y's statistics taken while it is in registers.

A program owns some tiles of BLOCK_M pixels x BLOCK_N outputs and walks over C. With a gate a tile is of one image, else of all
pixels. x is read from HBM and y written to it once, C*K/(C+K) multiply-adds an element moved; for every BLOCK_N outputs, of which
EfficientNet has few where x has an activation, that is made again. HBM binds, or the exponentials. A program writes its statistics,
in fp64; they are merged in a fixed order by a second, small launch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.training.triton import activation_and_slope, of_channels
from effnet_fast.ops.training.triton_statistics import finish_statistics
from effnet_fast.ops.triton_common import (
    INTERPRETED,
    alignment,
    cdiv,
    channels_last,
    converted,
    dot,
    matmul_precision,
    next_power_of_2,
    processors,
    run,
    stored,
)


@triton.jit
def sum_of_rows(values):
    """A GPU adds by halves; the interpreter one after the other, which loses bits."""
    if INTERPRETED:
        return tl.sum(values.to(tl.float64), 0).to(tl.float32)
    else:
        return tl.sum(values, 0)


@triton.jit
def read(x, norm, gate, image, channels, c, inside, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """activation(norm(x)) * gate of a tile [rows, c] of an image, zeros beyond the channels."""
    if norm is None:
        return x
    else:
        mean, scale, bias = of_channels(norm, channels, c, inside)
        a, _ = activation_and_slope((x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :], ACTIVATION)
        if gate is not None:
            a *= tl.load(gate + image * channels + c, mask=inside, other=0.0)[None, :]
        return stored(a, dtype)


@triton.jit(do_not_specialize=["rows", "tiles", "channel_groups", "output_groups"])
def _forward(
    x,
    weight,
    norm,
    gate,
    y,
    partial,
    rows,
    tiles,
    channel_groups,
    output_groups,
    ALIGN_C: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``rows`` of a group (an image, or all) and ``tiles`` of a program; partial [programs' pixels, 2, K] in fp64."""
    channels, outputs = channel_groups * ALIGN_C, output_groups * ALIGN_K
    tiles_n, tiles_m = tl.cdiv(outputs, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    tile_n, owner = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    shares = tl.cdiv(tiles_m, tiles)
    group, first = (owner // shares).to(tl.int64), owner % shares * tiles
    m, n, k = tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    n_inside = n < outputs
    near, total, squares = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for tile in range(first, tl.minimum(first + tiles, tiles_m)):
        row = tl.cast(tile, tl.int64) * BLOCK_M
        left = tl.minimum(rows - row, BLOCK_M).to(tl.int32)
        row += group * rows
        m_inside = m < left
        x_rows = x + row * channels + (m * channels)[:, None]
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, channels, BLOCK_K):
            c = start + k
            inside = c < channels
            a = tl.load(x_rows + c[None, :], mask=m_inside[:, None] & inside[None, :], other=0.0)
            b = tl.load(weight + (n * channels)[None, :] + c[:, None], mask=n_inside[None, :] & inside[:, None], other=0.0)
            a = read(a, norm, gate, group, channels, c, inside, x.dtype.element_ty, ACTIVATION)
            sums = dot(a, converted(b, x.dtype.element_ty), sums, PRECISION)
        mask, out = m_inside[:, None] & n_inside[None, :], stored(sums, y.dtype.element_ty)
        tl.store(y + row * outputs + m[:, None] * outputs + n[None, :], out, mask=mask)
        value = tl.where(mask, out.to(tl.float32), 0.0)
        if tile == first:  # as batch_stats does
            near = stored(sum_of_rows(value) / left, y.dtype.element_ty).to(tl.float32)
        off = tl.where(mask, value - near[None, :], 0.0)
        total += sum_of_rows(off)
        squares += sum_of_rows(off * off)
    count = tl.minimum(rows - first * BLOCK_M, tiles * BLOCK_M)
    off_mean = total.to(tl.float64) / count
    to = partial + owner.to(tl.int64) * 2 * outputs + n
    tl.store(to, near + off_mean, mask=n_inside)
    tl.store(to + outputs, squares - off_mean * off_mean * count, mask=n_inside)


@dataclass(frozen=True)
class Config:
    """A product's tile of ``block_m`` x ``block_n``, ``block_k`` of the sum at a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2


@functools.cache
def choose_config(rows: int, columns: int, inner: int, itemsize: int, widest: int = 64) -> Config:
    """Tiles of up to 64 x ``widest``, 32 of the sum at a step, a quarter of that in fp32, whose products are made from registers:
    beside them a thread holds 4 to 16 elements of a prologue's tile, and the vectors of their channels."""
    most_m, most_n, most_k = (64, widest, 32) if itemsize == 2 else (32, 32, 16)
    sizes = (rows, most_m), (columns, most_n), (inner, most_k)
    return Config(*(min(max(next_power_of_2(size), 16), most) for size, most in sizes))


@dataclass(frozen=True)
class Pixels:
    """The rows of x and y as ``groups`` of ``rows``: images where vectors are an image's, else all in one."""

    groups: int
    rows: int

    @staticmethod
    def of(x: Tensor, *of_images: Tensor | None) -> Pixels:
        images, pixels = x.shape[0], x.shape[2] * x.shape[3]
        return Pixels(1, images * pixels) if all(t is None for t in of_images) else Pixels(images, pixels)

    def shares(self, block_m: int, others: int, sms: int) -> tuple[int, int]:
        """Programs a group, and tiles of each, where there are ``others`` for each: four to a multiprocessor or more."""
        tiles_m = cdiv(self.rows, block_m)
        tiles = min(max(self.groups * tiles_m * others // (4 * sms), 1), 16, tiles_m)
        return cdiv(tiles_m, tiles), tiles


def laid_out(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else channels_last(t) if t.dim() == 4 else t.contiguous() for t in tensors]


def constants_of(x: Tensor, weight: Tensor, activation: str, config: Config) -> dict[str, Any]:
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    aligned = {"ALIGN_C": alignment(weight.shape[1]), "ALIGN_K": alignment(weight.shape[0])}
    chosen = {"ACTIVATION": activation, "PRECISION": matmul_precision(x.dtype)}
    # All registers that a thread can have, said outright: ptxas would spill a few of them to fit one program more.
    return {**aligned, **chosen, **tile, "num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": 255}


def pointwise_conv_stats(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    activation: str,
    gate: Tensor | None,
    stride: int,
    padding: list[int],
    *,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
) -> None:
    outputs, channels = weight.shape[:2]
    pixels = Pixels.of(x, gate)
    config = choose_config(pixels.rows, outputs, channels, x.element_size())
    tiles_n = cdiv(outputs, config.block_n)
    shares, tiles = pixels.shares(config.block_m, tiles_n, processors(x.device))
    partial = mean.new_empty((pixels.groups * shares, 2, outputs), dtype=torch.float64)
    sizes = pixels.rows, tiles, channels // alignment(channels), outputs // alignment(outputs)
    arguments = *laid_out(x), weight.contiguous(), *laid_out(norm, gate), y, partial, *sizes
    run(_forward, pixels.groups * shares * tiles_n, *arguments, **constants_of(x, weight, activation, config))
    finish_statistics(partial, pixels.groups, pixels.rows, tiles * config.block_m, mean, var)
