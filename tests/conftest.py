"""For all tests and the processes they start: torchvision's shim, threads that do not spin, and no network."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


def pytest_sessionstart() -> None:
    import needs

    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.patch_once_a_kernel()

    if lacks := needs.required_and_missing():
        pytest.exit("EFFNET_FAST_TESTS_REQUIRE names what is missing here: " + "; ".join(lacks), returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory) -> Callable[[str], AbstractContextManager[Path]]:
    """Of a name, a folder that all test processes of this session share and take turns in."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @contextmanager
    def directory(name: str) -> Iterator[Path]:
        (base / name).mkdir(exist_ok=True)
        with open(base / name / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield base / name

    return directory


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """For native CUDA kernels, or a skip; PyTorch's own convolutions are then held to fp32."""
    import torch

    from effnet_fast.ops import native

    if (reason := native.REASON or native.why_no_cuda(torch.device("cuda"))) is not None:
        pytest.skip(reason)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


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
