"""Whether an NVIDIA GPU runs what there is for it, by its compute capability."""

from __future__ import annotations

import functools
import re

import torch

from effnet_fast.ops.common import constant

TRITON_MINIMUM = (8, 0)  # bfloat16


@functools.cache
def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architecture`` (``sm_90``, ``compute_100``, ``sm_90a``, ``sm_100f``) runs on that compute capability.

    Machine code runs on its own major version from its minor version on, or with ``a`` on exactly its own; PTX (``compute``) is
    compiled for any later GPU, with ``f`` or ``a`` as machine code.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if found is None:
        return False
    kind, major, minor, suffix = found[1], int(found[2]), int(found[3]), found[4]
    if suffix == "a":
        return capability == (major, minor)
    if kind == "compute" and not suffix:
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor


@constant
def why_no_image(architectures: str, index: int | None) -> str | None:
    """Why CUDA kernels compiled for ``architectures`` (with commas between) do not run on a GPU, by default the current one."""
    capability = _capability(index)
    if capability is None or any(runs_on(architecture, capability) for architecture in architectures.split(",")):
        return None
    return f"the compiled module has CUDA kernels for {architectures}; this GPU is {_name(capability)}"


@constant
def why_no_triton(index: int | None) -> str | None:
    """Why Triton's kernels do not run on a GPU, by default the current one."""
    capability = _capability(index)
    if capability is None or capability >= TRITON_MINIMUM:
        return None
    return f"this GPU is {_name(capability)}; the Triton kernels need {_name(TRITON_MINIMUM)}"


def _name(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _capability(index: int | None) -> tuple[int, int] | None:
    """None where that is no NVIDIA GPU, or there is none at all. With an index, as of every tensor's device, it costs no time."""
    if index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    return None if index is None else _capability_of(index)


@functools.cache
def _capability_of(index: int) -> tuple[int, int] | None:
    return None if torch.version.hip or not torch.cuda.is_available() else torch.cuda.get_device_capability(index)


@constant
def shared_memory(index: int | None) -> int:
    """Bytes of it that a block of a CUDA kernel may have on a GPU; where there is no such GPU, as many as it needs."""
    no_gpu = index is None or not torch.cuda.is_available() or torch.version.hip  # of HIP's torch does not tell it
    return 2**31 if no_gpu else _shared_memory(index)


@functools.cache
def _shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]  # but by the stub
