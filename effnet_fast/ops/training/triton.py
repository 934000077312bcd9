"""Training's passes over [N, H, W, C] in Triton: norm and activation, their backwards and the sums of these.

Rows are pixels, of one image where something is by image, else of the whole batch as if it were one. They are cut into tiles of
BLOCK_P rows, and those into pieces of as many tiles. A program owns BLOCK_C channels of one piece, so that its norm stays in
registers; it adds up, in each of ROWS x BLOCK_C places, what falls there, and at the end over the rows. Where several pieces make
one sum a second, small launch adds those up, always in the same order: there are no atomics, and results are the same to the bit.

An element is read once from each tensor and written at most once, 2 to 8 bytes a tensor, for 8 to 22 instructions with SiLU (one
exponential and one reciprocal): by these counts HBM binds. On tensors that its cache does not hold an H200 takes 1.1 to 1.5 times
as long (B0, bf16), means and sums of images up to 2.0 times.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.triton_common import INTERPRETED, alignment, cdiv, channels_last, next_power_of_2, processors, run, stored

WARPS: tl.constexpr = tl.constexpr(4)  # of a program
# 1 / (1 + 2^(-u log2(e))): exponential and reciprocal as the special function unit has them, within 3 ulp; subnormals are zero.
_SIGMOID: tl.constexpr = tl.constexpr("""{
    .reg .f32 a;
    mul.ftz.f32 a, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 a, a;
    add.ftz.f32 a, a, 0f3F800000;
    rcp.approx.ftz.f32 $0, a;
}""")


# bf16 are the high halves of fp32: two of them by two instructions, where Triton's own conversion takes three.
_WIDE_PAIR: tl.constexpr = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;")


@triton.jit
def wide(value):
    """fp32."""
    if INTERPRETED or value.dtype != tl.bfloat16:
        return value.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(_WIDE_PAIR, "=r,=r,r", [value], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def sigmoid_of(u):
    """Of fp32. Triton's own exponential and quotient take twice as many instructions, for subnormal ones."""
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-u))
    else:
        return tl.inline_asm_elementwise(_SIGMOID, "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def activation_and_slope(u, ACTIVATION: tl.constexpr):
    """Of fp32 ``u``: the activation and its derivative, where PyTorch's backward has the same."""
    if ACTIVATION == "silu":
        sigmoid = sigmoid_of(u)
        value = u * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    elif ACTIVATION == "relu":
        value = tl.where(u < 0.0, 0.0, u)
        slope = tl.where(u <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu6":
        value = tl.where(u < 0.0, 0.0, tl.where(u > 6.0, 6.0, u))
        slope = tl.where((u <= 0.0) | (u >= 6.0), 0.0, 1.0)
    else:
        value = u
        slope = tl.full(u.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def of_channels(vectors, channels, c, inside):
    """The three rows of [3, channels] at ``c``: a norm's mean, scale and bias, or the coefficients of a gradient."""
    first = tl.load(vectors + c, mask=inside, other=0.0)
    second = tl.load(vectors + channels + c, mask=inside, other=0.0)
    third = tl.load(vectors + 2 * channels + c, mask=inside, other=0.0)
    return first, second, third


@triton.jit
def sum_of_rows(values):
    """In fp64 of fp32 [rows, C]: over the rows of a warp in fp32, as fp64 takes twice the shuffles, and then over the warps."""
    rows: tl.constexpr = values.shape[0]
    of_warps = tl.reshape(values, [WARPS, rows // WARPS, values.shape[1]])
    if INTERPRETED:  # which adds one row after another, where a warp adds them in pairs
        of_warps = of_warps.to(tl.float64)
    return tl.sum(tl.sum(of_warps, 1).to(tl.float64), 0)


@triton.jit
def add_rows(total, values):
    """``total`` [rows, C] and ``values`` [several times as many, C], of which a thread has every one that falls in its place."""
    rows: tl.constexpr = total.shape[0]
    if values.shape[0] == rows:
        return total + values
    else:
        return total + tl.sum(tl.reshape(values, [values.shape[0] // rows, rows, total.shape[1]]), 0)


@triton.jit(do_not_specialize=["pixels", "pieces", "share", "channel_groups"])
def _elements(
    x,
    grad,
    norm,
    coefficients,
    gate,
    pool,
    residual,
    out,
    sums,
    pixels,
    pieces,
    share,
    channel_groups,
    ALIGN_C: tl.constexpr,
    WHAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``share`` tiles a piece, ``pieces`` an image; WHAT is the name of the op."""
    channels = channel_groups * ALIGN_C
    blocks = tl.cdiv(channels, BLOCK_C)
    block, owner = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    c, p = block * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    c_inside = c < channels
    mean, scale, bias = of_channels(norm, channels, c, c_inside)
    if WHAT == "norm_gradient":
        of_grad, of_y, shift = of_channels(coefficients, channels, c, c_inside)
    image, first = owner // pieces, owner % pieces * share * BLOCK_P
    if gate is not None:
        of_gate = tl.load(gate + image * channels + c, mask=c_inside, other=0.0)
    if pool is not None:
        of_pool = tl.load(pool + image * channels + c, mask=c_inside, other=0.0)
    rows = tl.minimum(pixels - first, share * BLOCK_P).to(tl.int32)
    start = (image * pixels + first) * channels
    at = p[:, None] * channels + c[None, :]
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    total_centred = tl.zeros([ROWS, BLOCK_C], tl.float32)
    total_value = tl.zeros([ROWS, BLOCK_C], tl.float32)
    total_slope = tl.zeros([ROWS, BLOCK_C], tl.float32)
    total_slope_centred = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for row in tl.range(0, rows, BLOCK_P, num_stages=STAGES):
        inside = (p < rows - row)[:, None]
        mask = c_inside[None, :]
        if not EVEN:
            mask = inside & mask
        offset = row * channels + at
        centred = wide(tl.load(x + start + offset, mask=mask, other=0.0)) - mean[None, :]
        value, slope = activation_and_slope(centred * scale[None, :] + bias[None, :], ACTIVATION)
        g = value
        if grad is not None:
            g = wide(tl.load(grad + start + offset, mask=mask, other=0.0))
        if gate is not None:
            g *= of_gate[None, :]
        if pool is not None:
            g += of_pool[None, :]
        if WHAT == "norm_act_image_sums":
            if not EVEN:
                slope = tl.where(inside, slope, 0.0)
            total_value = add_rows(total_value, g * value)
            total_slope = add_rows(total_slope, slope)
            total_slope_centred = add_rows(total_slope_centred, slope * centred)
        if grad is not None:
            g *= slope
        if WHAT == "norm_act_mean" and not EVEN:
            g = tl.where(inside, g, 0.0)
        if sums is not None:
            total = add_rows(total, g)
            if grad is not None:
                total_centred = add_rows(total_centred, g * centred)
        if WHAT == "norm_gradient":
            g = of_grad[None, :] * g + (of_y[None, :] * centred + shift[None, :])
        if out is not None:
            if residual is not None:
                g += wide(tl.load(residual + start + offset, mask=mask, other=0.0))
            tl.store(out + start + offset, stored(g, out.dtype.element_ty), mask=mask)
    if WHAT == "norm_act_mean":
        tl.store(sums + owner * channels + c, sum_of_rows(total).to(tl.float32) / pixels, mask=c_inside)
    elif WHAT == "norm_act_image_sums":
        to = sums + owner * 5 * channels + c
        tl.store(to, sum_of_rows(total_value), mask=c_inside)
        tl.store(to + channels, sum_of_rows(total), mask=c_inside)
        tl.store(to + 2 * channels, sum_of_rows(total_slope), mask=c_inside)
        tl.store(to + 3 * channels, sum_of_rows(total_centred), mask=c_inside)
        tl.store(to + 4 * channels, sum_of_rows(total_slope_centred), mask=c_inside)
    elif sums is not None:
        to = sums + owner * 2 * channels + c
        tl.store(to, sum_of_rows(total), mask=c_inside)
        tl.store(to + channels, sum_of_rows(total_centred), mask=c_inside)


@triton.jit(do_not_specialize=["pieces", "width"])
def _add_up(partial, out, pieces, width, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr):
    """out [groups, width], the sum over the pieces of partial [groups, pieces, width]."""
    blocks = tl.cdiv(width, BLOCK_W)
    group, w = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    piece, inside = tl.arange(0, BLOCK_P), w < width
    total = tl.zeros([BLOCK_P, BLOCK_W], tl.float32)
    for start in range(0, pieces, BLOCK_P):
        at = (group * pieces + start + piece)[:, None] * width + w[None, :]
        total += tl.load(partial + at, mask=(start + piece < pieces)[:, None] & inside[None, :], other=0.0)
    tl.store(out + group * width + w, stored(tl.sum(total.to(tl.float64), 0).to(tl.float32), out.dtype.element_ty), mask=inside)


MOST_REGISTERS = 128  # said outright: ptxas would spill a few of them to fit one program more


@dataclass(frozen=True)
class Config:
    """A program's tile: ``block_p`` rows of ``block_c`` channels, of which its threads load ``rows`` at a time."""

    block_p: int
    block_c: int
    rows: int
    stages: int
    num_warps: int = WARPS.value


@functools.cache
def choose_config(rows: int, channels: int, itemsize: int, what: str, activation: str = "identity") -> Config:
    """Up to a cache line of channels, of which few lie idle; of each tensor 32 bytes a thread, or 16.

    Of four forms, on an H200, ten shapes of B0 in bf16: with SiLU, and for statistics, tiles of 4 KB, two of them on their way, are
    fastest or within 2 % of that; without it tiles of 2 KB at once, by 4 to 8 %. Five sums an element leave no registers for tiles
    on their way: one of 4 KB at once, 6 % slower than two that spill.
    """
    many = activation == "silu" or what == "batch_stats"
    widths = [width // itemsize for width in (128, 64, 32)]
    block_c = min(widths, key=lambda width: cdiv(channels, width) * (width + 8))  # a program costs itself
    tile = (4096 if many else 2048) // itemsize
    block_p = min(tile // block_c, max(next_power_of_2(rows), WARPS.value))
    return Config(block_p, block_c, min(block_p, 2048 // itemsize // block_c), 3 if many and what != "norm_act_image_sums" else 1)


def pieces_of(tiles: int, others: int, sms: int, most: int, programs: int = 24) -> tuple[int, int]:
    """Into how many pieces ``tiles`` are cut, and the tiles of each, ``most`` at most, with ``others`` programs for every piece.

    programs  to a multiprocessor, where 4 to 8 fit at once: 24 make a last round of few little beside the others, 8 add up their
              places and read their norm less often. Measured on an H200, 8 are faster where adding up is most of the work
    """
    each = tiles * others / sms
    share = min(max(ceil(max(each / programs, min(each / 8, 8))), 1), most)  # few tiles each: 8 do
    return cdiv(tiles, share), share


def _launch(
    what: str,
    x: Tensor,
    norm: Tensor,
    activation: str,
    *,
    grad: Tensor | None = None,
    coefficients: Tensor | None = None,
    gate: Tensor | None = None,
    pool: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """``out`` and ``sums`` are written, of which there is one at least."""
    images, channels, height, width = x.shape
    pixels, by_image = height * width, what in ("norm_act_mean", "norm_act_image_sums")
    if not by_image and gate is None and pool is None:  # then images end nowhere
        images, pixels = 1, images * pixels
    config = choose_config(pixels, channels, x.element_size(), what, activation)
    tiles, blocks = cdiv(pixels, config.block_p), cdiv(channels, config.block_c)
    most = 2**31 // (config.block_p * channels) - 1  # offsets within a piece have 32 bits
    programs = 8 if sums is not None and activation != "silu" else 24
    pieces, share = pieces_of(tiles, images * blocks, processors(x.device), most, programs)
    partial, groups = sums, images if by_image else 1
    if sums is not None and images * pieces > groups:
        partial = sums.new_empty((groups, images * pieces // groups, sums.numel() // groups))
    run(
        _elements,
        images * pieces * blocks,
        channels_last(x),
        None if grad is None else channels_last(grad),
        norm.contiguous(),
        None if coefficients is None else coefficients.contiguous(),
        None if gate is None else gate.contiguous(),
        None if pool is None else pool.contiguous(),
        None if residual is None else channels_last(residual),
        out,
        partial,
        pixels,
        pieces,
        share,
        channels // alignment(channels),
        ALIGN_C=alignment(channels),
        WHAT=what,
        ACTIVATION=activation,
        EVEN=pixels % config.block_p == 0,
        ROWS=config.rows,
        BLOCK_P=config.block_p,
        BLOCK_C=config.block_c,
        STAGES=config.stages,
        num_warps=config.num_warps,
        maxnreg=MOST_REGISTERS,
    )
    if sums is not None and partial is not None and partial is not sums:
        add_up(partial, sums)


def add_up(partial: Tensor, out: Tensor) -> None:
    """Write into ``out``, of groups * width elements, the sums over the pieces of ``partial`` [groups, pieces, width], fp32."""
    groups, pieces, width = partial.shape
    block_p = 16 if pieces <= 16 else 256  # one load after another takes longer than the bytes do
    block_w = 2048 // block_p
    run(_add_up, groups * cdiv(width, block_w), partial, out, pieces, width, BLOCK_P=block_p, BLOCK_W=block_w, num_warps=4)


def norm_act(y: Tensor, norm: Tensor, activation: str, gate: Tensor | None, residual: Tensor | None, *, out: Tensor) -> None:
    _launch("norm_act", y, norm, activation, gate=gate, residual=residual, out=out)


def norm_act_mean(y: Tensor, norm: Tensor, activation: str, *, mean: Tensor) -> None:
    _launch("norm_act_mean", y, norm, activation, sums=mean)


def norm_act_sums(grad: Tensor, y: Tensor, norm: Tensor, activation: str, gate: Tensor | None, *, sums: Tensor) -> None:
    _launch("norm_act_sums", y, norm, activation, grad=grad, gate=gate, sums=sums)


def norm_act_image_sums(grad: Tensor, x: Tensor, norm: Tensor, activation: str, *, sums: Tensor) -> None:
    _launch("norm_act_image_sums", x, norm, activation, grad=grad, sums=sums)


def norm_act_backward(
    grad: Tensor, x: Tensor, norm: Tensor, activation: str, residual: Tensor | None, *, grad_x: Tensor, sums: Tensor
) -> None:
    _launch("norm_act_backward", x, norm, activation, grad=grad, residual=residual, out=grad_x, sums=sums)


def norm_gradient(
    grad: Tensor,
    y: Tensor,
    norm: Tensor,
    coefficients: Tensor,
    activation: str,
    gate: Tensor | None,
    pool: Tensor | None,
    *,
    grad_y: Tensor,
) -> None:
    parts = {"coefficients": coefficients, "gate": gate, "pool": pool}
    _launch("norm_gradient", y, norm, activation, grad=grad, out=grad_y, **parts)
