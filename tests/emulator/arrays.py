"""Tensors as the emulator takes them: NumPy arrays, half types as their bits, and the kernels' enums as numbers."""

from __future__ import annotations

import numpy as np
import torch

ACTIVATIONS = {"identity": 0, "silu": 1, "relu": 2, "relu6": 3}  # the enum of csrc/common/activation.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the enum of csrc/common/dtype.h


def raw(t: torch.Tensor) -> np.ndarray:
    t = t.contiguous()
    return (t.view(torch.uint16) if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()


def from_raw(a: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(a) if dtype == torch.float32 else torch.from_numpy(a).view(dtype)
