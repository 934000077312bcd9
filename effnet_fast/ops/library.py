"""Where ops are defined: one schema string an op, two overloads of it a backend.

An op's folder calls :func:`define` once. ``.reference`` (plain PyTorch, any device) always has a kernel; the other backends are
overloads of the same schema whose kernels C++ or Triton contribute. ``.BACKEND_out`` writes into tensors that the caller gives,
laid out as those that the op returns and apart from its arguments; the native ones allocate nothing on CUDA where arguments lie as
the kernel reads them, Triton's make results of their own to compare with. The choice between backends is made in
:mod:`effnet_fast.ops.backends`, above the dispatcher.

No overload has a gradient. The ops' public functions refuse tensors that ask for one; an overload that is called directly does not
look, and it is torch that warns where a backward pass comes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from effnet_fast.ops import native
from effnet_fast.ops.common import check_tensor, without_autocast

NAMESPACE = "effnet_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _counted(overload: Any) -> Callable[..., None]:
    """An ``_out`` overload's kernel above all others, which tells autograd that the tensors it writes have changed."""

    def run(keys: Any, *args: Any, **out: torch.Tensor) -> None:
        torch.autograd.graph.increment_version(out.values())
        with torch._C._AutoDispatchBelowADInplaceOrView():
            overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **out)

    return run


def fitting(name: str, results: Sequence[str], made: Any, out: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each of an op's ``results`` that was made with the tensor that was given for it. Raises ValueError or TypeError, naming it,
    for one that is not like it."""
    pairs = []
    for result, tensor in zip(results, made if isinstance(made, tuple) else (made,), strict=True):
        given = out[result]
        check_tensor(name, result, given, tuple(tensor.shape), (tensor.dtype,), tensor.device)
        # Of symbolic sizes torch 2.11 says that they are contiguous in no form.
        strides = zip(tensor.shape, given.stride(), tensor.stride(), strict=True)
        if tensor.numel() > 0 and any(size != 1 and stride != other for size, stride, other in strides):
            raise ValueError(f"{name}: {result} has strides {given.stride()}; {tensor.stride()} would do")
        pairs.append((tensor, given))
    return pairs


def define(
    name: str,
    arguments: str,
    results: tuple[str, ...],
    *,
    reference: Callable[..., Any],
    check: Callable[..., Any],
    allocate: Callable[..., Any],
    flops: Callable[..., int],
    backends: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Declare ``name`` with ``.reference`` and further ``backends``, all of one schema, one fake and one FLOP formula.

    arguments  of the schema, without brackets
    results    names of the result tensors, which the ``_out`` forms take as keyword arguments and write
    reference  plain PyTorch; returns channels_last where ``allocate`` does
    check      raises on arguments that the op does not take
    allocate   makes the results, unwritten, from arguments that were checked: their shapes, dtypes and strides
    flops      floating-point operations (2 per multiply-add) from the arguments' shapes

    Returns the reference as a function: eager mode calls it without the dispatcher, and a compiler sees through it and fuses what
    is inside.
    """

    # The fakes also run where one tensor is on the meta device and others are not. There the checks refuse it.
    def fake(*args: Any) -> Any:
        check(*args)
        return allocate(*args)

    def fake_out(*args: Any, **out: torch.Tensor) -> None:
        fitting(name, results, fake(*args), out)

    returned = ", ".join(f"Tensor {result}" for result in results)
    if "native" in backends:
        native.require(f"{name}({arguments}) -> ({returned})")
    written = ", ".join(f"Tensor({chr(ord('a') + i)}!) {result}" for i, result in enumerate(results))
    for backend in ("reference", *backends):
        _LIBRARY.define(f"{name}.{backend}({arguments}) -> ({returned})", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.define(f"{name}.{backend}_out({arguments}, *, {written}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}", fake, lib=_LIBRARY)
        torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}_out", fake_out, lib=_LIBRARY)
        overload = getattr(getattr(torch.ops.effnet_fast, name), f"{backend}_out")
        _LIBRARY.impl(f"{name}.{backend}_out", _counted(overload), "ADInplaceOrView", with_keyset=True)

    reference = without_autocast(reference)

    def checked_reference(*args: Any) -> Any:
        check(*args)
        return reference(*args)

    def reference_out(*args: Any, **out: torch.Tensor) -> None:
        for made, given in fitting(name, results, checked_reference(*args), out):
            given.copy_(made)

    _LIBRARY.impl(f"{name}.reference", checked_reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{name}.reference_out", reference_out, "CompositeExplicitAutograd")
    register_flop_formula(getattr(torch.ops.effnet_fast, name))(flops)
    return reference


def define_native(schema: str) -> None:
    """Declare what the compiled module alone implements, and what is no op of the table of backends."""
    native.require(schema)
    _LIBRARY.define(schema)


def implement(overload: str, function: Callable[..., Any], key: str) -> None:
    """Give ``OP.BACKEND`` its kernel for a dispatch key, from Python."""
    _LIBRARY.impl(overload, function, key)
