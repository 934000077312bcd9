"""What a training step's forward pass keeps for its backward pass, beside eager PyTorch, torch.compile and checkpointing.

    python -m benchmarks.memory --out benchmarks/results/memory-cpu.json
    python -m benchmarks.memory --out benchmarks/results/memory-cuda.json --device cuda

On the CPU, in float32, counted are the tensors that autograd is given to save, each memory once, without parameters, buffers and
images. On CUDA, in bfloat16 under autocast, it is what the allocator holds more once the forward pass is over; and beside it the
most that it holds then and in the backward pass, but for the gradients.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

import effnet_fast
from effnet_fast.benchmark import images
from effnet_fast.benchmark.machine import facts
from effnet_fast.benchmark.results import write
from effnet_fast.cli.table import table
from effnet_fast.models import FAMILY

NETS = {"efficientnet_b0": 8, "efficientnet_b5": 2}  # and images in a batch; on CUDA MORE times as many
MORE = 8
EAGER = "timm"
COMPILED = "timm, torch.compile"


def kept_bytes(model: Callable[[Tensor], Tensor], x: Tensor, own: nn.Module) -> int:
    """What ``model``, which has the parameters and buffers of ``own``, keeps of a forward pass over ``x``."""
    apart = {t.untyped_storage().data_ptr() for t in (*own.parameters(), *own.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # the result of an op itself would hold the op, and that it, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad  # while y lives so does all that was kept, and no address comes twice
    return sum(kept.values())


def held_bytes(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """By CUDA's allocator: what ``model`` keeps of a forward pass over ``x``, and the most that it takes in the whole step."""
    with torch.autocast("cuda", torch.bfloat16):
        model(x).sum().backward()  # gradients, workspaces, what is compiled
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = model(x)
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        y.sum().backward()
        torch.cuda.synchronize()
    return kept, torch.cuda.max_memory_allocated() - before


def entrants(name: str, only: Collection[str] = ()) -> dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]]:
    """The nets by what they are called, in training mode: as they are called, and as modules. Or ``only`` some, and eager's."""

    def ours() -> nn.Module:
        return effnet_fast.create_model(name, drop_rate=0.0, drop_path_rate=0.0)

    def accelerated() -> nn.Module:
        effnet_fast.accelerate(model := _timm(name))
        return model

    def checkpointed(model: nn.Module) -> nn.Module:
        model.set_grad_checkpointing()  # type: ignore[operator]
        return model

    makers: dict[str, Callable[[], nn.Module]] = {
        EAGER: lambda: _timm(name),
        "timm, checkpointing": lambda: checkpointed(_timm(name)),
        "ours": ours,
        "ours, checkpointing": lambda: checkpointed(ours()),
        "accelerated timm": accelerated,
        COMPILED: lambda: _timm(name),
    }
    models = {key: make().train() for key, make in makers.items() if not only or key in (EAGER, *only)}
    return {key: (torch.compile(model) if key == COMPILED else model, model) for key, model in models.items()}


def _timm(name: str) -> nn.Module:
    return timm.create_model(name)


def measure(name: str, only: Collection[str] = (), device: str = "cpu") -> list[dict[str, Any]]:
    """Of each entrant, or of ``only`` some and eager PyTorch: bytes an image, and their share of eager PyTorch's.

    On a GPU plain PyTorch trains where nobody asks for ours: so ours is asked for there.
    """
    size, batch = FAMILY[name].resolution, NETS[name] * (MORE if device == "cuda" else 1)
    x = images(batch, (size, size)).contiguous(memory_format=torch.channels_last).to(device)
    rows = []
    for key, (model, own) in tqdm(entrants(name, only).items(), desc=name, disable=None):
        row = {"net": name, "size": size, "batch": batch, "entrant": key}
        if device == "cpu":
            row["bytes_an_image"] = kept_bytes(model, x, own) / batch
        else:
            own.to(device)
            with nullcontext() if key.startswith("timm") else effnet_fast.backend("native"):
                row["bytes_an_image"], row["peak_an_image"] = (held / batch for held in held_bytes(model, x))
            own.cpu()
        rows.append(row)
    (eager,) = (row for row in rows if row["entrant"] == EAGER)
    for row in rows:
        row["of_eager"] = row["bytes_an_image"] / eager["bytes_an_image"]
        if device == "cuda":
            row["peak_of_eager"] = row["peak_an_image"] / eager["peak_an_image"]
    return rows


def summary(results: dict[str, Any]) -> str:
    columns = {"MB an image": ("bytes_an_image", 1e-6, ".1f"), "of eager": ("of_eager", 100, ".0f")}
    if results["device"] == "cuda":
        columns |= {"at most": ("peak_an_image", 1e-6, ".1f"), "of eager's": ("peak_of_eager", 100, ".0f")}
    rows = [
        (
            case["net"],
            case["entrant"],
            *(f"{scale * case[key]:{form}}" + " %" * (scale == 100) for key, scale, form in columns.values()),
        )
        for case in results["cases"]
    ]
    return table(("net", "entrant", *columns), rows, "ll" + "r" * len(columns))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and there is no CUDA device here; cpu would do")
    torch.manual_seed(0)
    cases = [case for name in NETS for case in measure(name, device=options.device)]
    results = {
        "suite": "memory",
        "device": options.device,
        "dtype": "fp32" if options.device == "cpu" else "bf16",
        "command": shlex.join(["python", "-m", "benchmarks.memory", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": facts(),
        "cases": cases,
    }
    write(results, options.out)
    print(summary(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
