"""What reads a raw result without a convolution: the norm and activation of a block's last one, the squeeze, their backwards, and
the statistics of a batch; and of a norm what is of size K, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_fast.ops import backends, native, triton_backend
from effnet_fast.ops.common import DTYPES, accumulator, check_integer, check_no_gradient, check_tensor, differentiates
from effnet_fast.ops.library import define
from effnet_fast.ops.training import composed, reference
from effnet_fast.ops.training.checks import check_images, check_norm, check_read, check_vectors

_CHECK: dict[str, Callable[..., None]] = {}


def _elements(x_shape, *args, out_shape, **kwargs) -> int:
    return math.prod(x_shape)


def _define(
    name: str,
    arguments: str,
    results: tuple[str, ...],
    check: Callable[..., None],
    allocate: Callable[..., Any],
    module: str = "triton",
    of_images: bool = True,
) -> None:
    """An op of that name, with native and Triton kernels; the functions of that name in the modules of references and of Triton.

    Not ``of_images`` but of size K, it is the reference that the CPU runs where native kernels are asked for.
    """
    run = define(
        name,
        arguments,
        results,
        reference=getattr(reference, name),
        check=check,
        allocate=allocate,
        flops=_elements,
        backends=("native", "triton") if of_images else ("triton",),
    )
    _CHECK[name] = check
    triton_backend.register(name, check, allocate, launcher=(f"effnet_fast.ops.training.{module}", name))
    overloads = getattr(torch.ops.effnet_fast, name)
    backends.register(name, backends.Kernel("native", overloads.native if of_images else run, native.why_not))
    backends.register(name, backends.Kernel("triton", overloads.triton, triton_backend.can_run))
    backends.register(name, backends.Kernel("reference", run, backends.always))


def _like(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _vector(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=accumulator(x.dtype))


def _check_norm_act(y, norm, activation, gate, residual):
    check_read("norm_act", "y", y, norm, activation, gate)
    if residual is not None:
        check_tensor("norm_act", "residual", residual, tuple(y.shape), (y.dtype,), y.device)


def _check_mean(y, norm, activation):
    check_read("norm_act_mean", "y", y, norm, activation, None)


def _check_sums(grad, y, norm, activation, gate):
    check_read("norm_act_sums", "y", y, norm, activation, gate)
    check_tensor("norm_act_sums", "grad", grad, tuple(y.shape), (y.dtype,), y.device)


def _check_image_sums(grad, x, norm, activation):
    check_read("norm_act_image_sums", "x", x, norm, activation, None)
    check_tensor("norm_act_image_sums", "grad", grad, tuple(x.shape), (x.dtype,), x.device)


def _check_backward(grad, x, norm, activation, residual):
    op = "norm_act_backward"
    check_read(op, "x", x, norm, activation, None)
    for name, tensor in (("grad", grad), ("residual", residual)):
        if tensor is not None:
            check_tensor(op, name, tensor, tuple(x.shape), (x.dtype,), x.device)


def _check_gradient(grad, y, norm, coefficients, activation, gate, pool):
    op = "norm_gradient"
    check_read(op, "y", y, norm, activation, gate)
    check_tensor(op, "grad", grad, tuple(y.shape), (y.dtype,), y.device)
    check_norm(op, "coefficients", coefficients, y)
    if pool is not None:
        check_tensor(op, "pool", pool, tuple(y.shape[:2]), (accumulator(y.dtype),), y.device)


def _check_stats(y):
    check_images("batch_stats", "y", y)


def _check_vectors(mean, var, weight, bias, eps):
    op = "norm_vectors"
    check_vectors(op, "mean", mean, ())
    check_tensor(op, "var", var, tuple(mean.shape), (mean.dtype,), mean.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_tensor(op, name, tensor, tuple(mean.shape), DTYPES, mean.device)
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps is {eps!r}; a number would do")


def _check_coefficients(sums, norm, inverse, values):
    op = "norm_coefficients"
    check_vectors(op, "sums", sums, (2,))
    channels = sums.shape[1]
    for name, tensor, shape in (("norm", norm, (3, channels)), ("inverse", inverse, (channels,))):
        check_tensor(op, name, tensor, shape, (sums.dtype,), sums.device)
    if values is not None:
        check_integer(op, "values", values, 1)


_define("norm_act", "Tensor y, Tensor norm, str activation, Tensor? gate, Tensor? residual", ("out",), _check_norm_act, _like)
_define(
    "norm_act_mean",
    "Tensor y, Tensor norm, str activation",
    ("mean",),
    _check_mean,
    lambda y, norm, activation: norm.new_empty(y.shape[:2]),
)
_define(
    "norm_act_sums",
    "Tensor grad, Tensor y, Tensor norm, str activation, Tensor? gate",
    ("sums",),
    _check_sums,
    lambda grad, y, norm, activation, gate: norm.new_empty((2, y.shape[1])),
)
_define(
    "norm_act_image_sums",
    "Tensor grad, Tensor x, Tensor norm, str activation",
    ("sums",),
    _check_image_sums,
    lambda grad, x, norm, activation: norm.new_empty((x.shape[0], 5, x.shape[1])),
)
_define(
    "norm_act_backward",
    "Tensor grad, Tensor x, Tensor norm, str activation, Tensor? residual",
    ("grad_x", "sums"),
    _check_backward,
    lambda grad, x, norm, activation, residual: (_like(x), norm.new_empty((2, x.shape[1]))),
)
_define(
    "norm_gradient",
    "Tensor grad, Tensor y, Tensor norm, Tensor coefficients, str activation, Tensor? gate, Tensor? pool",
    ("grad_y",),
    _check_gradient,
    lambda grad, y, *args: _like(y),
)
_define("batch_stats", "Tensor y", ("mean", "var"), _check_stats, lambda y: (_vector(y), _vector(y)), "triton_statistics")
_define(
    "norm_vectors",
    "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps",
    ("norm", "inverse"),
    _check_vectors,
    lambda mean, *args: (mean.new_empty((3, mean.shape[0])), mean.new_empty(mean.shape)),
    "triton_vectors",
    of_images=False,
)
_define(
    "norm_coefficients",
    "Tensor sums, Tensor norm, Tensor inverse, SymInt? values",
    ("coefficients", "grad_weight"),
    _check_coefficients,
    lambda sums, *args: (sums.new_empty((3, sums.shape[1])), sums.new_empty(sums.shape[1])),
    "triton_vectors",
    of_images=False,
)


def passes(backend: str) -> composed.Passes:
    """Those of a backend, as overloads."""
    return composed.Passes(*(getattr(getattr(torch.ops.effnet_fast, name), backend) for name in composed.Passes._fields))


def _run(name: str, x: Tensor, *args: Any) -> Any:
    if not torch.compiler.is_compiling():  # a compiler comes to the same check in the op's fake
        _CHECK[name](*args)
        if differentiates():
            check_no_gradient(name, *(arg for arg in args if isinstance(arg, Tensor)))
    return backends.choose(name, x).run(*args)


def norm_act(y: Tensor, norm: Tensor, activation: str, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``activation(norm(y)) * gate + residual``: a block's result.

    y         [N, C, H, W], fp32, bf16, fp16 or fp64, any strides; nothing empty
    norm      [3, C], gate [N, C] or None, as the package says; a gate is one number an image where stochastic depth drops some
    residual  like y, or None
    returns   [N, C, H, W] channels_last in y's dtype

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    return _run("norm_act", y, y, norm, activation, gate, residual)


def norm_act_mean(y: Tensor, norm: Tensor, activation: str) -> Tensor:
    """The squeeze of squeeze-excite (arXiv 1709.01507, equation 2): the mean of ``activation(norm(y))`` over each image, [N, C].

    y, norm and errors as in :func:`norm_act`.
    """
    return _run("norm_act_mean", y, y, norm, activation)


def norm_act_sums(grad: Tensor, y: Tensor, norm: Tensor, activation: str, gate: Tensor | None = None) -> Tensor:
    """Where a block's backward begins: the sums [2, C] of ``G = grad * gate * activation'(norm(y))`` and of ``G * (y - mean)``.

    grad like y; the rest and errors as in :func:`norm_act`.
    """
    return _run("norm_act_sums", y, grad, y, norm, activation, gate)


def norm_vectors(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """A norm as the ops read it, [3, K], and ``1 / sqrt(var + eps)``, [K].

    mean, var     [K] each, fp32 or fp64
    weight, bias  [K] each, of any of the dtypes of images, or None: ones and zeros

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    return _run("norm_vectors", mean, mean, var, weight, bias, eps)


def norm_coefficients(sums: Tensor, norm: Tensor, inverse: Tensor, values: int | None) -> tuple[Tensor, Tensor]:
    """Of the backward of a norm: the coefficients [3, K] of the gradient of y, and the gradient of the norm's weight, [K].

    sums           [2, K], of the gradient G of what the norm gives and of ``G * (y - mean)``, fp32 or fp64
    norm, inverse  what :func:`norm_vectors` gives, in the same dtype
    values         how many values of each channel the statistics are of; None where they are constants, in a frozen norm

    No gradient. Raises ValueError or TypeError, naming the argument, on bad input.
    """
    return _run("norm_coefficients", sums, sums, norm, inverse, values)
