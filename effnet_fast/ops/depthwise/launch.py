"""How the CUDA kernel of depthwise_conv_bn_act is cut into blocks, and so how many partial sums an image has.

csrc/depthwise/forward.cuh has the same tiles; it is told the number of partial sums and takes the segments of rows from that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from effnet_fast.ops.common import constant

DIRECT_THREADS = 128


@dataclass(frozen=True)
class Tile:
    """What one block makes: ``columns`` x ``channels`` of the output of ``images`` images, sliding down a segment of rows.

    The kernel without tensor cores counts a thread's tile instead. ``piece``: columns of a segment that one partial sum covers.
    """

    columns: int
    channels: int
    images: int
    piece: int
    threads: bool


def tile(dtype: torch.dtype, channels: int, width: int) -> Tile:
    """Half types with C a multiple of 8 run on the tensor cores: 48 channels (or 64 or 32 where less of C is then unused) by 32
    columns, or by 16 or 8 columns of as many more images. All else is computed 4 columns a thread. (5x5 and stride 2 keep to 48
    channels; the segments that are counted here for 64 or 32 serve them too.)"""
    if dtype not in (torch.bfloat16, torch.float16) or channels % 8:
        return Tile(4, 2 if dtype == torch.float32 and channels % 2 == 0 else 1, 1, 4, True)
    columns = 8 if width <= 8 else 16 if width <= 16 else 32
    block = 48
    for size in (64, 32) if columns == 32 else ():
        if -(-channels // size) * size < -(-channels // block) * block:
            block = size
    return Tile(columns, block, 32 // columns, 16, False)


def rows_and_pieces(
    dtype: torch.dtype, images: int, channels: int, height: int, width: int, multiprocessors: int
) -> tuple[int, int]:
    """Output rows of a segment, and the partial sums of an image, for outputs [images, channels, height, width].

    An image is cut into as many segments as give every multiprocessor a block: fewer leave some idle, more repeat the halo rows
    and the start of a block. Sizes may be symbolic.
    """
    t = tile(dtype, channels, width)
    blocks = -(-channels // t.channels) * -(-width // t.columns) * -(-images // t.images)
    if t.threads:
        blocks = -(-blocks // DIRECT_THREADS)
    segments = torch.sym_max(multiprocessors // torch.sym_max(blocks, 1), 1)
    rows = -(-height // torch.sym_min(segments, height))
    return rows, -(-height // rows) * -(-width // t.piece)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@constant
def multiprocessors(device: int) -> int:
    """Of that CUDA device."""
    return _multiprocessors(device)


def pieces(x: Tensor, height: int, width: int) -> int:
    """Partial sums that the CUDA kernel makes of each image of ``x`` [N, C, H, W] whose output is ``height`` x ``width``."""
    return rows_and_pieces(x.dtype, x.shape[0], x.shape[1], height, width, multiprocessors(x.device.index))[1]
