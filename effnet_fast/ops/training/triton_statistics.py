"""The statistics of a batch over [N, H, W, C] in Triton.

A program owns BLOCK_C channels of one piece of the pixels, some tiles of BLOCK_P; HBM binds, at five operations an element. The
mean and the sum of squared differences of a piece are those of what it is off its first tile's mean, so that no mean far from zero
costs the variance its digits; and as that tile is one of the piece's, however far it is from the others, at most a factor of the
piece's tiles is lost to cancellation. A second, small launch merges the pieces by Chan's formula, in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.training.triton import MOST_REGISTERS, choose_config, pieces_of
from effnet_fast.ops.triton_common import alignment, cdiv, channels_last, processors, run, stored


@triton.jit(do_not_specialize=["rows", "share", "channel_groups"])
def _of_pieces(
    x,
    partial,
    rows,
    share,
    channel_groups,
    ALIGN_C: tl.constexpr,
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
    total, squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32), tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in tl.range(0, tl.cdiv(count, BLOCK_P), num_stages=STAGES):
        mask = (tile * BLOCK_P + p < count)[:, None] & c_inside[None, :]
        value = tl.load(x_piece + tl.cast(tile, tl.int64) * BLOCK_P * channels + at, mask=mask, other=0.0).to(tl.float32)
        off = tl.where(mask, value - near[None, :], 0.0)
        total += off
        squares += off * off
    of_piece = tl.sum(total.to(tl.float64), 0)
    to = partial + piece * 2 * channels + c
    tl.store(to, near + of_piece / count, mask=c_inside)
    tl.store(to + channels, tl.sum(squares.to(tl.float64), 0) - of_piece * of_piece / count, mask=c_inside)


@triton.jit(do_not_specialize=["rows", "piece_rows", "pieces", "channels"])
def _finish(partial, mean, var, rows, piece_rows, pieces, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of ``rows``, from their ``pieces`` each of ``piece_rows`` but the last. In fp64, which few numbers take."""
    c, p = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    c_inside = c < channels
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
    for start in range(0, pieces, BLOCK_P):
        center, _, values = _piece(partial, start + p, c, c_inside, rows, piece_rows, pieces, channels)
        total += values * center
    of_all = tl.sum(total, 0) / rows.to(tl.float64)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
    for start in range(0, pieces, BLOCK_P):
        center, squares, values = _piece(partial, start + p, c, c_inside, rows, piece_rows, pieces, channels)
        rest = center - of_all[None, :]
        total += squares + values * rest * rest
    tl.store(mean + c, of_all.to(tl.float32), mask=c_inside)
    tl.store(var + c, (tl.sum(total, 0) / rows.to(tl.float64)).to(tl.float32), mask=c_inside)


@triton.jit
def _piece(partial, piece, c, c_inside, rows, piece_rows, pieces, channels):
    """The pieces' means, sums of squared differences and rows; none of these beyond the last piece."""
    inside = piece < pieces
    at, mask = partial + piece.to(tl.int64)[:, None] * 2 * channels + c[None, :], inside[:, None] & c_inside[None, :]
    center, squares = tl.load(at, mask=mask, other=0.0), tl.load(at + channels, mask=mask, other=0.0)
    values = tl.where(inside, tl.minimum(rows - piece.to(tl.int64) * piece_rows, piece_rows), 0).to(tl.float64)
    return center, squares, values[:, None]


CHAIN = 16  # fp32 values that statistics add up one by one before they are fp64


def batch_stats(y: Tensor, *, mean: Tensor, var: Tensor) -> None:
    images, channels, height, width = y.shape
    rows = images * height * width
    config = choose_config(rows, channels, y.element_size())
    blocks = cdiv(channels, config.block_c)
    tiles = cdiv(rows, config.block_p)
    share = min(pieces_of(tiles, blocks, processors(y.device))[1], CHAIN)
    pieces = cdiv(tiles, share)
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
        BLOCK_P=config.block_p,
        BLOCK_C=config.block_c,
        STAGES=3,
        num_warps=config.num_warps,
        maxnreg=MOST_REGISTERS,
    )
    sizes = rows, share * config.block_p, pieces, channels
    run(_finish, cdiv(channels, 8), partial, mean, var, *sizes, BLOCK_P=128, BLOCK_C=8, num_warps=4)
