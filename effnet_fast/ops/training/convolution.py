"""A convolution that gives its result's statistics, and its backward: see the package."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_fast.ops import backends, gpu, native, pointwise, triton_backend
from effnet_fast.ops.common import (
    accumulator,
    check_activation,
    check_no_gradient,
    check_tensor,
    conv_flops,
    differentiates,
    empty_output,
)
from effnet_fast.ops.depthwise import KERNELS, STRIDES
from effnet_fast.ops.library import define, fitting, implement
from effnet_fast.ops.training import composed, normalization, reference
from effnet_fast.ops.training.checks import check_conv, check_images, check_norm, check_read, check_weight

KINDS = ("depthwise", "pointwise", "dense")
# Of the pointwise CUDA kernel: pixels of an image with a gate, as a tile's gates are of four images at most; and channels of x with
# a norm, which shared memory holds.
FEWEST_PIXELS, MOST_CHANNELS = 21, 5632
# Of its backward: output channels of an x with a norm, and without one, of which registers hold the gradient of the weight; and
# columns of x's channels that a block has, at most.
MOST_OUT_NORMED, MOST_OUT, COLUMNS = 128, 288, 64
_CHECK: dict[str, Callable[..., None]] = {}


def _name(kind: str, what: str) -> str:
    return f"{'' if kind == 'dense' else kind + '_'}conv_{what}"


def _define(kind: str) -> None:
    stats, backward = _name(kind, "stats"), _name(kind, "backward")

    def check_stats(x, weight, norm, activation, gate, stride, padding):
        check_read(stats, "x", x, norm, activation, gate)
        check_conv(stats, kind, x, weight, stride, padding)

    def allocate_stats(x, weight, norm, activation, gate, stride, padding):
        y = empty_output(x, weight, stride, padding, x.dtype)
        vector = y.new_empty(weight.shape[0], dtype=accumulator(x.dtype))
        return y, vector, torch.empty_like(vector)

    def flops_stats(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
        return conv_flops(x_shape, weight_shape, out_shape[0])

    def check_backward(
        grad, y, y_norm, y_coefficients, y_activation, y_gate, y_pool,
        x, weight, norm, activation, gate, residual, stride, padding, need_x, need_weight,
    ):  # fmt: skip
        check_read(backward, "x", x, norm, activation, gate)
        shape, total, device = check_conv(backward, kind, x, weight, stride, padding), (accumulator(x.dtype),), x.device
        check_tensor(backward, "y", y, shape, (x.dtype,), device)
        check_tensor(backward, "grad", grad, shape, (x.dtype,), device)
        check_norm(backward, "y_norm", y_norm, y)
        check_norm(backward, "y_coefficients", y_coefficients, y)
        check_activation(backward, y_activation)
        for name, tensor in (("y_gate", y_gate), ("y_pool", y_pool)):
            if tensor is not None:
                check_tensor(backward, name, tensor, shape[:2], total, device)
        if residual is not None:
            check_tensor(backward, "residual", residual, tuple(x.shape), (x.dtype,), device)

    def allocate_backward(
        grad, y, y_norm, y_coefficients, y_activation, y_gate, y_pool,
        x, weight, norm, activation, gate, residual, stride, padding, need_x, need_weight,
    ):  # fmt: skip
        images, channels, _, _ = x.shape
        sums = 0 if norm is None or not need_x else (2, channels) if gate is None else (images, 5, channels)
        return (
            torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0),
            weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
            x.new_empty(sums, dtype=accumulator(x.dtype)),
        )

    def flops_backward(grad, y, a, b, c, d, e, x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
        need_x, need_weight = args[-2:]
        return (need_x + need_weight) * conv_flops(x_shape, weight_shape, y)

    forward_arguments = "Tensor x, Tensor weight, Tensor? norm, str activation, Tensor? gate, int stride, SymInt[] padding"
    backward_arguments = (
        "Tensor grad, Tensor y, Tensor y_norm, Tensor y_coefficients, str y_activation, Tensor? y_gate, Tensor? y_pool,"
        " Tensor x, Tensor weight, Tensor? norm, str activation, Tensor? gate, Tensor? residual, int stride, SymInt[] padding,"
        " bool need_x, bool need_weight"
    )
    names = {stats: ("y", "mean", "var"), backward: ("grad_x", "grad_weight", "sums")}
    references = {
        stats: define(
            stats,
            forward_arguments,
            names[stats],
            reference=reference.conv_stats,
            check=check_stats,
            allocate=allocate_stats,
            flops=flops_stats,
            backends=("native", "triton"),
        ),
        backward: define(
            backward,
            backward_arguments,
            names[backward],
            reference=reference.conv_backward,
            check=check_backward,
            allocate=allocate_backward,
            flops=flops_backward,
            backends=("native", "triton"),
        ),
    }
    _CHECK[stats], _CHECK[backward] = check_stats, check_backward
    on_cuda = functools.partial(native.why_not, cuda=True)
    natively: dict[str, Callable[[Tensor], str | None]] = {"depthwise_conv_stats": on_cuda, "depthwise_conv_backward": on_cuda}
    natively["pointwise_conv_stats"] = natively["pointwise_conv_backward"] = pointwise.native_can_run
    for name, run in references.items():
        can_run = natively.get(name, native.why_not)
        backends.register(name, backends.Kernel("native", getattr(torch.ops.effnet_fast, name).native, can_run))
        backends.register(name, backends.Kernel("triton", getattr(torch.ops.effnet_fast, name).triton, triton_backend.can_run))
        backends.register(name, backends.Kernel("reference", run, backends.always))


for _kind in KINDS:
    _define(_kind)


def _compose(kind: str, backend: str, key: str) -> None:
    """Give such a convolution's ops a kernel for a dispatch key: PyTorch's own convolution between that backend's passes."""
    runs = composed.implementations(normalization.passes(backend), getattr(torch.ops.effnet_fast.batch_stats, backend))
    for what, run in zip(("stats", "backward"), runs, strict=True):
        name = _name(kind, what)

        def out_form(*args: Any, _run: Callable[..., Any] = run, _name: str = name, **out: Tensor) -> None:
            for made, given in fitting(_name, tuple(out), _run(*args), out):
                given.copy_(made)

        implement(f"{name}.{backend}", run, key)
        implement(f"{name}.{backend}_out", out_form, key)


