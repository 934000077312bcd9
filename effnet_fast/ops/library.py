"""Where ops are defined: one schema string an op, one overload of it a backend.

An op's folder calls :func:`define` once. ``.reference`` (plain PyTorch, any device) always has a kernel; the other backends are
overloads of the same schema whose kernels C++ or Triton contribute. The choice between them is made in
:mod:`effnet_fast.ops.backends`, above the dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "effnet_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The dtypes of an op's result follow from its arguments: autocast has had its say in the module that calls it."""

    @functools.wraps(function)
    def run(first: torch.Tensor, *args: Any) -> Any:
        if torch.is_autocast_enabled(first.device.type):
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *args)
        return function(first, *args)

    return run


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    overloads: tuple[str, ...] = (),
) -> None:
    """Declare ``name`` with ``.reference`` and the further ``overloads``, all of one schema, one fake and one FLOP formula.

    reference  plain PyTorch; returns channels_last where ``fake`` says so
    fake       shapes, dtypes and strides of the result, for FakeTensor
    flops      floating-point operations (2 per multiply-add) from the arguments' shapes
    """
    for overload in ("reference", *overloads):
        _LIBRARY.define(f"{name}.{overload}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}.{overload}", fake, lib=_LIBRARY)
    _LIBRARY.impl(f"{name}.reference", _without_autocast(reference), "CompositeExplicitAutograd")
    register_flop_formula(getattr(torch.ops.effnet_fast, name))(flops)
