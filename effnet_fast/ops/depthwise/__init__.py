"""depthwise_conv_bn_act: a depthwise convolution, its norm and activation, and the squeeze's partial sums, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_fast.ops import backends, native, triton_backend
from effnet_fast.ops.common import (
    NORM_SCHEMA,
    Norm,
    accumulator,
    check_conv,
    check_integer,
    check_no_gradient,
    conv_flops,
    differentiates,
    empty_output,
)
from effnet_fast.ops.depthwise import launch, reference
from effnet_fast.ops.library import define

NAME = "depthwise_conv_bn_act"
KERNELS, STRIDES = ((3, 3), (5, 5)), (1, 2)  # that kernels other than the reference take


def _check(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, stride, padding, activation, pieces=0):
    check_integer(NAME, "pieces", pieces, 0)
    norm = norm_weight, norm_bias, norm_mean, norm_var, norm_eps
    return check_conv(NAME, "depthwise", x, weight, norm, activation, stride, padding)


def _allocate(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, stride, padding, activation, pieces):
    y = empty_output(x, weight, stride, padding, x.dtype)
    return y, y.new_empty((x.shape[0], pieces, weight.shape[0]), dtype=accumulator(x.dtype))


def _flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    return conv_flops(x_shape, weight_shape, out_shape[0])


_reference = define(
    NAME,
    f"Tensor x, Tensor weight, {NORM_SCHEMA}, int stride, SymInt[] padding, str activation, SymInt pieces",
    ("y", "partial"),
    reference=reference.depthwise_conv_bn_act,
    check=_check,
    allocate=_allocate,
    flops=_flops,
    backends=("native", "triton"),
)
triton_backend.register(NAME, _check, _allocate)


def _native_can_run(x: Tensor) -> str | None:
    return native.why_not(x, cuda=True)


def _native_pieces(x: Tensor, height: int, width: int) -> int:
    """On the CPU bands of 7 rows or a little more, at most 16: what a thread works on at a time, small enough to share an
    image out evenly."""
    if x.is_cuda:
        return launch.pieces(x, height, width)
    return max(1, min(height // 7, 16))


def triton_pieces(x: Tensor, height: int, width: int) -> int:
    """So many that the programs (an image's piece of 64 channels each) fill a large GPU several times over, one for 32 pixels at
    most; and few enough that the gate's kernel adds them up in no time."""
    others = max(x.shape[0] * ((x.shape[1] + 63) // 64), 1)
    return max(min((2048 + others - 1) // others, (height * width + 31) // 32, 128), 1)


backends.register(
    NAME,
    backends.Kernel("native", torch.ops.effnet_fast.depthwise_conv_bn_act.native, _native_can_run, _native_pieces),
)
backends.register(
    NAME, backends.Kernel("triton", torch.ops.effnet_fast.depthwise_conv_bn_act.triton, triton_backend.can_run, triton_pieces)
)
backends.register(NAME, backends.Kernel("reference", _reference, backends.always, lambda x, height, width: 1))


def is_taken(weight: Tensor, stride: int) -> bool:
    """Whether kernels other than the reference take such a convolution."""
    return tuple(weight.shape[2:]) in KERNELS and stride in STRIDES


def _unsupported(weight: Tensor, stride: int) -> dict[str, str] | None:
    if is_taken(weight, stride):
        return None
    _, _, rows, columns = weight.shape
    reason = f"kernel {rows}x{columns}, stride {stride}: only the reference takes others than 3x3 and 5x5, stride 1 and 2"
    return {"native": reason, "triton": reason}


def depthwise_conv_bn_act(
    x: Tensor, weight: Tensor, norm: Norm, *, stride: int, padding: Sequence[int], activation: str, squeeze: bool
) -> tuple[Tensor, Tensor]:
    """``y = activation(norm(depthwise_conv(x)))`` and, with ``squeeze``, the sums that squeeze-excite needs.

    x        [N, C, H, W], fp32, bf16, fp16 or fp64, any strides
    weight   [C, 1, k, k], of any of these dtypes (GPUs round it to x's)
    norm     [C] each, of any of these dtypes, all alike
    padding  (top, bottom, left, right), zeros, need not be symmetric
    returns  y [N, C, H', W'] channels_last in x's dtype; partial [N, P, C] fp32 (fp64 beside fp64): sums of the stored y
             over P disjoint pieces of the image that cover it (P = 0 without ``squeeze``); the kernel that runs chooses P

    An x that is not finite makes NaN of the outputs that see it in its channel and, in half precision on CUDA, in the 8 channels of
    its group, whose taps there are a matrix product (0 * inf); so does a y that overflows of their partial sums.

    No gradient: see effnet_fast.nn for when modules use it. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    height, width = _check(x, weight, *norm, stride, padding, activation)
    if differentiates():
        check_no_gradient(NAME, x, weight, *norm[:4])
    kernel = backends.choose(NAME, x, _unsupported(weight, stride))
    pieces = kernel.pieces(x, height, width) if squeeze else 0  # type: ignore[misc]
    return kernel.run(x, weight, *norm, stride, padding, activation, pieces)
