"""pointwise_conv_bn_act in Triton: a GEMM of x as [N*H*W, C] with the weight [K, C].

One program owns BLOCK_M pixels and BLOCK_N output channels and walks over C. The gate is multiplied into x as it is loaded, the
folded norm, the activation and the residual are done to the fp32 sums before the one store. C or K is small in EfficientNet, so the
kernel streams: x is read and y is written once, C*K/(C+K) multiply-adds an element moved, and HBM binds (bf16, all but the widest
layers of B5 to B7). Several programs share a multiprocessor, so that one's loads hide another's epilogue: the grid is plain, not
persistent. Programs that share pixels are neighbours, so that L2 serves all but the first read of x; the weight stays in L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.ops.triton_common import (
    activate,
    alignment,
    channels_last,
    check_output,
    converted,
    dot,
    folded_norm,
    matmul_precision,
    processors,
    run,
    stored,
    vectors,
)


@triton.jit(do_not_specialize=["norm_eps", "rows", "pixels", "images", "channel_groups", "output_groups"])
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
    images,
    channel_groups,
    output_groups,
    ALIGN_C: tl.constexpr,
    ALIGN_K: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    channels, outputs = channel_groups * ALIGN_C, output_groups * ALIGN_K
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    # The tile's first row carries the 64 bits; offsets within the tile fit in 32.
    row = tile_m.to(tl.int64) * BLOCK_M
    left = tl.minimum(rows - row, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end repeat the last one: only the walk over C needs a mask.
    m_inside, n_inside = tl.minimum(m, left - 1), tl.minimum(n, outputs - 1)
    x_rows = x + row * channels + (m_inside * channels)[:, None]
    weight_columns = weight + (n_inside * channels)[None, :]
    image = row // pixels
    place = (row - image * pixels).to(tl.int32) + m_inside  # counted from the first pixel of the tile's first image
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < channels
        a = tl.load(x_rows + k[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(weight_columns + k[:, None], mask=inside[:, None], other=0.0)
        if gate is not None:
            if TWO_IMAGES:
                # Two rows of gates, not one a pixel: less to load than x itself.
                next_image = tl.minimum(image + 1, images - 1)
                first = tl.load(gate + image * channels + k, mask=inside, other=0.0)
                second = tl.load(gate + next_image * channels + k, mask=inside, other=0.0)
                g = tl.where((place >= pixels)[:, None], second[None, :], first[None, :])
            else:
                gate_rows = gate + (image + place // pixels)[:, None] * channels
                g = tl.load(gate_rows + k[None, :], mask=inside[None, :], other=0.0)
            a = stored(a.to(tl.float32) * g, x.dtype.element_ty)
        sums = dot(a, converted(b, x.dtype.element_ty), sums, PRECISION)
    scale, shift = folded_norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps, n_inside, n < outputs)
    out = activate(sums * scale[None, :] + shift[None, :], ACTIVATION)
    offsets = m[:, None] * outputs + n[None, :]
    mask = (m < left)[:, None] & (n < outputs)[None, :]
    if residual is not None:
        out += tl.load(residual + row * outputs + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * outputs + offsets, stored(out, y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """A program's share: ``block_m`` pixels, ``block_n`` output channels, ``block_k`` input channels at a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def _power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``size``, between ``least`` and ``most``."""
    return min(max(triton.next_power_of_2(size), least), most)


def choose_config(rows: int, channels: int, outputs: int, itemsize: int, tensor_cores: bool, sms: int) -> Config:
    """The default launch, from the shape of the GEMM and the GPU's number of multiprocessors: reasoned, not tuned on a GPU.

    Four warps hold 64 x 128 sums, 64 a thread, and with all of the epilogue stay under 255 registers: two programs or more share a
    multiprocessor. 128 x 128 over eight warps takes as many registers a thread, since each then holds the folded norm of 64
    columns, and leaves room for one program alone. fp32 without tensor cores multiplies from registers: half the tile, short steps.
    """
    largest = 128 if tensor_cores else 64
    # Up to one tile's width of output channels are one tile: x is loaded once. Wider ones: as few padded channels as can be.
    block_n = _power_of_2(outputs, 16, largest)
    if outputs > largest and triton.cdiv(outputs, largest // 2) % 2:
        block_n = largest // 2
    block_m = _power_of_2(rows, 16, 128 if tensor_cores and block_n <= 32 else 64)
    # 7x7 and 14x14 at batch 1: smaller tiles until every multiprocessor has one. First fewer pixels: what is read again then is the
    # weight, which L2 holds; then fewer outputs.
    while triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n) < sms and block_m > 16:
        block_m //= 2
    while triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n) < sms and block_n > 16:
        block_n //= 2
    small = block_m * block_n <= 512
    num_warps = 2 if small else 4
    if not tensor_cores:
        # All registers that a thread can have, said outright: ptxas would spill a few of them to fit a sixth program.
        return Config(block_m, block_n, 16, num_warps, 2, 255)
    # 128 bytes of x a row and step: whole cache lines. Small tiles wait for L2 rather than for HBM: twice the bytes in flight.
    block_k = _power_of_2(channels, 16, (256 if small else 128) // itemsize)
    # 64 KB for the stages: with the epilogue's scratch, two programs still fit in the 164 KB of an sm_80.
    stages = min(triton.cdiv(channels, block_k) + 1, 4 if small else 3, 65536 // (block_k * (block_m + block_n) * itemsize))
    return Config(block_m, block_n, block_k, num_warps, max(stages, 2))


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
    check_output("pointwise_conv_bn_act", y, (images, outputs, height, width), x)
    if y.numel() == 0:
        return
    precision = matmul_precision(x.dtype)
    tensor_cores = x.dtype != torch.float32 or precision == "tf32"
    config = choose_config(images * pixels, channels, outputs, x.element_size(), tensor_cores, processors(x.device))
    run(
        _kernel,
        triton.cdiv(images * pixels, config.block_m) * triton.cdiv(outputs, config.block_n),
        channels_last(x),
        weight.contiguous(),
        *vectors(norm_weight, norm_bias, norm_mean, norm_var),
        norm_eps,
        None if gate is None else gate.contiguous(),
        None if residual is None else channels_last(residual),
        y,
        images * pixels,
        pixels,
        images,
        channels // alignment(channels),
        outputs // alignment(outputs),
        ALIGN_C=alignment(channels),
        ALIGN_K=alignment(outputs),
        TWO_IMAGES=gate is not None and pixels >= config.block_m,
        ACTIVATION=activation,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )
