"""Say what is installed and found here, and for each operation and backend whether it can run on the CPU and on CUDA, and why not.

example: effnet-fast doctor
"""

from __future__ import annotations

import argparse
import platform

from effnet_fast.cli.table import si, table

# Optional packages, and what wants them.
_OPTIONAL = {
    "Pillow": "predict, cam, demo",
    "tqdm": "predict, bench, demo",
    "scikit-learn": "demo",
    "safetensors": ".safetensors checkpoints",
    "huggingface_hub": "pretrained weights",
    "timm": "accelerate: its models; bench",
    "torchvision": "accelerate: its models; bench",
    "onnxscript": "bench: the next two",
    "onnxruntime": "bench",
    "openvino": "bench",
    "matplotlib": "train, bench --plot",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No option."""


def run(arguments: argparse.Namespace) -> int:
    import numpy
    import torch

    from effnet_fast import __version__
    from effnet_fast.benchmark.machine import cpu_model, version
    from effnet_fast.ops import native

    cuda = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "none: a CPU build of torch")
    kernels = f"with CUDA kernels for {native.CUDA_ARCHITECTURES}" if native.CUDA_KERNELS else "without CUDA kernels"
    compiled = native.REASON or f"loaded, {kernels}"
    facts = [
        ("effnet_fast", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", version("triton") or "not installed"),
        ("numpy", numpy.__version__),
        ("CUDA runtime", cuda),
        ("CPU", f"{cpu_model()}; {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        *(_gpus() or [("GPU", "none")]),
        ("compiled module", compiled),
        *((name, version(name) or f"not installed (for {use})") for name, use in _OPTIONAL.items()),
    ]
    width = max(len(name) for name, _ in facts)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts), end="\n\n")
    print(_backend_table("" if torch.cuda.is_available() else "no CUDA device here"))
    return 0


def _backend_table(no_cuda: str) -> str:
    """Reasons are sentences: the cells carry their numbers."""
    from effnet_fast.ops import backends

    tables = {device: backends.reasons(device) for device in ("cpu", "cuda")}
    footnotes: list[str] = []

    def cell(device: str, backend: str, op: str) -> str:
        reason = no_cuda if device == "cuda" and no_cuda else tables[device][backend][op]
        if not reason:
            return "yes"
        if reason not in footnotes:
            footnotes.append(reason)
        return f"no [{footnotes.index(reason) + 1}]"

    rows = [
        (op, backend, *(cell(device, backend, op) for device in tables))
        for op in tables["cpu"]["reference"]
        for backend in tables["cpu"]
    ]
    notes = "".join(f"\n[{number}] {reason}" for number, reason in enumerate(footnotes, start=1))
    return table(("operation", "backend", *tables), rows, "llll") + (f"\n{notes}" if notes else "")


def _gpus() -> list[tuple[str, str]]:
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        found.append((f"GPU {number}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {si(gpu.total_memory, 'B')}"))
    return found
