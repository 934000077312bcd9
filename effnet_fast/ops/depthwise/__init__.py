"""depthwise_conv_bn_act: a depthwise convolution, its norm and activation, and the squeeze's partial sums, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_fast.ops import backends, native
from effnet_fast.ops.common import NORM_SCHEMA, Norm, accumulator, check_conv, check_window, conv_flops, empty_output, output_size
from effnet_fast.ops.depthwise import launch, reference
from effnet_fast.ops.library import define

NAME = "depthwise_conv_bn_act"
HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def _fake(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, stride, padding, activation, pieces):
    y = empty_output(x, weight, stride, padding)
    return y, y.new_empty((x.shape[0], pieces, weight.shape[0]), dtype=accumulator(x.dtype))


def _flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    return conv_flops(x_shape, weight_shape, out_shape[0])


define(
    NAME,
    f"Tensor x, Tensor weight, {NORM_SCHEMA}, int stride, SymInt[] padding, str activation, SymInt pieces",
    ("y", "partial"),
    reference=reference.depthwise_conv_bn_act,
    fake=_fake,
    flops=_flops,
    backends=("native",),
)


def _native_can_run(x: Tensor) -> str | None:
    if native.REASON is not None:
        return native.REASON
    if x.device.type == "cuda" and not native.CUDA_KERNELS:
        return "the compiled module was built without CUDA kernels"
    if x.device.type != "cuda":
        return f"no native kernel for device {x.device.type!r}"
    return None if x.dtype in HALVES_AND_FLOAT else f"x is {x.dtype}; the native kernel takes float32, bfloat16 and float16"


def _unsupported(weight: Tensor, stride: int) -> str | None:
    """Why no kernel but the reference takes this convolution, or None."""
    kernel = tuple(weight.shape[2:])
    if kernel not in ((3, 3), (5, 5)):
        return f"kernel {kernel[0]}x{kernel[1]}: the native kernels take 3x3 and 5x5"
    if stride not in (1, 2):
        return f"stride {stride}: the native kernels take 1 and 2"
    if weight.dtype not in HALVES_AND_FLOAT:
        return f"weight is {weight.dtype}: the native kernels take float32, bfloat16 and float16"
    return None


backends.register(
    NAME, backends.Kernel("native", torch.ops.effnet_fast.depthwise_conv_bn_act.native, _native_can_run, launch.pieces)
)
backends.register(
    NAME,
    backends.Kernel(
        "reference", torch.ops.effnet_fast.depthwise_conv_bn_act.reference, backends.always, lambda x, height, width: 1
    ),
)


def depthwise_conv_bn_act(
    x: Tensor, weight: Tensor, norm: Norm, *, stride: int, padding: Sequence[int], activation: str, squeeze: bool
) -> tuple[Tensor, Tensor]:
    """``y = activation(norm(depthwise_conv(x)))`` and, with ``squeeze``, the sums that squeeze-excite needs.

    x        [N, C, H, W], fp32, bf16, fp16 or fp64, any strides
    weight   [C, 1, k, k], of any of these dtypes (used in x's)
    padding  (top, bottom, left, right), zeros, need not be symmetric
    returns  y [N, C, H', W'] channels_last in x's dtype; partial [N, P, C] fp32: sums of the stored y over P disjoint pieces of
             the image that cover it (P = 0 without ``squeeze``); the kernel that runs chooses P

    No gradient: see effnet_fast.nn for when modules use it. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    check_conv(NAME, x, weight, norm, activation, weight.shape[0])
    if weight.shape[1] != 1:
        raise ValueError(f"{NAME}: weight is {tuple(weight.shape)}; [C, 1, k, k] would do")
    check_window(NAME, x, weight.shape[2:], stride, padding)
    kernel, pieces = backends.choose(NAME, x, _unsupported(weight, stride)), 0
    if squeeze:
        top, bottom, left, right = padding
        height = output_size(x.shape[2], weight.shape[2], stride, top, bottom)
        width = output_size(x.shape[3], weight.shape[3], stride, left, right)
        pieces = kernel.pieces(x, height, width)  # type: ignore[misc]
    return kernel.overload(x, weight, *norm, stride, padding, activation, pieces)
