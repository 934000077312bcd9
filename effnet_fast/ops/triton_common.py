"""What the Triton kernels share: the norm folded, the activations, rounding, and the launch.

Only the ``triton`` modules of the ops import this one, at their first call: it needs triton.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def stored(value, dtype: tl.constexpr):
    """fp32 ``value`` rounded to the nearest of ``dtype``, ties to even. The interpreter alone would truncate to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest, bits).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def converted(value, dtype: tl.constexpr):
    """A loaded ``value`` in ``dtype``: a weight of another precision beside x."""
    if value.dtype == dtype:
        return value
    else:
        return stored(value.to(tl.float32), dtype)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``a @ b + total`` in fp32. The interpreter's products of halves are not those of tensor cores, which are exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps, channels, mask):
    """(variance, with eps; weight; mean; bias) of the batch norm at ``channels``, fp32: nothing waits for them yet."""
    variance = tl.load(norm_var + channels, mask=mask, other=1.0).to(tl.float32) + norm_eps
    mean = tl.load(norm_mean + channels, mask=mask, other=0.0).to(tl.float32)
    weight, bias = tl.full(mean.shape, 1.0, tl.float32), tl.zeros(mean.shape, tl.float32)
    if norm_weight is not None:
        weight = tl.load(norm_weight + channels, mask=mask, other=1.0).to(tl.float32)
    if norm_bias is not None:
        bias = tl.load(norm_bias + channels, mask=mask, other=0.0).to(tl.float32)
    return variance, weight, mean, bias


@triton.jit
def fold_norm(variance, weight, mean, bias):
    """(scale, shift) of what load_norm loaded. A Newton step mends the 2 ulp of rsqrt. Every thread does this for all of its
    channels: a correctly rounded root and quotient would cost more than the product itself."""
    scale = tl.rsqrt(variance)
    scale *= 1.5 - 0.5 * variance * scale * scale
    scale *= weight
    return scale, bias - mean * scale


@triton.jit
def folded_norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps, channels, mask):
    """(scale, shift) of the batch norm at ``channels``, fp32."""
    variance, weight, mean, bias = load_norm(norm_weight, norm_bias, norm_mean, norm_var, norm_eps, channels, mask)
    return fold_norm(variance, weight, mean, bias)


# SiLU of two values at once: the reciprocal of (1 + e^-a)(1 + e^-b) serves both, so that they take three uses of the special
# function unit in place of four. That product must not overflow: exponents end at 2^57.7, where values end at -40, whose SiLU is
# -2e-16. NaN comes through in the numerator alone, so that it stays its own.
_SILU_OF_TWO: tl.constexpr = tl.constexpr("""{
    .reg .f32 a, b, p, c, d;
    mul.ftz.f32 a, $2, 0fBFB8AA3B;  // -log2(e)
    mul.ftz.f32 b, $3, 0fBFB8AA3B;
    min.ftz.f32 a, a, 0f4266D4CA;   // 40 log2(e)
    min.ftz.f32 b, b, 0f4266D4CA;
    ex2.approx.ftz.f32 a, a;
    ex2.approx.ftz.f32 b, b;
    add.ftz.f32 a, a, 0f3F800000;
    add.ftz.f32 b, b, 0f3F800000;
    mul.ftz.f32 p, a, b;
    rcp.approx.ftz.f32 p, p;
    mul.ftz.f32 b, p, b;
    mul.ftz.f32 a, p, a;
    max.NaN.ftz.f32 c, $2, 0fC2200000;  // -40
    max.NaN.ftz.f32 d, $3, 0fC2200000;
    mul.ftz.f32 $0, c, b;
    mul.ftz.f32 $1, d, a;
}""")


@triton.jit
def activate(value, ACTIVATION: tl.constexpr, PAIRS: tl.constexpr = False):
    """Of fp32 ``value``. Comparisons rather than min and max: a NaN goes through. ``PAIRS``: every thread has an even number."""
    if ACTIVATION == "silu":
        if PAIRS and not INTERPRETED:
            value = tl.inline_asm_elementwise(_SILU_OF_TWO, "=f,=f,f,f", [value], dtype=tl.float32, is_pure=True, pack=2)
        else:
            value = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == "relu":
        value = tl.where(value < 0.0, 0.0, value)
    elif ACTIVATION == "relu6":
        value = tl.where(value < 0.0, 0.0, value)
        value = tl.where(value > 6.0, 6.0, value)
    return value


def cdiv(size: int, share: int) -> int:
    """Shares of ``size``. Triton's own, for kernels too, takes 3 us a call, and so does its next_power_of_2."""
    return -(-size // share)


def next_power_of_2(size: int) -> int:
    """The smallest that is not less than ``size``, itself 1 or more."""
    return 1 << (size - 1).bit_length()


def alignment(channels: int) -> int:
    """Elements that every row of ``channels`` is a multiple of, at most 16.

    A kernel gets the row length as ``channels // alignment``, times this constant: Triton itself sees only multiples of 16, and
    would load EfficientNet's 24, 40, 56 and 136 channels element by element.
    """
    return math.gcd(channels, 16)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU. The interpreter has one, so that it takes few large tiles."""
    return _processors(device.index) if device.type == "cuda" else 1


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def matmul_precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: as torch says that convolutions may be, now. Halves need no choice."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def channels_last(x: Tensor) -> Tensor:
    """``x``, or a copy of it whose memory is [N, H, W, C]."""
    return x.contiguous(memory_format=torch.channels_last)


def vectors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors of a norm, each as one run of memory."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


# What was compiled, and the values of the kernel's constants in the order of its parameters. As Triton's own tables, never emptied.
_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def specialization(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """All that Triton compiles a kernel anew for, and a little more: it looks at no integer that ``do_not_specialize`` names.

    Of a tensor its dtype and whether it starts at 16 bytes, of an integer its width and whether it is 1 or a multiple of 16.
    """
    key = [kernel.fn, args[0].device.index, *constants.items()]
    for arg in args:
        if isinstance(arg, Tensor):
            key.append(arg.dtype)
            key.append(arg.data_ptr() % 16 == 0)
        elif isinstance(arg, int):
            key.append((arg % 16 == 0) + 2 * (arg == 1) + 4 * (not -(2**31) <= arg < 2**31))
        else:
            key.append(type(arg))
    return tuple(key)


def run(
    kernel: Any, programs: int, *args: Any, num_warps: int, num_stages: int = 1, maxnreg: int | None = None, **constants: Any
) -> None:
    """Launch on the device and the stream of the first argument, a tensor. Fusion into FMAs is asked for: Triton 3.10 has another
    default.

    From the second launch on what was compiled is launched itself: Triton takes several times as long to find it, longer than small
    kernels run. Settings of Triton that change what it compiles (``triton.knobs``) are those of the first launch.
    """
    constants.update(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg, enable_fp_fusion=True)
    key = specialization(kernel, args, constants)
    with torch.cuda.device_of(args[0]):
        if key in _COMPILED:
            compiled, values = _COMPILED[key]
            compiled[programs, 1, 1](*args, *values)
            return
        compiled = kernel[(programs,)](*args, **constants)
    if isinstance(compiled, CompiledKernel):  # the interpreter gives none
        _COMPILED[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
