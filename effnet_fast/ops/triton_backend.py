"""The ``.triton`` kernels: registered with torch at import, imported (and triton with them) at their first call."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_fast.ops import gpu
from effnet_fast.ops.common import either
from effnet_fast.ops.library import NAMESPACE, fitting, implement

#: Why triton cannot be used, in one sentence; None if it is installed.
REASON = None if importlib.util.find_spec("triton") is not None else "triton is not installed"
#: Whether triton's own switch asks for its interpreter, which runs the kernels on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in storage; partial sums are fp32
_DEVICE = "cpu" if INTERPRETED else "cuda"
KEY = _DEVICE.upper()  # torch's dispatch key there


def can_run(x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why no Triton kernel takes this ``x``, or None; ``dtypes`` are those that the op's takes."""
    if REASON is not None:
        return REASON
    if x.device.type != _DEVICE:
        return f"x is on {x.device.type!r}; Triton {'interprets' if INTERPRETED else 'runs'} kernels on {_DEVICE!r}"
    if not INTERPRETED and (reason := gpu.why_no_triton(x.device.index)) is not None:
        return reason
    return None if x.dtype in dtypes else f"x is {x.dtype}; Triton's kernels have no such one"


def register(
    name: str,
    check: Callable[..., Any],
    allocate: Callable[..., Any],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    launcher: tuple[str, str] | None = None,
) -> None:
    """Implement ``name.triton`` and ``name.triton_out`` by a launcher, called as ``launcher(*args, **out)``.

    check, allocate  those of :func:`effnet_fast.ops.library.define`
    dtypes           of the first argument
    launcher         its module and name; by default ``launch`` of the module ``triton`` in the op's folder
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), name).triton_out
    results = [argument.name for argument in overload._schema.arguments if argument.is_out]
    module, function = launcher or (f"{allocate.__module__}.triton", "launch")

    first = overload._schema.arguments[0].name

    def check_all(first_argument: Tensor, *others: Any) -> None:
        check(first_argument, *others)
        if first_argument.dtype not in dtypes:
            raise TypeError(f"{name}: {first} is {first_argument.dtype}; {either(dtypes)} would do for Triton")

    def launch(args: tuple[Any, ...], out: dict[str, Tensor]) -> None:
        getattr(importlib.import_module(module), function)(*args, **out)

    def out_form(*args: Any, **out: Tensor) -> None:
        check_all(*args)
        fitting(name, results, allocate(*args), out)
        launch(args, out)

    def returning(*args: Any) -> Any:
        check_all(*args)
        made = allocate(*args)
        launch(args, dict(zip(results, made if isinstance(made, tuple) else (made,), strict=True)))
        return made

    implement(f"{name}.triton", returning, KEY)
    implement(f"{name}.triton_out", out_form, KEY)
