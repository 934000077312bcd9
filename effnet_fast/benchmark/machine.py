"""What a measurement holds for: the machine, the versions, the commit; and the rates that its bounds are taken from."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from effnet_fast.benchmark.roofline import H200, Machine
from effnet_fast.ops import native

COMMIT = "EFFNET_FAST_COMMIT"  # for a copy of the tree without its history
_PACKAGES = ("torch", "triton", "timm", "torchvision", "onnxruntime", "openvino")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def facts() -> dict[str, Any]:
    """JSON-ready: date, commit, processor, threads, GPU and driver (None without one), versions."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "cpu": cpu_model(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": _gpu(),
        "compiled_module": native.REASON or f"loaded, {'with' if native.CUDA_KERNELS else 'without'} CUDA kernels",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
    }


def commit() -> str | None:
    """What EFFNET_FAST_COMMIT says, else the commit of the source tree that this package is in, "-dirty" where files differ: not
    those of results, which the measurements before this one have just written."""
    if os.environ.get(COMMIT):
        return os.environ[COMMIT]
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return _git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True).stdout.strip()


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def last_level_cache(device: str) -> int:
    """Bytes; 32 MiB where a CPU does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


def measure(device: str, dtype: str) -> Machine:
    """This machine's copy bandwidth (bytes read and written, four caches large) and its rate of a large square matrix product.

    A CPU's is that of a convolution of 3x3 where this is faster, as oneDNN's is beside a product that MKL does not know the
    processor of. Its rate of multiply-adds is that in fp32 too, which the same units do, as they do half types that torch has no
    fast product of; its exponentials are not counted.
    On a GPU the vector and special-function rates are multiprocessors x lanes x the highest clock: for a GPU with Hopper's.
    """
    size = 2 << 30 if device == "cuda" else 4 * last_level_cache(device)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    copy = 2 * size / _best(lambda: target.copy_(source), device)
    dense = _product(device, dtype)
    if device == "cpu":
        floats = dense if dtype == "fp32" else _product(device, "fp32")
        return Machine(cpu_model(), copy, {dtype: max(dense, floats)}, lanes=floats / 2)
    properties, told = torch.cuda.get_device_properties(0), _smi("clocks.max.sm")
    clock, processors = float(told.split()[0]) * 1e6 if told else H200.clock, properties.multi_processor_count
    lanes, special = 128 * processors * clock, 16 * processors * clock
    return Machine(properties.name, copy, {dtype: dense}, lanes, special, multiprocessors=processors, clock=clock)


def _product(device: str, dtype: str) -> float:
    """FLOP/s of a large square matrix product, on a CPU of that or of a convolution."""
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=_DTYPES[dtype]) for _ in range(2))
    rate = 2 * side**3 / _best(lambda: a @ b, device)
    if device == "cpu":
        channels, size = 256, 32
        x = torch.randn(1, channels, size + 2, size + 2, dtype=_DTYPES[dtype]).to(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, dtype=_DTYPES[dtype]).to(memory_format=torch.channels_last)
        flop = 2 * 9 * channels**2 * size**2
        rate = max(rate, flop / _best(lambda: torch.nn.functional.conv2d(x, weight), device))
    return rate


def _best(call: Callable[[], Any], device: str) -> float:
    """Seconds: the fastest call of about a second of them."""
    seconds: list[float] = []
    end = time.perf_counter() + 1.0
    call()
    while len(seconds) < 5 or time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _smi("driver_version"),
        "clock": _smi("clocks.max.sm"),
    }


def _smi(field: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", "0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
