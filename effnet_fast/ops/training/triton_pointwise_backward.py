"""Training's pointwise convolution backward in Triton: two GEMMs over g, the gradient of y, which is made of grad and y as they are
read, with the sums that x's norm and gate want taken while the product is in registers.

    input     z = g W      a program owns some tiles of BLOCK_M pixels x BLOCK_N input channels and walks over K; its epilogue gives
                           sums over pixels: two a channel, or five an image and channel where there is a gate
    weight    dW = g^T a   a program owns BLOCK_M outputs x BLOCK_N inputs of one piece of the pixels, and makes both g and a

With a gate of either side (or a pool) a tile is of one image, else of all pixels. Each GEMM reads grad, y and x once from HBM, and
grad_x is written once; for every BLOCK_N channels grad and y come again, from L2: HBM or L2 binds, K being small. A program writes
its sums or piece of dW; they are added up in a fixed order by a second, small launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.training.triton import activation_and_slope, add_up, of_channels
from effnet_fast.ops.training.triton_pointwise import (
    Pixels,
    choose_config,
    constants_of,
    laid_out,
    read,
    sum_of_rows,
)
from effnet_fast.ops.triton_common import alignment, cdiv, converted, dot, processors, run, stored


@triton.jit
def _gradient(grad, y, norm, coefficients, gate, pool, image, outputs, k, inside, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """The gradient of y for a tile [rows, k] of an image, zeros beyond the outputs."""
    mean, scale, bias = of_channels(norm, outputs, k, inside)
    of_grad, of_y, shift = of_channels(coefficients, outputs, k, inside)
    g, centred = grad.to(tl.float32), y.to(tl.float32) - mean[None, :]
    if gate is not None:
        g *= tl.load(gate + image * outputs + k, mask=inside, other=0.0)[None, :]
    if pool is not None:
        g += tl.load(pool + image * outputs + k, mask=inside, other=0.0)[None, :]
    if ACTIVATION != "identity":
        _, slope = activation_and_slope(centred * scale[None, :] + bias[None, :], ACTIVATION)
        g *= slope
    return stored(of_grad[None, :] * g + (of_y[None, :] * centred + shift[None, :]), dtype)


@triton.jit(do_not_specialize=["rows", "tiles", "channel_groups", "output_groups"])
def _input(
    x,
    weight,
    norm,
    gate,
    grad,
    y,
    y_norm,
    y_coefficients,
    y_gate,
    y_pool,
    residual,
    grad_x,
    partial,
    rows,
    tiles,
    channel_groups,
    output_groups,
    ALIGN_C: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    Y_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial [programs' pixels, 2 or 5, C]; ``gate`` is only looked at for whether there is one."""
    channels, outputs = channel_groups * ALIGN_C, output_groups * ALIGN_K
    tiles_n, tiles_m = tl.cdiv(channels, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    tile_n, owner = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    shares = tl.cdiv(tiles_m, tiles)
    group, first = (owner // shares).to(tl.int64), owner % shares * tiles
    m, n, k = tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    n_inside = n < channels
    total, total_centred = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    total_value, total_slope = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    total_slope_centred = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(first, tl.minimum(first + tiles, tiles_m)):
        row = tl.cast(tile, tl.int64) * BLOCK_M
        left = tl.minimum(rows - row, BLOCK_M).to(tl.int32)
        row += group * rows
        m_inside = m < left
        z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, outputs, BLOCK_K):
            of = start + k
            inside = of < outputs
            at, both = row * outputs + m[:, None] * outputs + of[None, :], m_inside[:, None] & inside[None, :]
            g, of_y = tl.load(grad + at, mask=both, other=0.0), tl.load(y + at, mask=both, other=0.0)
            g = _gradient(
                g, of_y, y_norm, y_coefficients, y_gate, y_pool, group, outputs, of, inside, x.dtype.element_ty, Y_ACTIVATION
            )
            b = tl.load(weight + of[:, None] * channels + n[None, :], mask=inside[:, None] & n_inside[None, :], other=0.0)
            z = dot(g, converted(b, x.dtype.element_ty), z, PRECISION)
        mask, at = m_inside[:, None] & n_inside[None, :], row * channels + m[:, None] * channels + n[None, :]
        z = tl.where(mask, z, 0.0)
        if norm is not None:
            mean, scale, bias = of_channels(norm, channels, n, n_inside)
            centred = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
            value, slope = activation_and_slope(centred * scale[None, :] + bias[None, :], ACTIVATION)
            product = z * slope
            total += sum_of_rows(product)
            total_centred += sum_of_rows(product * centred)
            if gate is None:
                z = product
            else:
                slope = tl.where(mask, slope, 0.0)
                total_value += sum_of_rows(z * value)
                total_slope += sum_of_rows(slope)
                total_slope_centred += sum_of_rows(slope * centred)
        if residual is not None:
            z += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + at, stored(z, grad_x.dtype.element_ty), mask=mask)
    if norm is not None:
        if gate is None:
            to = partial + owner.to(tl.int64) * 2 * channels + n
            tl.store(to, total, mask=n_inside)
            tl.store(to + channels, total_centred, mask=n_inside)
        else:
            to = partial + owner.to(tl.int64) * 5 * channels + n
            tl.store(to, total_value, mask=n_inside)
            tl.store(to + channels, total, mask=n_inside)
            tl.store(to + 2 * channels, total_slope, mask=n_inside)
            tl.store(to + 3 * channels, total_centred, mask=n_inside)
            tl.store(to + 4 * channels, total_slope_centred, mask=n_inside)


