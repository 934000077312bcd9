"""conv_bn_act: a dense k x k convolution with its norm, activation and residual: the stem, and EfficientNetV2's FusedMBConv."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_fast.ops import backends, native, triton_backend
from effnet_fast.ops.common import (
    NORM_SCHEMA,
    Norm,
    check_conv,
    check_no_gradient,
    conv_flops,
    differentiates,
    either,
    empty_output,
)
from effnet_fast.ops.conv import reference
from effnet_fast.ops.library import define

NAME = "conv_bn_act"


def _check(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, residual, stride, padding, activation, pixels):
    norm = norm_weight, norm_bias, norm_mean, norm_var, norm_eps
    check_conv(NAME, "dense", x, weight, norm, activation, stride, padding, residual=residual, pixels=pixels)


def _allocate(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, residual, stride, padding, activation, pixels):
    return empty_output(x, weight, stride, padding, x.dtype if pixels is None else weight.dtype)


def _flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    return conv_flops(x_shape, weight_shape, out_shape)


_reference = define(
    NAME,
    f"Tensor x, Tensor weight, {NORM_SCHEMA}, Tensor? residual, int stride, SymInt[] padding, str activation, Tensor? pixels",
    ("y",),
    reference=reference.conv_bn_act,
    check=_check,
    allocate=_allocate,
    flops=_flops,
    backends=("native", "triton"),
)
_DTYPES = (*native.STORED, torch.uint8)  # of x
_NATIVE, _TRITON = (functools.partial(can_run, dtypes=_DTYPES) for can_run in (native.why_not, triton_backend.can_run))
triton_backend.register(NAME, _check, _allocate, _DTYPES)
backends.register(NAME, backends.Kernel("native", torch.ops.effnet_fast.conv_bn_act.native, _NATIVE))
backends.register(NAME, backends.Kernel("triton", torch.ops.effnet_fast.conv_bn_act.triton, _TRITON))
backends.register(NAME, backends.Kernel("reference", _reference, backends.always))


def is_stem(weight: Tensor, stride: int) -> bool:
    """Whether a convolution is one that kernels other than the reference are for: Triton's takes no other.

    A dense k x k convolution of many channels (FusedMBConv) is bound by multiplications, and libraries do those near the peak; a
    stem is bound by memory, and a library would make three passes of it.
    """
    _, channels, *kernel = weight.shape
    return kernel == [3, 3] and stride == 2 and channels <= 4


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    *,
    stride: int,
    padding: Sequence[int],
    activation: str,
    residual: Tensor | None = None,
    pixels: Tensor | None = None,
) -> Tensor:
    """``activation(norm(conv(x))) + residual``, one group.

    x         [N, C, H, W], fp32, bf16, fp16 or fp64, any strides; beside pixels uint8
    weight    [K, C, k, k], of any of these dtypes (GPUs round it to x's)
    norm      [K] each, of any of these dtypes, all alike
    padding   (top, bottom, left, right), zeros
    residual  [N, K, H', W'] in the result's dtype
    pixels    [2, C] fp32 (fp64 beside fp64 weight): what is convolved, and padded, is ``x * pixels[0] + pixels[1]`` of the channel
    returns   [N, K, H', W'] channels_last in x's dtype, beside pixels in weight's

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    _check(x, weight, *norm, residual, stride, padding, activation, pixels)
    if differentiates():
        check_no_gradient(NAME, x, weight, *norm[:4], residual, pixels)
    unsupported = slower = None
    if not is_stem(weight, stride):
        window = f"kernel {weight.shape[2]}x{weight.shape[3]} of {weight.shape[1]} input channels, stride {stride}"
        slower = {"native": f"{window}: libraries are faster on others than a stem's (3x3 of at most 4, stride 2)"}
        unsupported = {"triton": f"{window}: the Triton kernel takes a stem's (3x3 of at most 4, stride 2)"}
    if pixels is not None and weight.dtype not in native.STORED:
        reason = f"the result would be {weight.dtype}; kernels give {either(native.STORED)}"
        unsupported = {"native": reason, "triton": reason}
    return backends.choose(NAME, x, unsupported, slower).run(x, weight, *norm, residual, stride, padding, activation, pixels)
