"""conv_bn_act: a dense k x k convolution with its norm, activation and residual: the stem, and EfficientNetV2's FusedMBConv."""

from __future__ import annotations

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
_HALF = (torch.bfloat16, torch.float16)  # what the native kernel for CUDA makes


def _native_can_run(x: Tensor) -> str | None:
    if (reason := native.why_not(x, cuda=True, dtypes=_DTYPES)) is not None:
        return reason
    return _NATIVE_SINGLE if x.is_cuda and x.dtype == torch.float32 else None


def _triton_can_run(x: Tensor) -> str | None:
    return triton_backend.can_run(x, dtypes=_DTYPES)


_NATIVE_SINGLE = f"on CUDA the native kernel makes {either(_HALF)}"
triton_backend.register(NAME, _check, _allocate, _DTYPES)
backends.register(NAME, backends.Kernel("native", torch.ops.effnet_fast.conv_bn_act.native, _native_can_run))
backends.register(NAME, backends.Kernel("triton", torch.ops.effnet_fast.conv_bn_act.triton, _triton_can_run))
backends.register(NAME, backends.Kernel("reference", _reference, backends.always))


def is_stem(weight: Tensor, stride: int) -> bool:
    """Whether a convolution is one that kernels other than the reference are for: on GPUs they take no other.

    A dense k x k convolution of many channels (FusedMBConv) is bound by multiplications, and libraries do those near the peak; a
    stem is bound by memory, and a library would make three passes of it.
    """
    _, channels, *kernel = weight.shape
    return kernel == [3, 3] and stride == 2 and channels <= 4


def _window(weight: Tensor, stride: int) -> str:
    return f"kernel {weight.shape[2]}x{weight.shape[3]} of {weight.shape[1]} input channels, stride {stride}"


def _unsupported(x: Tensor, weight: Tensor, stride: int, pixels: Tensor | None) -> dict[str, str] | None:
    if pixels is not None and weight.dtype not in native.STORED:
        reason = f"the result would be {weight.dtype}; kernels give {either(native.STORED)}"
        return {"native": reason, "triton": reason}
    if not is_stem(weight, stride):
        reason = f"{_window(weight, stride)}: GPU kernels take a stem's (3x3 of at most 4, stride 2)"
        return {"native": reason, "triton": reason} if x.is_cuda else {"triton": reason}
    if x.is_cuda and pixels is not None and weight.dtype not in _HALF:
        return {"native": _NATIVE_SINGLE}
    if x.is_cuda and weight.shape[0] % 8 != 0:
        return {"native": f"{weight.shape[0]} output channels: on CUDA the native kernel makes a multiple of 8"}
    return None


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

    An x that is not finite makes NaN of the outputs that see it and, in half precision on CUDA, of the one to their left, whose
    taps there end in a zero (0 * inf).

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    _check(x, weight, *norm, residual, stride, padding, activation, pixels)
    if differentiates():
        check_no_gradient(NAME, x, weight, *norm[:4], residual, pixels)
    unsupported, slower = _unsupported(x, weight, stride, pixels), None
    if not is_stem(weight, stride):
        reason = f"{_window(weight, stride)}: libraries are faster on others than a stem's (3x3 of at most 4, stride 2)"
        slower = {"native": reason}
    return backends.choose(NAME, x, unsupported, slower).run(x, weight, *norm, residual, stride, padding, activation, pixels)
