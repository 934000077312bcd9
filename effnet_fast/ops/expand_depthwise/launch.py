"""What the CUDA kernel of expand_depthwise_conv_bn_act takes of a block's shared memory, and where it is worth it.

csrc/expand_depthwise/forward.cuh has the same numbers.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from effnet_fast.ops import gpu
from effnet_fast.ops.common import constant

CHANNELS, COLUMNS = 48, 32  # of a block
FEW = 64  # input channels


def shared_bytes(inputs: int, kernel: int, stride: int, width: int) -> int:
    """Of a block, for outputs ``width`` columns wide of ``inputs`` input channels."""
    columns = 8 if width <= 8 else 16 if width <= 16 else COLUMNS
    live = -(-kernel // stride)
    pixels = COLUMNS // columns * ((columns - 1) * stride + kernel)
    stage = (live * stride * pixels + 1) * (2 * CHANNELS + 16)
    weights = (kernel * kernel + 1) * (2 * CHANNELS + 16)
    norm, out = 8 * CHANNELS, live * COLUMNS * 2 * CHANNELS
    stays = stage + (norm if (kernel, stride) == (5, 1) else 0)
    loop = stays + (2 if stays + 2 * out <= 64 << 10 else 1) * out
    pitch = 16 * (inputs // 8 | 1)
    return max(loop, stage + norm + weights) + norm + (CHANNELS + -(-live * stride * pixels // 32) * 32) * pitch


def why_too_large(x: Tensor, inputs: int, kernel: int, stride: int, width: int) -> str | None:
    """Why shared memory does not suffice for that, or None; ``width``: of the output."""
    if not x.is_cuda:
        return None
    wanted, there = shared_bytes(inputs, kernel, stride, width), gpu.shared_memory(x.device.index)
    return None if wanted <= there else f"{inputs} input channels: a block would take {wanted} of {there} bytes of shared memory"


@functools.cache
def _cache_bytes(device: int) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


@constant
def cache_bytes(device: int) -> int:
    """Of that CUDA device's L2."""
    return _cache_bytes(device)


def is_faster(x: Tensor, channels: int, stride: int) -> bool:
    """Whether the kernel beats two, by what an H200 took in bf16 (benchmarks/results/expand-depthwise-cuda.json): with stride 2,
    few input channels, and twice what L2 holds between the two. Else h costs more in this kernel than to write and read it."""
    between = x.shape[0] * channels * x.shape[2] * x.shape[3] * x.element_size()
    return x.dtype == torch.bfloat16 and stride == 2 and x.shape[1] <= FEW and between > 2 * cache_bytes(x.device.index)
