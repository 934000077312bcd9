"""What a training step's forward pass keeps for its backward pass, beside eager PyTorch, torch.compile and checkpointing.

    python -m benchmarks.memory --out benchmarks/results/memory-cpu.json

Counted are the tensors that autograd is given to save, each memory once, without parameters, buffers and images: on every device
the same, where the same ops run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
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

NETS = {"efficientnet_b0": 8, "efficientnet_b5": 2}  # and images in a batch
EAGER = "timm"


def kept_bytes(model: Callable[[Tensor], Tensor], x: Tensor, own: nn.Module) -> int:
    """What ``model``, which has the parameters and buffers of ``own``, keeps of a forward pass over ``x``."""
    apart = {t.untyped_storage().data_ptr() for t in (*own.parameters(), *own.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad  # while y lives so does all that was kept, and no address comes twice
    return sum(kept.values())


def entrants(name: str) -> dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]]:
    """The nets by what they are called, in training mode: as they are called, and as modules."""
    ours, eager, accelerated = effnet_fast.create_model(name, drop_rate=0.0, drop_path_rate=0.0), _timm(name), _timm(name)
    effnet_fast.accelerate(accelerated)
    checkpointed, ours_checkpointed = _timm(name), effnet_fast.create_model(name, drop_rate=0.0, drop_path_rate=0.0)
    for model in (checkpointed, ours_checkpointed):
        model.set_grad_checkpointing()
    named = {
        EAGER: eager,
        "timm, checkpointing": checkpointed,
        "ours": ours,
        "ours, checkpointing": ours_checkpointed,
        "accelerated timm": accelerated,
    }
    made: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {key: (model.train(), model) for key, model in named.items()}
    compiled = _timm(name).train()
    made["timm, torch.compile"] = torch.compile(compiled), compiled
    return made


def _timm(name: str) -> nn.Module:
    return timm.create_model(name)


def measure(name: str, only: str | None = None) -> list[dict[str, Any]]:
    """Of each entrant, or of ``only`` one and eager PyTorch: bytes an image, and their share of eager PyTorch's."""
    size, batch = FAMILY[name].resolution, NETS[name]
    x = images(batch, (size, size)).contiguous(memory_format=torch.channels_last)
    found = {key: value for key, value in entrants(name).items() if only in (None, key) or key == EAGER}
    kept = {key: kept_bytes(model, x, own) / batch for key, (model, own) in tqdm(found.items(), desc=name, disable=None)}
    return [
        {"net": name, "size": size, "batch": batch, "entrant": key, "bytes_an_image": value, "of_eager": value / kept[EAGER]}
        for key, value in kept.items()
    ]


def summary(results: dict[str, Any]) -> str:
    rows = [
        (case["net"], case["entrant"], f"{case['bytes_an_image'] / 1e6:.1f}", f"{100 * case['of_eager']:.0f} %")
        for case in results["cases"]
    ]
    return table(("net", "entrant", "MB an image", "of eager"), rows, "llrr")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    cases = [case for name in NETS for case in measure(name)]
    results = {
        "suite": "memory",
        "dtype": "fp32",
        "command": shlex.join(["python", "-m", "benchmarks.memory", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": facts(),
        "cases": cases,
    }
    write(results, options.out)
    print(summary(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
