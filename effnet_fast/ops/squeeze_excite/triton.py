"""squeeze_excite_gate in Triton: the partial sums added up, two matrix-vector products and the sigmoid.

The weights, 2*C*R of them, are what is read in bulk, from L2; per image and weight there is one multiply-add. Up to 65536 weights
an FC, which is all of B0, one launch: a program makes the hidden vector of its image, and its share of the gates from it; those
that share an image make the same hidden vector again. Larger ones have two launches, each split over rows of its weight: with few
images because one multiprocessor would be long over them all, with many so that a program reads a weight once for 16 images.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.triton_common import activate, cdiv, next_power_of_2, processors, run


@triton.jit
def _exp(value):
    """e^value. tl.exp rounds value * log2(e) before it raises 2 to it: 3 ulp of the result at e^10. What that loses is put back."""
    power = value * 1.4426950216293335
    rest = tl.fma(value, 1.4426950216293335, -power) + value * 1.925963e-8
    return tl.exp2(power) * (1.0 + tl.where(tl.abs(power) < 200.0, rest, 0.0) * 0.6931472)


@triton.jit
def _sigmoid(value):
    return tl.div_rn(1.0, 1.0 + _exp(-value))


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return tl.div_rn(value, 1.0 + _exp(-value))
    else:
        return activate(value, ACTIVATION)


@triton.jit
def _hidden(partial, pieces, count, weight, bias, r, channels, reduced, ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr):
    """activation(reduce(mean)) at rows ``r``, for the image whose sums ``partial`` points to."""
    r_inside = r < reduced
    total = tl.zeros([r.shape[0], BLOCK_C], tl.float32)
    pixels = count.to(tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_inside = c < channels
        sums = tl.zeros([BLOCK_C], tl.float32)
        for piece in range(pieces):
            sums += tl.load(partial + piece * channels + c, mask=c_inside, other=0.0)
        mask = r_inside[:, None] & c_inside[None, :]
        w = tl.load(weight + r[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        total += w * tl.div_rn(sums, pixels)[None, :]
    out = tl.sum(total, 1)
    if bias is not None:
        out += tl.load(bias + r, mask=r_inside, other=0.0).to(tl.float32)
    return tl.where(r_inside, _activate(out, ACTIVATION), 0.0)


@triton.jit
def _gate(hidden, weight, bias, c, r, channels, reduced):
    """sigmoid(expand(hidden)) at channels ``c``; ``hidden`` holds all rows ``r``."""
    mask = (c < channels)[:, None] & (r < reduced)[None, :]
    w = tl.load(weight + c[:, None] * reduced + r[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.sum(w * hidden[None, :], 1)
    if bias is not None:
        out += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    return _sigmoid(out)


@triton.jit(do_not_specialize=["pieces", "count", "channels", "reduced", "splits"])
def _one_launch(
    partial,
    reduce_weight,
    reduce_bias,
    expand_weight,
    expand_bias,
    gate,
    pieces,
    count,
    channels,
    reduced,
    splits,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    r = tl.arange(0, BLOCK_R)
    sums = partial + image * pieces * channels
    hidden = _hidden(sums, pieces, count, reduce_weight, reduce_bias, r, channels, reduced, ACTIVATION, BLOCK_C)
    for start in range(split * BLOCK_C, channels, splits * BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        out = _gate(hidden, expand_weight, expand_bias, c, r, channels, reduced)
        tl.store(gate + image * channels + c, out, mask=c < channels)


@triton.jit(do_not_specialize=["pieces", "count", "channels", "reduced"])
def _reduce(
    partial,
    weight,
    bias,
    hidden,
    pieces,
    count,
    channels,
    reduced,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(reduced, BLOCK_R)
    image, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = partial + image * pieces * channels
    out = _hidden(sums, pieces, count, weight, bias, r, channels, reduced, ACTIVATION, BLOCK_C)
    tl.store(hidden + image * reduced + r, out, mask=r < reduced)


@triton.jit(do_not_specialize=["channels", "reduced"])
def _expand(hidden, weight, bias, gate, channels, reduced, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    blocks = tl.cdiv(channels, BLOCK_C)
    image, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    c, r = block * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    values = tl.load(hidden + image * reduced + r, mask=r < reduced, other=0.0)
    tl.store(gate + image * channels + c, _gate(values, weight, bias, c, r, channels, reduced), mask=c < channels)


@triton.jit(do_not_specialize=["images", "pieces", "count", "inner", "rows"])
def _of_images(
    x,
    weight,
    bias,
    y,
    images,
    pieces,
    count,
    inner,
    rows,
    ACTIVATION: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """activation(weight . sum_p x / count + bias), [images, rows], for x [images, pieces, inner]: one FC of many images."""
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    group, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row, image = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), group * IMAGES + tl.arange(0, IMAGES)
    pixels = count.to(tl.float32)
    total, some = tl.zeros([IMAGES, BLOCK_ROWS], tl.float32), tl.zeros([IMAGES, BLOCK_ROWS], tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        i = start + tl.arange(0, BLOCK_INNER)
        mask = (image < images)[:, None] & (i < inner)[None, :]
        sums = tl.zeros([IMAGES, BLOCK_INNER], tl.float32)
        for piece in range(pieces):
            sums += tl.load(x + (image[:, None] * pieces + piece) * inner + i[None, :], mask=mask, other=0.0)
        mask = (i < inner)[:, None] & (row < rows)[None, :]
        w = tl.load(weight + row[None, :] * inner + i[:, None], mask=mask, other=0.0).to(tl.float32)
        # Sums of sums, of 16 elements and of 8 such: a chain of additions over all of `inner` would lose more bits.
        some += tl.dot(tl.div_rn(sums, pixels), w, input_precision="ieee")
        if start // BLOCK_INNER % 8 == 7:
            total += some
            some = tl.zeros([IMAGES, BLOCK_ROWS], tl.float32)
    total += some
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    total = _sigmoid(total) if ACTIVATION == "sigmoid" else _activate(total, ACTIVATION)
    tl.store(y + image[:, None] * rows + row[None, :], total, mask=(image < images)[:, None] & (row < rows)[None, :])


def launch(
    partial: Tensor,
    count: int,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    *,
    gate: Tensor,
) -> None:
    """Write ``squeeze_excite_gate(...)`` into ``gate``. Two launches allocate the hidden units that pass from one to the other."""
    images, pieces, channels = partial.shape
    reduced = reduce_weight.shape[0]
    if gate.numel() == 0:
        return
    partial = partial.contiguous()
    reduce_weight, expand_weight = reduce_weight.contiguous(), expand_weight.contiguous()
    block_r, sms = next_power_of_2(reduced), processors(partial.device)
    # A tile of weights is 2048 elements, 16 a thread.
    block_c = min(max(2048 // block_r, 8), 256)
    if reduced * channels <= 2**16:
        # Few images: as many programs an image as there are blocks of channels, up to two for every multiprocessor.
        splits = min(cdiv(channels, block_c), max(2 * sms // images, 1))
        arguments = partial, reduce_weight, reduce_bias, expand_weight, expand_bias, gate, pieces, count, channels, reduced, splits
        # A quarter of the registers to a program; left alone, ptxas spills two of them to fit a fifth or sixth.
        options = {"num_warps": 4, "maxnreg": 128}
        run(_one_launch, images * splits, *arguments, ACTIVATION=activation, BLOCK_R=block_r, BLOCK_C=block_c, **options)
        return
    hidden = torch.empty((images, reduced), dtype=torch.float32, device=partial.device)
    if images > 8:
        groups = cdiv(images, 16)
        tile = {"IMAGES": 16, "BLOCK_INNER": 16, "num_warps": 4, "maxnreg": 128}
        to_hidden = partial, reduce_weight, reduce_bias, hidden, images, pieces, count, channels, reduced
        run(_of_images, groups * cdiv(reduced, 16), *to_hidden, ACTIVATION=activation, BLOCK_ROWS=16, **tile)
        to_gate = hidden, expand_weight, expand_bias, gate, images, 1, 1, reduced, channels
        run(_of_images, groups * cdiv(channels, 32), *to_gate, ACTIVATION="sigmoid", BLOCK_ROWS=32, **tile)
        return
    by_row = partial, reduce_weight, reduce_bias, hidden, pieces, count, channels, reduced
    run(_reduce, images * cdiv(reduced, 4), *by_row, ACTIVATION=activation, BLOCK_R=4, BLOCK_C=1024, num_warps=4)
    by_channel = hidden, expand_weight, expand_bias, gate, channels, reduced
    run(_expand, images * cdiv(channels, block_c), *by_channel, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4)
