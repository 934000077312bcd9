"""pointwise_conv_bn_act: a 1x1 convolution with the gate multiplied into its input, its norm, activation and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.ops import backends, native, triton_backend
from effnet_fast.ops.common import NORM_SCHEMA, Norm, check_conv, check_like_output, conv_flops, empty_output
from effnet_fast.ops.library import define
from effnet_fast.ops.pointwise import reference

NAME = "pointwise_conv_bn_act"
BF16_DOT_PRODUCTS = torch.cpu._is_avx512_bf16_supported()  # oneDNN uses them; without them ours takes a third of its time


def _fake(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, gate, residual, activation):
    return empty_output(x, weight, 1, (0, 0, 0, 0))


def _flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    return conv_flops(x_shape, weight_shape, out_shape)


_reference = define(
    NAME,
    f"Tensor x, Tensor weight, {NORM_SCHEMA}, Tensor? gate, Tensor? residual, str activation",
    ("y",),
    reference=reference.pointwise_conv_bn_act,
    fake=_fake,
    flops=_flops,
    backends=("native", "triton"),
)
triton_backend.register(NAME, _fake)


def _native_can_run(x: Tensor) -> str | None:
    if native.REASON is not None:
        return native.REASON
    if x.device.type != "cpu":
        return f"no native kernel for device {x.device.type!r}"
    if x.dtype == torch.bfloat16:
        return "this processor has bfloat16 dot products: oneDNN is faster" if BF16_DOT_PRODUCTS else None
    return None if x.dtype == torch.float32 else f"x is {x.dtype}; the native kernel takes float32 or bfloat16"


def _unsupported(x: Tensor, weight: Tensor, gate: Tensor | None) -> str | None:
    """Shapes on which oneDNN or, on CUDA, cuBLAS is faster; on CUDA none has been measured yet, and Triton takes all.

    On a core ours takes 0.93 to 1.16 of oneDNN's time there, 1.06 in the median. Asking a symbolic batch would fix it.
    """
    if x.device.type == "cpu" and gate is not None and weight.shape[1] >= 960 and weight.shape[0] >= 256:
        rows = x.shape[0] * x.shape[2] * x.shape[3]
        if isinstance(rows, int) and rows >= 1024:
            return "a gate over many rows and channels: oneDNN is faster"
    return None


backends.register(NAME, backends.Kernel("native", torch.ops.effnet_fast.pointwise_conv_bn_act.native, _native_can_run))
backends.register(NAME, backends.Kernel("triton", torch.ops.effnet_fast.pointwise_conv_bn_act.triton, triton_backend.can_run))
backends.register(NAME, backends.Kernel("reference", _reference, backends.always))


def pointwise_conv_bn_act(
    x: Tensor, weight: Tensor, norm: Norm, *, gate: Tensor | None = None, residual: Tensor | None = None, activation: str
) -> Tensor:
    """``activation(norm(conv1x1(x * gate))) + residual``: the expand, project and head convolutions.

    x         [N, C, H, W], fp32, bf16, fp16 or fp64, any strides
    weight    [K, C, 1, 1]
    gate      [N, C] fp32, from squeeze_excite_gate
    residual  [N, K, H, W] in x's dtype
    returns   [N, K, H, W] channels_last in x's dtype

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    check_conv(NAME, x, weight, norm, activation, weight.shape[1])
    if weight.shape[2] != 1 or weight.shape[3] != 1:
        raise ValueError(f"{NAME}: weight is {tuple(weight.shape)}; [K, C, 1, 1] would do")
    check_like_output(NAME, "gate", gate, (x.shape[0], x.shape[1]), x)
    check_like_output(NAME, "residual", residual, (x.shape[0], weight.shape[0], x.shape[2], x.shape[3]), x)
    return backends.choose(NAME, x, _unsupported(x, weight, gate)).run(x, weight, *norm, gate, residual, activation)