_compose("dense", "native", "CPU")
for _kind in KINDS:
    _compose(_kind, "triton", triton_backend.KEY)


def kind_of(weight: Tensor, channels: int, stride: int) -> str:
    """Which of the ops convolves so many channels with ``weight``."""
    if tuple(weight.shape[2:]) == (1, 1) and stride == 1:
        return "pointwise"
    return "depthwise" if weight.shape[1] == 1 and channels == weight.shape[0] else "dense"


def _unsupported_window(kind: str, weight: Tensor, stride: int) -> dict[str, str] | None:
    rows, columns = weight.shape[2:]
    if kind == "depthwise" and not ((rows, columns) in KERNELS and stride in STRIDES):
        return {"native": f"kernel {rows}x{columns}, stride {stride}: it takes 3x3 and 5x5, stride 1 and 2"}
    return None


def _unsupported_stats(kind: str, x: Tensor, weight: Tensor, gate: Tensor | None, stride: int) -> dict[str, str] | None:
    if kind != "pointwise":
        return _unsupported_window(kind, weight, stride)
    if x.is_cuda and weight.shape[1] > MOST_CHANNELS:
        return {"native": f"{weight.shape[1]} input channels: the CUDA kernel takes {MOST_CHANNELS} at most"}
    return pointwise.unsupported(x, weight, gate, FEWEST_PIXELS)


def _unsupported_backward(
    kind: str, x: Tensor, weight: Tensor, norm: Tensor | None, stride: int, y_activation: str, y_pool: Tensor | None
) -> dict[str, str] | None:
    """Of a pointwise one on CUDA the rest is products of PyTorch's: those dominate where there are so many channels."""
    if kind != "pointwise":
        return _unsupported_window(kind, weight, stride)
    if (refused := pointwise.unsupported(x, weight, None)) is not None or not x.is_cuda:
        return refused
    if y_activation != "identity" or y_pool is not None:
        return {"native": "an activation or a pool behind y: the CUDA kernel's backward takes neither"}
    out, most = weight.shape[0], MOST_OUT if norm is None else MOST_OUT_NORMED
    if out > most:
        behind = "without" if norm is None else "with"
        return {"native": f"{out} output channels: the CUDA kernel's backward takes {most} at most of an x {behind} a norm"}
    needed, there = _shared_bytes(weight.shape[1], out, norm is not None), gpu.shared_memory(x.device.index)
    if needed > there:
        return {"native": f"{out} output channels: a block would take {needed} of {there} bytes of shared memory"}
    return None


