"""What tests need of a machine. Where it is missing they are skipped; but where EFFNET_FAST_TESTS_REQUIRE names it, as in .ci/run,
no test runs and the reason is told."""

from __future__ import annotations

import importlib.util
import os
import shutil

PEERS = "timm", "torchvision", "efficientnet_pytorch"
REQUIRED = frozenset(filter(None, os.environ.get("EFFNET_FAST_TESTS_REQUIRE", "").split(",")))


def missing() -> dict[str, str | None]:
    """Of each thing why it is missing here, or None."""
    import sass
    from emulator import build as emulator

    from effnet_fast.ops import native, triton_backend

    peers = [name for name in PEERS if importlib.util.find_spec(name) is None]
    return {
        "native": native.REASON,
        "nvcc": None if shutil.which("nvcc") else "there is no nvcc on PATH",
        "cuobjdump": None if sass.cuobjdump() else "there is no cuobjdump: $CUOBJDUMP, PATH or an installed triton would do",
        "emulator": emulator.missing(),
        "triton": triton_backend.REASON,
        "peers": f"not installed: {', '.join(peers)}" if peers else None,
    }


def required_and_missing() -> list[str]:
    reasons = missing() if REQUIRED else {}
    lacks = {name: reasons.get(name, f"only {', '.join(reasons)} can be required") for name in sorted(REQUIRED)}
    return [f"{name}: {reason}" for name, reason in lacks.items() if reason]
