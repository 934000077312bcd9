"""The statistics of a batch over [N, H, W, C] in Triton.

A program owns BLOCK_C channels of one piece of the pixels, some tiles of BLOCK_P. By five operations an element HBM should bind;
an H200 takes 1.6 to 2.0 times as long on tensors that its cache does not hold (B0, bf16), more on small ones: two launches. The
mean and the sum of squared differences of a piece are those of what it is off its first tile's mean, so that no mean far from
zero costs the variance its digits; and as that tile is one of the piece's, however far it is from the others, at most a factor of
the piece's tiles is lost to cancellation. A second, small launch merges the pieces in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.training.triton import MOST_REGISTERS, add_rows, choose_config, pieces_of, sum_of_rows, wide
from effnet_fast.ops.triton_common import alignment, cdiv, channels_last, processors, run, stored


@triton.jit(do_not_specialize=["rows", "share", "channel_groups"])
def _of_pieces(
    x,
    partial,
    rows,
    share,
    channel_groups,
    ALIGN_C: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [pieces, 2, C] in fp64: of ``share`` tiles of rows each, their mean and the sum of squared differences from it."""
    channels = channel_groups * ALIGN_C
    blocks = tl.cdiv(channels, BLOCK_C)
    block, piece = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    c, p = block * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    c_inside = c < channels
    start = piece * share * BLOCK_P
    count = tl.minimum(rows - start, share * BLOCK_P).to(tl.int32)
    x_piece, at = x + start * channels, p[:, None] * channels + c[None, :]
    value = tl.load(x_piece + at, mask=(p < count)[:, None] & c_inside[None, :], other=0.0).to(tl.float32)
    near = tl.sum(value, 0) / tl.minimum(count, BLOCK_P)
    near = stored(near, x.dtype.element_ty).to(tl.float32)  # differences of halves are exact then, and short
    off = tl.where((p < count)[:, None], value - near[None, :], 0.0)
    total = add_rows(tl.zeros([ROWS, BLOCK_C], tl.float32), off)
    squares = add_rows(tl.zeros([ROWS, BLOCK_C], tl.float32), off * off)
    for row in tl.range(BLOCK_P, count, BLOCK_P, num_stages=STAGES):
        inside = (p < count - row)[:, None]
        mask = c_inside[None, :]
        if not EVEN:
            mask = inside & mask
        off = wide(tl.load(x_piece + (row * channels + at), mask=mask, other=0.0)) - near[None, :]
        if not EVEN:
            off = tl.where(inside, off, 0.0)
        total = add_rows(total, off)
        squares = add_rows(squares, off * off)
    of_piece = sum_of_rows(total)
    to = partial + piece * 2 * channels + c
    tl.store(to, near + of_piece / count, mask=c_inside)
    tl.store(to + channels, sum_of_rows(squares) - of_piece * of_piece / count, mask=c_inside)


@triton.jit(do_not_specialize=["rows", "piece_rows", "pieces", "channels"])
def _finish(partial, mean, var, rows, piece_rows, pieces, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of ``rows``, from their ``pieces`` each of ``piece_rows`` but the last. In fp64, which few numbers take: differences are from
    the first piece's mean, which costs the variance a few of its many digits and saves reading the pieces twice."""
    c, p = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    c_inside = c < channels
    near = tl.load(partial + c, mask=c_inside, other=0.0)
    total, squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float64), tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
    for start in range(0, pieces, BLOCK_P):
        piece = (start + p).to(tl.int64)
        at, mask = partial + piece[:, None] * 2 * channels + c[None, :], (piece < pieces)[:, None] & c_inside[None, :]
        values = tl.maximum(tl.minimum(rows - piece * piece_rows, piece_rows), 0).to(tl.float64)[:, None]
        off = tl.load(at, mask=mask, other=0.0) - near[None, :]
        total += values * off
        squares += tl.load(at + channels, mask=mask, other=0.0) + values * off * off
    of_all = tl.sum(total, 0) / rows.to(tl.float64)
    tl.store(mean + c, (near + of_all).to(tl.float32), mask=c_inside)
    tl.store(var + c, (tl.sum(squares, 0) / rows.to(tl.float64) - of_all * of_all).to(tl.float32), mask=c_inside)


CHAIN = 16  # fp32 values that statistics add up one by one before they are fp64


def batch_stats(y: Tensor, *, mean: Tensor, var: Tensor) -> None:
    images, channels, height, width = y.shape
    rows = images * height * width
    config = choose_config(rows, channels, y.element_size(), "batch_stats")
    blocks = cdiv(channels, config.block_c)
    tiles = cdiv(rows, config.block_p)
    pieces, share = pieces_of(tiles, blocks, processors(y.device), CHAIN, programs=8)
    partial = mean.new_empty((pieces, 2, channels), dtype=torch.float64)
    run(
        _of_pieces,
        pieces * blocks,
        channels_last(y),
        partial,
        rows,
        share,
        channels // alignment(channels),
        ALIGN_C=alignment(channels),
        EVEN=rows % config.block_p == 0,
        ROWS=config.rows,
        BLOCK_P=config.block_p,
        BLOCK_C=config.block_c,
        STAGES=config.stages,
        num_warps=config.num_warps,
        maxnreg=MOST_REGISTERS,
    )
    sizes = rows, share * config.block_p, pieces, channels
    run(_finish, cdiv(channels, 4), partial, mean, var, *sizes, BLOCK_P=256, BLOCK_C=4, num_warps=4)
