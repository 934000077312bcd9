"""global_average_pool: the mean over an image, between the last convolution and the classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.ops import backends, native
from effnet_fast.ops.common import DTYPES, check_no_gradient, check_strided, differentiates, either
from effnet_fast.ops.library import define
from effnet_fast.ops.pool import reference

NAME = "global_average_pool"


def _check(x):
    check_strided(NAME, "x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{NAME}: x is {tuple(x.shape)}; [N, C, H, W] with C, H and W >= 1 would do")
    if x.dtype not in DTYPES:
        raise TypeError(f"{NAME}: x is {x.dtype}; {either(DTYPES)} would do")


def _flops(x_shape, *, out_shape, **kwargs) -> int:
    images, channels, height, width = x_shape
    return images * channels * height * width


_reference = define(
    NAME,
    "Tensor x",
    ("y",),
    reference=reference.global_average_pool,
    check=_check,
    allocate=lambda x: x.new_empty(x.shape[:2]),
    flops=_flops,
    backends=("native",),
)
backends.register(NAME, backends.Kernel("native", torch.ops.effnet_fast.global_average_pool.native, native.why_not))
backends.register(NAME, backends.Kernel("reference", _reference, backends.always))


def global_average_pool(x: Tensor) -> Tensor:
    """``mean(x, (2, 3))``.

    x        [N, C, H, W], fp32, bf16, fp16 or fp64, any strides
    returns  [N, C] in x's dtype

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    _check(x)
    if differentiates():
        check_no_gradient(NAME, x)
    return backends.choose(NAME, x).run(x)
