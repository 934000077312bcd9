"""The compiled module ``effnet_fast._C``, loaded once; importing it registers the ``.native`` kernels with torch."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from effnet_fast.ops import gpu
from effnet_fast.ops.common import either

CPU = torch.device("cpu")
STORED = (torch.float32, torch.bfloat16, torch.float16)  # what kernels read and write
MINIMUM_TORCH = (2, 11)  # the stable-ABI version that setup.py compiles for


def _load() -> tuple[str | None, Any]:
    """Why there is no compiled module to use, or None; and the module."""
    version = torch.__version__.split("+")[0]
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        return f"torch {version} is older than the {'.'.join(map(str, MINIMUM_TORCH))} that the compiled module needs", None
    try:
        return None, importlib.import_module("effnet_fast._C")
    except ModuleNotFoundError:
        return "the compiled module effnet_fast._C was not built", None
    except ImportError as error:
        return f"the compiled module effnet_fast._C cannot be loaded: {str(error).splitlines()[0]}", None


#: Why the compiled module cannot be used, in one sentence; None if it is loaded.
REASON: str | None
REASON, _MODULE = _load()
#: Whether the compiled module was built with CUDA kernels.
CUDA_KERNELS = bool(getattr(_MODULE, "CUDA_KERNELS", False))
#: What they were compiled for: ``sm_90`` (machine code), ``compute_100`` (PTX), with commas between.
CUDA_ARCHITECTURES: str = getattr(_MODULE, "CUDA_ARCHITECTURES", "")


def require(schema: str) -> None:
    """Use nothing of a compiled module that was built for another ``schema`` of an op, or before the op was there.

    A kernel takes its arguments by place, whatever their types: it would fail inside, or worse.
    """
    global REASON
    if REASON is None and schema not in getattr(_MODULE, "SCHEMAS", "").splitlines():
        op = schema.partition("(")[0]
        REASON = (
            f"the compiled module effnet_fast._C was built from other sources than this package ({op} differs):"
            " building it again (pip install --no-build-isolation -e .) would do"
        )


def why_no_cuda(device: torch.device) -> str | None:
    """Why the compiled module's CUDA kernels do not run on that GPU, or None."""
    if not CUDA_KERNELS:
        return "the compiled module was built without CUDA kernels"
    return gpu.why_no_image(CUDA_ARCHITECTURES, device.index)


def why_not(x: torch.Tensor, cuda: bool = False, dtypes: tuple[torch.dtype, ...] = STORED) -> str | None:
    """``can_run`` of a native kernel for the CPU and, with ``cuda``, for CUDA, whose first argument is of one of ``dtypes``."""
    if REASON is not None:
        return REASON
    if x.device != CPU:
        if not (cuda and x.is_cuda):
            return f"no native kernel for device {x.device.type!r}"
        if (reason := why_no_cuda(x.device)) is not None:
            return reason
    return None if x.dtype in dtypes else f"no native kernel for {x.dtype}, but for {either(dtypes)}"