@triton.jit(do_not_specialize=["rows", "tiles_m", "all_tiles", "tiles", "channel_groups", "output_groups"])
def _weight(
    x,
    norm,
    gate,
    grad,
    y,
    y_norm,
    y_coefficients,
    y_gate,
    y_pool,
    partial,
    rows,
    tiles_m,
    all_tiles,
    tiles,
    channel_groups,
    output_groups,
    ALIGN_C: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    Y_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial [pieces, K, C], of ``tiles`` tiles each of BLOCK_K pixels; ``tiles_m`` tiles a group, and ``all_tiles`` of them."""
    channels, outputs = channel_groups * ALIGN_C, output_groups * ALIGN_K
    blocks_n, blocks_m = tl.cdiv(channels, BLOCK_N), tl.cdiv(outputs, BLOCK_M)
    block, piece = tl.program_id(0) % (blocks_n * blocks_m), tl.program_id(0) // (blocks_n * blocks_m)
    k, n = block // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M), block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p, k_inside, n_inside = tl.arange(0, BLOCK_K), k < outputs, n < channels
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(piece * tiles, tl.minimum((piece + 1) * tiles, all_tiles)):
        group, row = (tile // tiles_m).to(tl.int64), tile % tiles_m * BLOCK_K
        inside = p < rows - row
        first = group * rows + row
        of_g, of_a = inside[:, None] & k_inside[None, :], inside[:, None] & n_inside[None, :]
        at = first * outputs + p[:, None] * outputs + k[None, :]
        g, of_y = tl.load(grad + at, mask=of_g, other=0.0), tl.load(y + at, mask=of_g, other=0.0)
        a = tl.load(x + first * channels + p[:, None] * channels + n[None, :], mask=of_a, other=0.0)
        g = _gradient(
            g, of_y, y_norm, y_coefficients, y_gate, y_pool, group, outputs, k, k_inside, x.dtype.element_ty, Y_ACTIVATION
        )
        a = read(a, norm, gate, group, channels, n, n_inside, x.dtype.element_ty, ACTIVATION)
        g = tl.where(inside[:, None], g, tl.zeros_like(g))
        sums = dot(tl.trans(g), a, sums, PRECISION)
    to = partial + (piece.to(tl.int64) * outputs + k)[:, None] * channels + n[None, :]
    tl.store(to, sums, mask=k_inside[:, None] & n_inside[None, :])


def pointwise_conv_backward(
    grad: Tensor,
    y: Tensor,
    y_norm: Tensor,
    y_coefficients: Tensor,
    y_activation: str,
    y_gate: Tensor | None,
    y_pool: Tensor | None,
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
    need_x: bool,
    need_weight: bool,
    *,
    grad_x: Tensor,
    grad_weight: Tensor,
    sums: Tensor,
) -> None:
    outputs, channels = weight.shape[:2]
    pixels, sms = Pixels.of(x, gate, y_gate, y_pool), processors(x.device)
    read_x, *given = laid_out(x, norm, gate, grad, y, y_norm, y_coefficients, y_gate, y_pool)
    groups = channels // alignment(channels), outputs // alignment(outputs)
    if need_x:
        widest = 64 if gate is None else 32  # with a gate there are five sums a column
        config = choose_config(pixels.rows, channels, outputs, x.element_size(), widest)
        tiles_n = cdiv(channels, config.block_n)
        shares, tiles = pixels.shares(config.block_m, tiles_n, sms)
        owners = pixels.groups * shares
        partial = None if norm is None else sums.new_empty((owners, 2 if gate is None else 5, channels))
        arguments = read_x, weight.contiguous(), *given, *laid_out(residual), grad_x, partial, pixels.rows, tiles, *groups
        constants = constants_of(x, weight, activation, config)
        run(_input, owners * tiles_n, *arguments, Y_ACTIVATION=y_activation, **constants)
        if partial is not None:
            of_sums = 1 if gate is None else pixels.groups
            add_up(partial.view(of_sums, owners // of_sums, -1), sums)
    if need_weight:
        config = choose_config(outputs, channels, pixels.rows, x.element_size())
        blocks = cdiv(outputs, config.block_m) * cdiv(channels, config.block_n)
        tiles_m = cdiv(pixels.rows, config.block_k)
        all_tiles = pixels.groups * tiles_m
        tiles = cdiv(all_tiles, max(4 * sms // blocks, 1))
        pieces = cdiv(all_tiles, tiles)
        partial = y_norm.new_empty((1, pieces, outputs * channels))
        sizes = pixels.rows, tiles_m, all_tiles, tiles, *groups
        constants = constants_of(x, weight, activation, config)
        run(_weight, blocks * pieces, read_x, *given, partial, *sizes, Y_ACTIVATION=y_activation, **constants)
        add_up(partial, grad_weight)
