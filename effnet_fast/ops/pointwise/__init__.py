"""pointwise_conv_bn_act: a 1x1 convolution with the gate multiplied into its input, its norm, activation and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.ops import backends, native, triton_backend
from effnet_fast.ops.common import NORM_SCHEMA, Norm, check_conv, check_no_gradient, conv_flops, differentiates, empty_output
from effnet_fast.ops.library import define
from effnet_fast.ops.pointwise import reference

NAME = "pointwise_conv_bn_act"
MATRIX_TILES = torch.cpu._is_amx_tile_supported()  # eight times the bf16 multiply-adds of vectors: oneDNN uses them, ours does not


def _check(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, gate, residual, activation):
    norm = norm_weight, norm_bias, norm_mean, norm_var, norm_eps
    check_conv(NAME, "pointwise", x, weight, norm, activation, gate=gate, residual=residual)


def _allocate(x, weight, norm_weight, norm_bias, norm_mean, norm_var, norm_eps, gate, residual, activation):
    return empty_output(x, weight, 1, (0, 0, 0, 0), x.dtype)


def _flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    return conv_flops(x_shape, weight_shape, out_shape)


_reference = define(
    NAME,
    f"Tensor x, Tensor weight, {NORM_SCHEMA}, Tensor? gate, Tensor? residual, str activation",
    ("y",),
    reference=reference.pointwise_conv_bn_act,
    check=_check,
    allocate=_allocate,
    flops=_flops,
    backends=("native", "triton"),
)
triton_backend.register(NAME, _check, _allocate)


HALVES = (torch.bfloat16, torch.float16)  # that the CUDA kernel takes
MOST_ROWS = 2**31 - 256  # pixels of a batch, likewise
FEWEST_PIXELS = 43  # of an image with a gate: a tile's gates are of four images at most
# From which on it is faster than Triton's small tiles: tiles of 128 pixels x 96 channels; with a gate pixels of the batch.
FEWEST_TILES, FEWEST_GATED = 264, 2048


def native_can_run(x: Tensor) -> str | None:
    return native.why_not(x, cuda=True) if x.dtype in HALVES or not x.is_cuda else f"x is {x.dtype}; the CUDA kernel is for halves"


def unsupported(x: Tensor, weight: Tensor, gate: Tensor | None, fewest_pixels: int = FEWEST_PIXELS) -> dict[str, str] | None:
    """Why the CUDA kernel does not take them; ``fewest_pixels``: of an image with a gate."""
    if not x.is_cuda:
        return None
    if gate is not None and x.shape[2] * x.shape[3] < fewest_pixels:
        return {"native": f"images of {x.shape[2]}x{x.shape[3]} with gates: the CUDA kernel takes {fewest_pixels} pixels or more"}
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return {"native": f"{weight.shape[1]} to {weight.shape[0]} channels: the CUDA kernel takes multiples of 8"}
    return {"native": "there are too many pixels for the CUDA kernel"} if _rows(x) > MOST_ROWS else None


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _slower(x: Tensor, weight: Tensor, gate: Tensor | None) -> dict[str, str] | None:
    """Of shapes on which another backend is faster: oneDNN on the CPU, and Triton's smaller tiles on CUDA.

    On a core oneDNN takes 0.85 to 0.99 of our time there. Asking symbolic sizes would fix them.
    """
    if x.is_cuda:
        rows = _rows(x)
        tiles = -(-rows // 128) * -(-weight.shape[0] // 96)
        few = isinstance(rows, int) and (tiles < FEWEST_TILES if gate is None else rows < FEWEST_GATED)
        return {"native": "few pixels: Triton's tiles are smaller"} if few else None
    if x.device != native.CPU:
        return None
    if x.dtype == torch.bfloat16 and MATRIX_TILES:
        return {"native": "this processor has matrix tiles for bfloat16, which oneDNN uses"}
    channels = weight.shape[1]
    if gate is not None and channels >= 960 and weight.shape[0] >= 256:
        pixels = x.shape[2] * x.shape[3]
        many = isinstance(x.shape[0], int) and isinstance(pixels, int) and x.shape[0] * pixels >= 1024
        if many and (x.dtype == torch.float32 and pixels <= 128 or x.dtype == torch.bfloat16 and channels > 1536):
            return {"native": "a gate over many rows and channels: oneDNN is faster"}
    return None


backends.register(NAME, backends.Kernel("native", torch.ops.effnet_fast.pointwise_conv_bn_act.native, native_can_run))
backends.register(NAME, backends.Kernel("triton", torch.ops.effnet_fast.pointwise_conv_bn_act.triton, triton_backend.can_run))
backends.register(NAME, backends.Kernel("reference", _reference, backends.always))


def pointwise_conv_bn_act(
    x: Tensor, weight: Tensor, norm: Norm, *, gate: Tensor | None = None, residual: Tensor | None = None, activation: str
) -> Tensor:
    """``activation(norm(conv1x1(x * gate))) + residual``: the expand, project and head convolutions.

    x         [N, C, H, W], fp32, bf16, fp16 or fp64, any strides
    weight    [K, C, 1, 1], of any of these dtypes (GPUs round it to x's)
    norm      [K] each, of any of these dtypes, all alike
    gate      [N, C] fp32 (fp64 beside fp64), from squeeze_excite_gate
    residual  [N, K, H, W] in x's dtype
    returns   [N, K, H, W] channels_last in x's dtype

    Non-finite values come out where plain PyTorch has them, but for SiLU in fp32 and fp16 on a GPU, which is -1.7e-16 of -inf, in
    place of NaN, and of every value below -40; stored as fp16 that is zero.

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    _check(x, weight, *norm, gate, residual, activation)
    if differentiates():
        check_no_gradient(NAME, x, weight, *norm[:4], gate, residual)
    kernel = backends.choose(NAME, x, unsupported(x, weight, gate), _slower(x, weight, gate))
    return kernel.run(x, weight, *norm, gate, residual, activation)
