"""How far each form of a network is from float64, at most over many random images, beside plain PyTorch in the same dtype.

    python -m benchmarks.errors --out benchmarks/results/errors-cpu.json

float64 computes with the weights and the images as the dtype has rounded them, so that the error is that of the computation alone.
The statistics are calibrated (effnet_fast.benchmark). Exits with 1 where an error is more than twice plain PyTorch's.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import effnet_fast
from benchmarks import registry
from effnet_fast.benchmark import calibrate, images, nets
from effnet_fast.benchmark.case import DTYPES
from effnet_fast.benchmark.machine import facts
from effnet_fast.benchmark.results import write
from effnet_fast.benchmark.tolerance import largest
from effnet_fast.cli.options import count
from effnet_fast.cli.table import table

FACTOR = 2.0  # that an error may be of plain PyTorch's: of the largest ones there is no ulp to spare
SIZE = 96  # pixels a side: at 224 float64 alone would take a quarter of an hour on two cores
BATCH = 20
RULE = f"the largest error of a logit is at most {FACTOR:g} times that of plain PyTorch in the same dtype"
PLAIN = "plain"


def forms(net: str, state: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The network in ``dtype``: as plain PyTorch (:func:`effnet_fast.benchmark.nets.plain_net`) and as what is held to it."""

    def placed(model: nn.Module) -> nn.Module:
        model.load_state_dict(state)
        return model.eval().to(device=device, dtype=dtype, memory_format=torch.channels_last)

    ours = placed(effnet_fast.create_model(net))
    made = {PLAIN: placed(nets.plain_net(net)), "ours": ours}
    if nets.eager_of(net) == "timm":
        made["accelerated timm"] = placed(nets.timm_net(net))
        effnet_fast.accelerate(made["accelerated timm"])
    return {**made, "ours optimized": effnet_fast.optimize_for_inference(ours)}


@torch.no_grad()
def measure(
    net: str, device: str, number: int, size: int = SIZE, advance: Callable[[int], Any] = lambda images: None
) -> list[dict[str, Any]]:
    """The largest error of each form and dtype over ``number`` images. ``advance`` is told how many were looked at."""
    torch.manual_seed(0)
    state = calibrate(effnet_fast.create_model(net), (size, size)).state_dict()
    made = {name: forms(net, state, device, dtype) for name, dtype in DTYPES.items()}
    exact = {name: copy.deepcopy(models[PLAIN]).double() for name, models in made.items()}
    errors: dict[tuple[str, str], list[float]] = {(name, form): [] for name, models in made.items() for form in models}
    logits: dict[str, list[float]] = {name: [] for name in made}
    for first in range(0, number, BATCH):
        batch = images(min(BATCH, number - first), (size, size), seed=2 + first)  # calibrate has seen those of 0 and 1
        for name, models in made.items():
            x = batch.to(device=device, dtype=DTYPES[name], memory_format=torch.channels_last)
            reference = exact[name](x.double())
            logits[name].append(largest(reference))
            for form, model in models.items():
                errors[name, form].append(largest(model(x).double() - reference))
        advance(len(batch))
    return [_case(name, form, _most(logits[name]), _most(errors[name, form]), _most(errors[name, PLAIN])) for name, form in errors]


def _most(values: list[float]) -> float:
    """The largest, or NaN where one is NaN."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def _case(dtype: str, form: str, logit: float, error: float, plain: float) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "form": form,
        "largest_logit": logit,
        "error": error,
        "of_plain": error / plain,
        "passed": error <= FACTOR * plain,  # false for NaN
    }


def summary(results: dict[str, Any]) -> str:
    rows = [
        (
            case["dtype"],
            case["form"],
            f"{case['error']:.2e}",
            f"{case['of_plain']:.2f}",
            "" if case["form"] == PLAIN else "yes" if case["passed"] else "NO",
        )
        for case in results["cases"]
    ]
    size, limit = results["size"], f"at most {FACTOR:g}"
    return "\n".join(
        [
            f"{results['net']}, {results['images']} images of {size}x{size}, {results['device']}: {results['rule']}",
            table(("dtype", "form", "largest error", "of plain's", limit), rows, "llrrl"),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--images", type=count, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--net", choices=sorted(registry.NETS), default="b0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    net = f"efficientnet_{options.net}"
    precision = torch.backends.cudnn.conv.fp32_precision
    if options.device == "cuda":  # for plain PyTorch too float32 is to mean float32
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        with tqdm(total=options.images, unit="image", disable=None) as bar:
            cases = measure(net, options.device, options.images, advance=bar.update)
    finally:
        if options.device == "cuda":
            torch.backends.cudnn.conv.fp32_precision = precision
    results = {
        "suite": "errors",
        "device": options.device,
        "net": net,
        "images": options.images,
        "size": SIZE,
        "rule": RULE,
        "command": shlex.join(["python", "-m", "benchmarks.errors", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": facts(),
        "cases": cases,
        "passed": all(case["passed"] for case in cases),
    }
    write(results, options.out)
    print(summary(results))
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
