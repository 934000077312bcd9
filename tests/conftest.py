"""For all tests and the processes they start: torchvision's shim, threads that do not spin, and no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fresh import fresh_memory_is_nan  # noqa: F401

if TYPE_CHECKING:
    import torch

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


@pytest.fixture(scope="module")
def b0() -> torch.nn.Module:
    """EfficientNet-B0 of five classes, for tests that leave it as it is."""
    from effnet_fast.models import create_model

    return create_model("efficientnet_b0", num_classes=5).eval()


@pytest.fixture
def saved(b0: torch.nn.Module, tmp_path: Path) -> Path:
    """A file of ``b0``'s bare state dict."""
    import torch

    torch.save(b0.state_dict(), tmp_path / "b0.pth")
    return tmp_path / "b0.pth"
