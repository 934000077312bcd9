"""How far the family's logits are from timm's and torchvision's, and both from float64.

    python -m benchmarks.parity --out benchmarks/results/parity.json

The networks are untrained, with calibrated running statistics (effnet_fast.benchmark); both sides hold the same weights.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

import effnet_fast
from effnet_fast.benchmark import calibrate, images, nets
from effnet_fast.benchmark.machine import facts
from effnet_fast.benchmark.results import write
from effnet_fast.weights import key_map

CASES = [
    ("timm", "efficientnet_b0", (224, 224)),
    ("timm", "efficientnet_b4", (129, 171)),
    ("timm", "efficientnet_b5", (160, 160)),
    ("timm", "tf_efficientnet_b3", (150, 147)),
    ("timm", "efficientnetv2_s", (160, 160)),
    ("timm", "efficientnet_lite0", (224, 224)),
    ("torchvision", "efficientnet_b0", (224, 224)),
    ("torchvision", "efficientnet_b5", (160, 160)),
    ("torchvision", "efficientnetv2_s", (129, 171)),
]
IMAGES = 8


def peer_of(library: str, name: str, ours: nn.Module) -> nn.Module:
    """The peer's network with our weights."""
    peer = {"timm": nets.timm_net, "torchvision": nets.torchvision_net}[library](name)
    names = key_map(ours.config, library)
    peer.load_state_dict({names[key]: value for key, value in ours.state_dict().items()})
    return peer.eval()


@torch.no_grad()
def measure(library: str, name: str, size: tuple[int, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    ours = calibrate(effnet_fast.create_model(name), size)
    peer = peer_of(library, name, ours)
    x = images(IMAGES, size)
    reference = copy.deepcopy(peer).double()(x.double())
    a, b = ours(x), peer(x)
    assert all(row.plain is None for row in effnet_fast.explain(ours, x[:1])), "ours must have run the ops"
    return {
        "peer": library,
        "name": name,
        "size": list(size),
        "largest_logit": reference.abs().max().item(),
        "ours_from_peer": (a - b).abs().max().item(),
        "ours_from_float64": (a - reference).abs().max().item(),
        "peer_from_float64": (b - reference).abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args().out
    cases = []
    for library, name, size in CASES:
        case = measure(library, name, size)
        cases.append(case)
        print(f"{library:<12} {name:<20} {size}  {case['ours_from_peer']:.1e} of {case['largest_logit']:.2g}", flush=True)
    write({"machine": facts(), "dtype": "float32", "images": IMAGES, "cases": cases}, out)


if __name__ == "__main__":
    main()
