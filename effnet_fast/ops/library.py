"""Where ops are defined: one schema string an op, two overloads of it a backend.

An op's folder calls :func:`define` once. ``.reference`` (plain PyTorch, any device) always has a kernel; the other backends are
overloads of the same schema whose kernels C++ or Triton contribute. ``.BACKEND_out`` writes into tensors that the caller gives;
the native ones allocate nothing on CUDA where arguments lie as the kernel reads them, Triton's gate of large weights has a
workspace. The choice between backends is made in :mod:`effnet_fast.ops.backends`, above the dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from effnet_fast.ops import native

NAMESPACE = "effnet_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The dtypes of an op's result follow from its arguments: autocast has had its say in the module that calls it."""

    @functools.wraps(function)
    def run(first: torch.Tensor, *args: Any) -> Any:
        device = first.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return function(first, *args)
        return function(first, *args)

    return run


def define(
    name: str,
    arguments: str,
    results: tuple[str, ...],
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    backends: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Declare ``name`` with ``.reference`` and further ``backends``, all of one schema, one fake and one FLOP formula.

    arguments  of the schema, without brackets
    results    names of the result tensors, which the ``_out`` forms take as keyword arguments and write
    reference  plain PyTorch; returns channels_last where ``fake`` says so
    fake       shapes, dtypes and strides of the result, for FakeTensor
    flops      floating-point operations (2 per multiply-add) from the arguments' shapes

    Returns the reference as a function: eager mode calls it without the dispatcher, and a compiler sees through it and fuses what
    is inside.
    """
    returned = ", ".join(f"Tensor {result}" for result in results)
    if "native" in backends:
        native.require(f"{name}({arguments}) -> ({returned})")
    written = ", ".join(f"Tensor({chr(ord('a') + i)}!) {result}" for i, result in enumerate(results))
    for backend in ("reference", *backends):
        _LIBRARY.define(f"{name}.{backend}({arguments}) -> ({returned})", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.define(f"{name}.{backend}_out({arguments}, *, {written}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}", fake, lib=_LIBRARY)
        torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}_out", _writes_only, lib=_LIBRARY)

    reference = _without_autocast(reference)

    def reference_out(*args: Any, **out: torch.Tensor) -> None:
        made = reference(*args)
        for result, tensor in zip(results, made if isinstance(made, tuple) else (made,), strict=True):
            check_out(name, result, out[result], tensor.shape, tensor.dtype)
            out[result].copy_(tensor)

    _LIBRARY.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{name}.reference_out", reference_out, "CompositeExplicitAutograd")
    register_flop_formula(getattr(torch.ops.effnet_fast, name))(flops)
    return reference


def implement(overload: str, function: Callable[..., Any], key: str) -> None:
    """Give ``OP.BACKEND`` its kernel for a dispatch key, from Python."""
    _LIBRARY.impl(overload, function, key)


def _writes_only(*args: Any, **out: torch.Tensor) -> None:
    """The fake of every ``_out`` form: it has no result."""


def check_out(name: str, result: str, given: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse a tensor that the result of an ``_out`` form does not fit."""
    if given.shape != torch.Size(shape) or given.dtype != dtype:
        raise ValueError(f"{name}: {result} is {tuple(given.shape)} {given.dtype}; {tuple(shape)} {dtype} would do")
