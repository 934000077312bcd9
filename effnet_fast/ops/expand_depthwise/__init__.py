"""expand_depthwise_conv_bn_act: a pointwise and a depthwise convolution, each with its norm and the activation, in one kernel.

What is between them, the widest tensor of a network, is not written. Of CUDA alone: on the CPU the inference plan
(csrc/inference/expand_depthwise.cpp) does it in bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_fast.ops import backends, depthwise, native
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
    output_size,
)
from effnet_fast.ops.depthwise import launch as depthwise_launch
from effnet_fast.ops.expand_depthwise import launch, reference
from effnet_fast.ops.library import define
from effnet_fast.ops.pointwise import HALVES

NAME = "expand_depthwise_conv_bn_act"


def _check(x, expand_weight, *args):
    """``args``: of the op, from expand_norm_weight on, perhaps without the pieces."""
    expand_norm, (weight, *rest) = args[:5], args[5:]
    norm, (stride, padding, activation, *pieces) = tuple(rest[:5]), rest[5:]
    check_integer(NAME, "pieces", pieces[0] if pieces else 0, 0)
    check_conv(NAME, "pointwise", x, expand_weight, expand_norm, activation, prefix="expand_")
    return check_conv(NAME, "depthwise", x, weight, norm, activation, stride, padding, channels=expand_weight.shape[0])


def _allocate(x, expand_weight, *args):
    weight, (stride, padding, _, pieces) = args[5], args[11:]
    y = empty_output(x, weight, stride, padding, x.dtype)
    return y, y.new_empty((x.shape[0], pieces, weight.shape[0]), dtype=accumulator(x.dtype))


def _flops(x_shape, expand_shape, *args, out_shape, **kwargs) -> int:
    return conv_flops(x_shape, expand_shape, (*x_shape[:1], 0, *x_shape[2:])) + conv_flops(x_shape, args[5], out_shape[0])


_reference = define(
    NAME,
    f"Tensor x, Tensor expand_weight, {NORM_SCHEMA.replace('norm_', 'expand_norm_')},"
    f" Tensor weight, {NORM_SCHEMA}, int stride, SymInt[] padding, str activation, SymInt pieces",
    ("y", "partial"),
    reference=reference.expand_depthwise_conv_bn_act,
    check=_check,
    allocate=_allocate,
    flops=_flops,
    backends=("native",),
)


def _native_can_run(x: Tensor) -> str | None:
    if not x.is_cuda:
        return "the kernel is one of CUDA"
    return native.why_not(x, cuda=True, dtypes=HALVES)


def _pieces(x: Tensor, height: int, width: int, channels: int) -> int:
    processors = depthwise_launch.multiprocessors(x.device.index)
    return depthwise_launch.rows_and_pieces(x.dtype, x.shape[0], channels, height, width, processors)[1]


backends.register(NAME, backends.Kernel("native", torch.ops.effnet_fast.expand_depthwise_conv_bn_act.native, _native_can_run))
backends.register(NAME, backends.Kernel("reference", _reference, backends.always))


def _unsupported(x: Tensor, expand_weight: Tensor, weight: Tensor, stride: int, width: int) -> str | None:
    """``width``: of the output."""
    if (reason := depthwise._unsupported(weight, stride)) is not None:
        return reason["native"]
    channels, inputs = expand_weight.shape[:2]
    if channels % 8 or inputs % 8:
        return f"{inputs} to {channels} channels: the CUDA kernel takes multiples of 8"
    return launch.why_too_large(x, inputs, weight.shape[2], stride, width)


def is_one_kernel(x: Tensor, expand_weight: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> bool:
    """Whether one kernel is to make both convolutions of ``x``: where the native backend has one and it is faster than two, or is
    asked for strictly."""
    requested, strict = backends.requested()
    if requested not in (None, "native") or _native_can_run(x) is not None:
        return False
    if not strict and not launch.is_faster(x, weight.shape[0], stride):
        return False
    width = output_size(x.shape[3], weight.shape[3], stride, padding[2], padding[3])
    return _unsupported(x, expand_weight, weight, stride, width) is None


def expand_depthwise_conv_bn_act(
    x: Tensor,
    expand_weight: Tensor,
    expand_norm: Norm,
    weight: Tensor,
    norm: Norm,
    *,
    stride: int,
    padding: Sequence[int],
    activation: str,
    squeeze: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`effnet_fast.ops.depthwise_conv_bn_act` of ``activation(expand_norm(conv1x1(x)))``, in x's dtype.

    x              [N, C, H, W], fp32, bf16, fp16 or fp64, any strides
    expand_weight  [K, C, 1, 1], expand_norm [K] each, of any of these dtypes
    weight         [K, 1, k, k], norm [K] each, likewise
    padding        (top, bottom, left, right), zeros around the expanded tensor, need not be symmetric
    returns        y [N, K, H', W'] channels_last in x's dtype; partial [N, P, K] as there

    What is not finite once expanded, in x's dtype, makes NaN of the outputs that see it in the 8 channels of its group. Where the
    native backend has no kernel, plain PyTorch runs. No gradient. Raises ValueError or TypeError, naming the argument, on bad
    input.
    """
    height, width = _check(x, expand_weight, *expand_norm, weight, *norm, stride, padding, activation)
    if differentiates():
        check_no_gradient(NAME, x, expand_weight, *expand_norm[:4], weight, *norm[:4])
    reason = _unsupported(x, expand_weight, weight, stride, width)
    kernel = backends.choose(NAME, x, None if reason is None else {"native": reason})
    pieces = 0
    if squeeze:
        pieces = _pieces(x, height, width, weight.shape[0]) if kernel.backend == "native" else 1
    return kernel.run(x, expand_weight, *expand_norm, weight, *norm, stride, padding, activation, pieces)
