"""The stem in Triton: a 3x3 convolution with stride 2 from a few channels, as one matrix product of all taps.

One program owns BLOCK_P output pixels of one image and up to 64 output channels. Its x is gathered by strides, so that images of
either layout are read as they are, and normalised where they are of bytes; the product's depth, C*3*3 = 27 taps, is one step of
BLOCK_T = 32. Bound by HBM: y is 2.7 times as large as x in B0, 5.3 times in B7.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.common import output_size
from effnet_fast.ops.conv import is_stem
from effnet_fast.ops.triton_common import (
    activate,
    alignment,
    cdiv,
    channels_last,
    converted,
    dot,
    folded_norm,
    matmul_precision,
    next_power_of_2,
    run,
    stored,
    vectors,
)

_PLAIN_INTEGERS = ["height", "width", "out_height", "out_width", "top", "left", "channels", "output_groups"]
_STRIDES = [f"{tensor}_{axis}" for tensor in ("x", "w") for axis in "nchw"]


@triton.jit(do_not_specialize=["norm_eps", *_PLAIN_INTEGERS, *_STRIDES])
def _kernel(
    x,
    weight,
    norm_weight,
    norm_bias,
    norm_mean,
    norm_var,
    norm_eps,
    residual,
    pixels,
    y,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    channels,
    output_groups,
    x_n,
    x_c,
    x_h,
    x_w,
    w_n,
    w_c,
    w_h,
    w_w,
    ALIGN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    outputs, out_pixels = output_groups * ALIGN_K, out_height * out_width
    tiles_n, tiles_p = tl.cdiv(outputs, BLOCK_N), tl.cdiv(out_pixels, BLOCK_P)
    tile_n, owner = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    image, tile_p = (owner // tiles_p).to(tl.int64), owner % tiles_p
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    channel, dy, dx = t // 9, t // 3 % 3, t % 3
    row, column = (p // out_width * 2 - top)[:, None] + dy[None, :], (p % out_width * 2 - left)[:, None] + dx[None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (channel < channels)[None, :]
    inside &= (p < out_pixels)[:, None]
    # Wide offsets: an image may be a small view of a large tensor, or a very large one.
    at = row.to(tl.int64) * x_h + column.to(tl.int64) * x_w + (channel.to(tl.int64) * x_c)[None, :]
    a = tl.load(x + image * x_n + at, mask=inside, other=0)
    if pixels is not None:
        pixel_scale = tl.load(pixels + channel, mask=channel < channels, other=0.0)
        pixel_shift = tl.load(pixels + channels + channel, mask=channel < channels, other=0.0)
        normalised = a.to(tl.float32) * pixel_scale[None, :] + pixel_shift[None, :]
        a = stored(tl.where(inside, normalised, 0.0), y.dtype.element_ty)
    taps = weight + (channel * w_c + dy * w_h + dx * w_w)[:, None] + (n * w_n)[None, :]
    b = tl.load(taps, mask=(channel < channels)[:, None] & (n < outputs)[None, :], other=0.0)
    sums = dot(a, converted(b, y.dtype.element_ty), tl.zeros([BLOCK_P, BLOCK_N], tl.float32), PRECISION)
    scale, shift = folded_norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps, n, n < outputs)
    out = activate(sums * scale[None, :] + shift[None, :], ACTIVATION)
    offsets = image * out_pixels * outputs + p.to(tl.int64)[:, None] * outputs + n[None, :]
    mask = (p < out_pixels)[:, None] & (n < outputs)[None, :]
    if residual is not None:
        out += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, stored(out, y.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor,
    norm_var: Tensor,
    norm_eps: float,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
    activation: str,
    pixels: Tensor | None,
    *,
    y: Tensor,
) -> None:
    """Write ``conv_bn_act(...)`` into ``y``."""
    images, channels, height, width = x.shape
    outputs = weight.shape[0]
    if not is_stem(weight, stride):
        raise ValueError(f"conv_bn_act: weight is {tuple(weight.shape)}, stride {stride}; [K, C <= 4, 3, 3] and stride 2 would do")
    top, bottom, left, right = padding
    out_height, out_width = output_size(height, 3, 2, top, bottom), output_size(width, 3, 2, left, right)
    if y.numel() == 0:
        return
    block_p, block_n = 64, min(max(next_power_of_2(outputs), 16), 64)
    run(
        _kernel,
        images * cdiv(out_height * out_width, block_p) * cdiv(outputs, block_n),
        x,
        weight,
        *vectors(norm_weight, norm_bias, norm_mean, norm_var),
        norm_eps,
        None if residual is None else channels_last(residual),
        *vectors(pixels),
        y,
        height,
        width,
        out_height,
        out_width,
        top,
        left,
        channels,
        outputs // alignment(outputs),
        *x.stride(),
        *weight.stride(),
        ALIGN_K=alignment(outputs),
        ACTIVATION=activation,
        PRECISION=matmul_precision(y.dtype),
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        BLOCK_T=next_power_of_2(9 * channels) if channels > 1 else 16,
        num_warps=4,
    )
