"""The backward of the squeeze-excite between two convolutions of a block in training, all of which is of size N x C. Its forward is
inference's :func:`effnet_fast.ops.squeeze_excite_gate`."""

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
from effnet_fast.ops.training import reference

NAME = "squeeze_excite_backward"
MOST_HIDDEN = 256  # units, of the Triton kernel
_SUMS = (torch.float32, torch.float64)


def _check(sums, gate, pooled, reduce_weight, reduce_bias, expand_weight, activation, pixels):
    check_strided(NAME, "sums", sums)
    if sums.dim() != 3 or sums.shape[1] != 5 or sums.shape[0] < 1 or sums.shape[2] < 1:
        raise ValueError(f"{NAME}: sums is {tuple(sums.shape)}; [N, 5, C] with N and C >= 1 would do")
    if sums.dtype not in _SUMS:
        raise TypeError(f"{NAME}: sums is {sums.dtype}; {either(_SUMS)} would do")
    images, _, channels = sums.shape
    for name, tensor in (("gate", gate), ("pooled", pooled)):
        check_tensor(NAME, name, tensor, (images, channels), (sums.dtype,), sums.device)
    check_strided(NAME, "reduce_weight", reduce_weight)
    if reduce_weight.dim() != 4 or reduce_weight.shape[0] < 1:
        raise ValueError(f"{NAME}: reduce_weight is {tuple(reduce_weight.shape)}; [R, {channels}, 1, 1] with R >= 1 would do")
    hidden = reduce_weight.shape[0]
    check_tensor(NAME, "reduce_weight", reduce_weight, (hidden, channels, 1, 1), DTYPES, sums.device)
    check_tensor(NAME, "expand_weight", expand_weight, (channels, hidden, 1, 1), DTYPES, sums.device)
    if reduce_bias is not None:
        check_tensor(NAME, "reduce_bias", reduce_bias, (hidden,), DTYPES, sums.device)
    check_activation(NAME, activation)
    check_integer(NAME, "pixels", pixels, 1)


def _allocate(sums, gate, pooled, reduce_weight, reduce_bias, expand_weight, activation, pixels):
    channels, hidden = sums.shape[2], reduce_weight.shape[0]
    shapes = gate.shape, (2, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,)
    return tuple(sums.new_empty(shape) for shape in shapes)


def _flops(sums_shape, gate_shape, pooled_shape, reduce_shape, *args, out_shape, **kwargs) -> int:
    return 10 * sums_shape[0] * reduce_shape[0] * reduce_shape[1]


_run = define(
    NAME,
    "Tensor sums, Tensor gate, Tensor pooled, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, str activation,"
    " SymInt pixels",
    ("pool", "norm_sums", "grad_reduce_weight", "grad_reduce_bias", "grad_expand_weight", "grad_expand_bias"),
    reference=reference.squeeze_excite_backward,
    check=_check,
    allocate=_allocate,
    flops=_flops,
    backends=("triton",),
)
triton_backend.register(NAME, _check, _allocate, (torch.float32,), ("effnet_fast.ops.training.triton_squeeze_excite", NAME))


def _reference(*args):
    """A compiler would trace the function under the forward's autocast, and make halves of its products; it leaves the op alone."""
    return torch.ops.effnet_fast.squeeze_excite_backward.reference(*args) if torch.compiler.is_compiling() else _run(*args)


backends.register(NAME, backends.Kernel("native", _reference, native.why_not))
backends.register(NAME, backends.Kernel("triton", torch.ops.effnet_fast.squeeze_excite_backward.triton, triton_backend.can_run))
backends.register(NAME, backends.Kernel("reference", _reference, backends.always))


def squeeze_excite_backward(
    sums: Tensor,
    gate: Tensor,
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    *,
    activation: str,
    pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What lies between the backwards of a block's last convolution and of the one before it.

    sums             [N, 5, C], what :func:`effnet_fast.ops.training.conv_backward` gives of a convolution with a gate, fp32 or fp64
    gate, pooled     [N, C] each, like sums: ``gate = sigmoid(expand(activation(reduce(pooled))))``
    reduce_weight    [R, C, 1, 1], reduce_bias [R] or None, expand_weight [C, R, 1, 1]; of any of the dtypes of images
    pixels           of an image: ``pooled`` are means of so many
    returns          pool [N, C], the gradient of a pixel through the mean, which that backward takes as ``y_pool`` beside the gate;
                     norm_sums [2, C], the sums that it takes the coefficients from; and the gradients of both weights and biases,
                     [R, C], [R], [C, R] and [C], all in the dtype of sums

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    args = (sums, gate, pooled, reduce_weight, reduce_bias, expand_weight, activation, pixels)
    if not torch.compiler.is_compiling():  # a compiler comes to the same check in the op's fake
        _check(*args)
        if differentiates():
            check_no_gradient(NAME, *args[:6])
    hidden = reduce_weight.shape[0]
    many = {"triton": f"R is {hidden}: the Triton kernel takes R up to {MOST_HIDDEN}"} if hidden > MOST_HIDDEN else None
    return backends.choose(NAME, sums, many).run(*args)
