"""For all tests and the processes they start: torchvision's shim, threads that do not spin, and no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

SHIM = str(Path(__file__).parent / "shim")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SHIM, os.environ.get("PYTHONPATH"))))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if SHIM not in sys.path:
    sys.path.append(SHIM)
    import sitecustomize  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
