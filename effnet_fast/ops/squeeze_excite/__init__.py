"""squeeze_excite_gate: from the depthwise kernel's partial sums to the gate (arXiv 1709.01507, equations 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.ops import backends, native, triton_backend
from effnet_fast.ops.common import (
    DTYPES,
    check_activation,
    check_integer,
    check_no_gradient,
    check_strided,
    check_tensor,
    differentiates,
    either,
)
from effnet_fast.ops.library import define
from effnet_fast.ops.squeeze_excite import reference

NAME = "squeeze_excite_gate"
SUMS = (torch.float32, torch.float64)  # what partial sums are kept in


def _check(partial, count, reduce_weight, reduce_bias, expand_weight, expand_bias, activation):
    """Refuse, by name, what :func:`squeeze_excite_gate` does not say it takes, whatever the backend."""
    if not isinstance(partial, Tensor) or not isinstance(reduce_weight, Tensor) or partial.layout is not torch.strided:
        check_strided(NAME, "partial", partial)
        check_strided(NAME, "reduce_weight", reduce_weight)
    shape, device = partial.shape, partial.device
    if len(shape) != 3 or shape[1] < 1 or shape[2] < 1:
        raise ValueError(f"{NAME}: partial is {tuple(shape)}; [N, P, C] with P and C >= 1 would do")
    channels = shape[2]
    if partial.dtype not in SUMS:
        raise TypeError(f"{NAME}: partial is {partial.dtype}; {either(SUMS)} would do")
    check_integer(NAME, "count", count, 1)
    shape = reduce_weight.shape
    if len(shape) != 4 or shape[0] < 1:
        raise ValueError(f"{NAME}: reduce_weight is {tuple(shape)}; [R, {channels}, 1, 1] with R >= 1 would do")
    reduced, alike = shape[0], (reduce_weight.dtype,)
    check_tensor(NAME, "reduce_weight", reduce_weight, (reduced, channels, 1, 1), DTYPES, device)
    if reduce_bias is not None:
        check_tensor(NAME, "reduce_bias", reduce_bias, (reduced,), alike, device)
    check_tensor(NAME, "expand_weight", expand_weight, (channels, reduced, 1, 1), alike, device)
    if expand_bias is not None:
        check_tensor(NAME, "expand_bias", expand_bias, (channels,), alike, device)
    check_activation(NAME, activation)


def _allocate(partial, count, reduce_weight, reduce_bias, expand_weight, expand_bias, activation):
    return partial.new_empty((partial.shape[0], partial.shape[2]))


def _flops(partial_shape, count, reduce_shape, reduce_bias, expand_shape, *args, out_shape, **kwargs) -> int:
    return 2 * partial_shape[0] * (reduce_shape[0] * reduce_shape[1] + expand_shape[0] * expand_shape[1])


_reference = define(
    NAME,
    "Tensor partial, SymInt count, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias,"
    " str activation",
    ("gate",),
    reference=reference.squeeze_excite_gate,
    check=_check,
    allocate=_allocate,
    flops=_flops,
    backends=("native", "triton"),
)
triton_backend.register(NAME, _check, _allocate)


def _native_can_run(partial: Tensor) -> str | None:
    return native.why_not(partial, cuda=True, dtypes=(torch.float32,))


def _unsupported(partial: Tensor, reduce_weight: Tensor) -> dict[str, str] | None:
    """A CUDA block's shared memory holds C + 2 R floats (csrc/squeeze_excite/gate.cuh); Triton's tile is R wide."""
    if not partial.is_cuda:
        return None
    reduced, channels = reduce_weight.shape[:2]
    if reduced <= 1024 and channels + 2 * reduced <= 23000:
        return None
    refused = {}
    if channels + 2 * reduced > 23000:
        refused["native"] = f"R is {reduced} and C {channels}: the CUDA kernel takes C + 2 R up to 23000"
    if reduced > 1024:
        refused["triton"] = f"R is {reduced}: the Triton kernel takes R up to 1024"
    return refused


def _triton_can_run(partial: Tensor) -> str | None:
    reason = triton_backend.can_run(partial)
    if reason is None and partial.dtype != torch.float32:
        return f"partial sums are {partial.dtype}; the Triton kernel takes float32"
    return reason


backends.register(NAME, backends.Kernel("native", torch.ops.effnet_fast.squeeze_excite_gate.native, _native_can_run))
backends.register(NAME, backends.Kernel("triton", torch.ops.effnet_fast.squeeze_excite_gate.triton, _triton_can_run))
backends.register(NAME, backends.Kernel("reference", _reference, backends.always))


def squeeze_excite_gate(
    partial: Tensor,
    count: int,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str,
) -> Tensor:
    """``sigmoid(expand(activation(reduce(sum(partial) / count))))``.

    partial        [N, P, C] fp32 (fp64 where x was): sums over P pieces of the image, added in a fixed order
    count          H * W, the pixels that were summed
    reduce_weight  [R, C, 1, 1], reduce_bias [R]; expand_weight [C, R, 1, 1], expand_bias [C]; all fp32, bf16, fp16 or fp64
    returns        gate [N, C] in partial's dtype

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    _check(partial, count, reduce_weight, reduce_bias, expand_weight, expand_bias, activation)
    if differentiates():
        check_no_gradient(NAME, partial, reduce_weight, reduce_bias, expand_weight, expand_bias)
    kernel = backends.choose(NAME, partial, _unsupported(partial, reduce_weight))
    return kernel.run(partial, count, reduce_weight, reduce_bias, expand_weight, expand_bias, activation)
