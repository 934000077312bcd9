"""The backward of training's squeeze-excite in Triton: two launches where PyTorch's own ops are eighteen.

The first makes, for 16 images, up to 64 hidden units and a share of the channels, two products with the weights: the hidden units
again, and the gradient of what was made of them. The second owns 16 channels and all hidden units. It walks over the images, 16 at
once, adds up the shares, and makes of them what is of its channels: both gradients of weights, in registers, the gradient of the
mean and, of that, the sums that the norm before the gate needs. There are no atomics: results are the same to the bit.

An image takes 5 C R multiply-adds in float32 and 10 C floats that are read; the weights come once for 16 images in the first
launch, from L2, and that of the reduction once in the second. What binds is latency: a walk over 128 images has eight steps. Not
run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.training.triton import activation_and_slope
from effnet_fast.ops.triton_common import cdiv, next_power_of_2, processors, run

IMAGES, CHANNELS, STEP = 16, 16, 32  # of a program at once; channels of the second launch's, and of a step of the first's


@triton.jit
def _product(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _of_logits(sums, gate, image, images, c, channels):
    """The gradient of what the sigmoid is of, at images and channels; and which of these there are."""
    mask = (image < images)[:, None] & (c < channels)[None, :]
    of_gate = tl.load(sums + (image * 5 * channels)[:, None] + c[None, :], mask=mask, other=0.0)
    g = tl.load(gate + (image * channels)[:, None] + c[None, :], mask=mask, other=0.0)
    return of_gate * (g * (1.0 - g)), g, mask


@triton.jit(do_not_specialize=["images", "channels", "hidden", "share"])
def _of_hidden(
    sums,
    gate,
    pooled,
    reduce,
    expand,
    partial,
    images,
    channels,
    hidden,
    share,
    IMAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial [shares, 2, images, hidden], of ``share`` channels each: means times the reduction, gradients times the expansion."""
    blocks, groups = tl.cdiv(hidden, BLOCK_R), tl.cdiv(images, IMAGES)
    block, owner = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    group, number = owner % groups, owner // groups
    image = (group * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    made = tl.zeros([IMAGES, BLOCK_R], tl.float32)
    back = tl.zeros([IMAGES, BLOCK_R], tl.float32)
    for start in range(number * share, tl.minimum(number * share + share, channels), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        e, _, mask = _of_logits(sums, gate, image, images, c, channels)
        mean = tl.load(pooled + (image * channels)[:, None] + c[None, :], mask=mask, other=0.0)
        of_both = (c < channels)[:, None] & (r < hidden)[None, :]
        w = tl.load(reduce + r[None, :] * channels + c[:, None], mask=of_both, other=0.0).to(tl.float32)
        made = _product(mean, w, made)
        w = tl.load(expand + c[:, None] * hidden + r[None, :], mask=of_both, other=0.0).to(tl.float32)
        back = _product(e, w, back)
    to = partial + (number * 2 * images + image)[:, None] * hidden + r[None, :]
    mask = (image < images)[:, None] & (r < hidden)[None, :]
    tl.store(to, made, mask=mask)
    tl.store(to + images * hidden, back, mask=mask)


@triton.jit(do_not_specialize=["shares", "images", "channels", "hidden", "pixels"])
def _of_channels(
    sums,
    gate,
    pooled,
    reduce,
    reduce_bias,
    partial,
    pool,
    norm_sums,
    grad_reduce,
    grad_reduce_bias,
    grad_expand,
    grad_expand_bias,
    shares,
    images,
    channels,
    hidden,
    pixels,
    ACTIVATION: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c, r = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    c_inside, r_inside = c < channels, r < hidden
    w = tl.load(reduce + r[:, None] * channels + c[None, :], mask=r_inside[:, None] & c_inside[None, :], other=0.0).to(tl.float32)
    bias = tl.zeros([BLOCK_R], tl.float32)
    if reduce_bias is not None:
        bias = tl.load(reduce_bias + r, mask=r_inside, other=0.0).to(tl.float32)
    of_reduce = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    of_expand = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    of_reduce_bias = tl.zeros([BLOCK_R], tl.float32)
    of_expand_bias = tl.zeros([BLOCK_C], tl.float32)
    of_norm = tl.zeros([BLOCK_C], tl.float32)
    of_norm_centred = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, images, IMAGES):
        image = (start + tl.arange(0, IMAGES)).to(tl.int64)
        of_units = (image < images)[:, None] & r_inside[None, :]
        made = tl.zeros([IMAGES, BLOCK_R], tl.float32)
        back = tl.zeros([IMAGES, BLOCK_R], tl.float32)
        for number in range(shares):
            at = partial + (number * 2 * images + image)[:, None] * hidden + r[None, :]
            made += tl.load(at, mask=of_units, other=0.0)
            back += tl.load(at + images * hidden, mask=of_units, other=0.0)
        value, slope = activation_and_slope(made + bias[None, :], ACTIVATION)
        value, h = tl.where(of_units, value, 0.0), back * slope
        e, g, mask = _of_logits(sums, gate, image, images, c, channels)
        mean = tl.load(pooled + (image * channels)[:, None] + c[None, :], mask=mask, other=0.0)
        of_pixel = _product(h, w, tl.zeros([IMAGES, BLOCK_C], tl.float32)) / pixels
        tl.store(pool + (image * channels)[:, None] + c[None, :], of_pixel, mask=mask)
        at = sums + (image * 5 * channels)[:, None] + c[None, :]
        first = g * tl.load(at + channels, mask=mask, other=0.0) + of_pixel * tl.load(at + 2 * channels, mask=mask, other=0.0)
        second = g * tl.load(at + 3 * channels, mask=mask, other=0.0) + of_pixel * tl.load(at + 4 * channels, mask=mask, other=0.0)
        of_norm += tl.sum(first, 0)
        of_norm_centred += tl.sum(second, 0)
        of_reduce = _product(tl.trans(h), mean, of_reduce)
        of_expand = _product(tl.trans(e), value, of_expand)
        of_reduce_bias += tl.sum(h, 0)
        of_expand_bias += tl.sum(e, 0)
    tl.store(norm_sums + c, of_norm, mask=c_inside)
    tl.store(norm_sums + channels + c, of_norm_centred, mask=c_inside)
    tl.store(grad_reduce + r[:, None] * channels + c[None, :], of_reduce, mask=r_inside[:, None] & c_inside[None, :])
    tl.store(grad_expand + c[:, None] * hidden + r[None, :], of_expand, mask=c_inside[:, None] & r_inside[None, :])
    tl.store(grad_expand_bias + c, of_expand_bias, mask=c_inside)
    if tl.program_id(0) == 0:
        tl.store(grad_reduce_bias + r, of_reduce_bias, mask=r_inside)


def squeeze_excite_backward(
    sums: Tensor,
    gate: Tensor,
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    activation: str,
    pixels: int,
    *,
    pool: Tensor,
    norm_sums: Tensor,
    grad_reduce_weight: Tensor,
    grad_reduce_bias: Tensor,
    grad_expand_weight: Tensor,
    grad_expand_bias: Tensor,
) -> None:
    (images, channels), hidden = gate.shape, reduce_weight.shape[0]
    read = sums.contiguous(), gate.contiguous(), pooled.contiguous(), reduce_weight.contiguous()
    block_r = max(next_power_of_2(hidden), 16)
    tile = min(block_r, 64)
    programs = cdiv(images, IMAGES) * cdiv(hidden, tile)
    # As many shares of channels as give every multiprocessor a program; but every program of the second launch reads them all.
    share = STEP * cdiv(cdiv(channels, STEP), min(max(processors(sums.device) // programs, 1), 8))
    shares = cdiv(channels, share)
    partial = torch.empty((shares, 2, images, hidden), dtype=torch.float32, device=sums.device)
    sizes = images, channels, hidden
    run(
        _of_hidden,
        programs * shares,
        *read,
        expand_weight.contiguous(),
        partial,
        *sizes,
        share,
        IMAGES=IMAGES,
        BLOCK_R=tile,
        BLOCK_C=STEP,
        num_warps=4,
    )
    made = pool, norm_sums, grad_reduce_weight, grad_reduce_bias, grad_expand_weight, grad_expand_bias
    run(
        _of_channels,
        cdiv(channels, CHANNELS),
        *read,
        None if reduce_bias is None else reduce_bias.contiguous(),
        partial,
        *made,
        shares,
        *sizes,
        pixels,
        ACTIVATION=activation,
        IMAGES=IMAGES,
        BLOCK_R=block_r,
        BLOCK_C=CHANNELS,
        num_warps=4 if block_r <= 64 else 8,
    )