def _shared_bytes(channels: int, out: int, normed: bool) -> int:
    """Of a block with two stages of 64 rows, as csrc/training/pointwise_backward.cuh has them. With a norm there may be a gate."""
    columns = -(-channels // (8 * -(-channels // COLUMNS))) * 8
    g_row, x_row, sums = (out // 8 | 1) * 16, (columns // 8 | 1) * 16, 5 if normed else 0
    turned = max(64 * x_row, 8 * sums * 4 * COLUMNS)  # z, and the sums of warps: where y was, if that is as large
    stage = 2 * 64 * g_row + 64 * x_row + (4 * COLUMNS if normed else 0)
    return 2 * stage + out * x_row + (0 if 64 * g_row >= turned else turned) + 12 * out + (12 * COLUMNS if normed else 0)


def why_no_kernel(x: Tensor, channels: int, weight: Tensor, stride: int) -> str | None:
    """Why nothing but the reference convolves ``channels`` channels, of x's dtype and device, with ``weight``; or None."""
    kind = kind_of(weight, channels, stride)
    unsupported = _unsupported_stats(kind, x, weight, None, stride) or {}
    *kernels, _ = backends.kernels(_name(kind, "stats"))
    reasons = [kernel.can_run(x) or unsupported.get(kernel.backend) for kernel in kernels]
    return None if None in reasons else "; ".join(reasons)  # type: ignore[arg-type]


def _run(what: str, x: Tensor, weight: Tensor, stride: int, unsupported: Callable[[str], dict[str, str] | None], *args: Any) -> Any:
    """``unsupported``: of a kind."""
    eager = not torch.compiler.is_compiling()  # a compiler, which may not tell a layout, comes to the same checks in the op's fake
    if eager:
        check_images(f"conv_{what}", "x", x)
        check_weight(f"conv_{what}", weight)
    kind = kind_of(weight, x.shape[1], stride)
    name = _name(kind, what)
    if eager:
        _CHECK[name](*args)
        if differentiates():
            check_no_gradient(name, *(arg for arg in args if isinstance(arg, Tensor)))
    return backends.choose(name, x, unsupported(kind)).run(*args)


def conv_stats(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    *,
    activation: str,
    gate: Tensor | None = None,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = conv(activation(norm(x)) * gate)`` and y's mean and variance per channel.

    x           [N, C, H, W], fp32, bf16, fp16 or fp64, any strides; nothing empty
    weight      [K, C, k, k] dense or, with k = 1 and stride 1, pointwise; [C, 1, k, k] depthwise; of any of these dtypes
    norm, gate  of x, as above; None: x is read as it is
    padding     (top, bottom, left, right), zeros after the activation
    returns     y [N, K, H', W'] channels_last in x's dtype; mean [K] and var [K] (not corrected) of the stored y

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """

    def unsupported(kind: str) -> dict[str, str] | None:
        return _unsupported_stats(kind, x, weight, gate, stride)

    return _run("stats", x, weight, stride, unsupported, x, weight, norm, activation, gate, stride, padding)


def conv_backward(
    grad: Tensor,
    y: Tensor,
    y_norm: Tensor,
    y_coefficients: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    *,
    activation: str,
    gate: Tensor | None = None,
    y_activation: str = "identity",
    y_gate: Tensor | None = None,
    y_pool: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    need_x: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`conv_stats`'s x and weight, in one pass.

    grad                   [N, K, H', W'] in x's dtype, like y
    y, y_norm              what the forward made, and the norm [3, K] that follows it
    y_coefficients         [3, K]: the gradient of y is ``[0] * G + [1] * (y - mean) + [2]``, where
                           ``G = (grad * y_gate + y_pool) * y_activation'(norm(y))``
    y_gate, y_pool         [N, K] each, or None: ones and zeros
    x .. gate              as the forward read them
    residual               [N, C, H, W] in x's dtype: added to grad_x
    need_x, need_weight    which gradients are wanted; others come back empty, [0]
    returns                grad_x channels_last in x's dtype; grad_weight in weight's; and sums

    Without a norm grad_x is the gradient of x, and sums are empty. With a norm and no gate it is that of ``u``, called G above, and
    sums [2, C] are those of G and of ``G * (x - mean)``. With a gate it is that of what was convolved, called Z, since the gate's
    own gradient must be known first; sums [N, 5, C] over each image are those of ``Z * activation(u)``, of ``Z * s`` and ``s``
    with ``s = activation'(u)``, and of these two times ``x - mean``.

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """

    def unsupported(kind: str) -> dict[str, str] | None:
        return _unsupported_backward(kind, x, weight, norm, stride, y_activation, y_pool)

    return _run(
        "backward", x, weight, stride, unsupported, grad, y, y_norm, y_coefficients, y_activation, y_gate, y_pool,
        x, weight, norm, activation, gate, residual, stride, padding, need_x, need_weight,
    )  # fmt: skip
