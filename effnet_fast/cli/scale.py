"""The network at a point of the compound scaling law (arXiv 1905.11946, eq. 3: depth alpha^phi, width beta^phi, resolution
gamma^phi), at multipliers of B0's depth, width and resolution, or the largest within a budget of multiply-adds or of memory.

examples: effnet-fast scale --phi 3
          effnet-fast scale --depth 0.5 --width 0.5 --resolution 128px
          effnet-fast scale --target-macs 1.5G
          effnet-fast scale --target-memory 8GB --training --batch 32 --dtype bf16
"""

from __future__ import annotations

import argparse
import json

from effnet_fast.cli.options import amount, count, memory, resolution
from effnet_fast.cli.stages import cost_json, stage_rows, stage_table
from effnet_fast.cli.table import si
from effnet_fast.scaling import CompoundScaling, Cost, ScaledNet
from effnet_fast.scaling.cost import ITEM_BYTES

_COEFFICIENTS = ("alpha", "beta", "gamma")
_MULTIPLIERS = ("depth", "width", "resolution")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phi", type=float, metavar="P", help="the compound coefficient, any number >= 0; 0 is B0")
    parser.add_argument("--depth", type=float, metavar="D", help="multiplier of the layers per stage, > 0 (default 1)")
    parser.add_argument("--width", type=float, metavar="W", help="multiplier of the channels, > 0 (default 1)")
    parser.add_argument(
        "--resolution", type=resolution, metavar="R", help="multiplier of the image side, or its pixels: 260px (default 1)"
    )
    parser.add_argument(
        "--target-macs", type=amount, metavar="M", help="multiply-adds per image not to exceed, such as 390M or 1.5G"
    )
    parser.add_argument("--target-memory", type=memory, metavar="B", help="memory not to exceed, such as 500MB or 2GiB")
    for name in _COEFFICIENTS:
        parser.add_argument(f"--{name}", type=float, metavar="X", help="of the law, >= 1 (default: the paper's)")
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="images that the memory is counted for (default 1)")
    parser.add_argument("--dtype", choices=list(ITEM_BYTES), default="fp32", help="that the memory is counted for (default fp32)")
    parser.add_argument("--training", action="store_true", help="--target-memory is for training, with Adam, not for inference")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")


def run(arguments: argparse.Namespace) -> int:
    law = CompoundScaling(**_given(arguments, _COEFFICIENTS))
    net = _net(law, arguments)
    config, cost = net.config, Cost.of(net.config)
    inference = cost.inference_memory(arguments.dtype, arguments.batch)
    training = cost.training_memory(arguments.dtype, arguments.batch)
    if arguments.json:
        print(
            json.dumps(
                {
                    "phi": net.phi,
                    **{name: getattr(net, name) for name in _MULTIPLIERS[:2]},
                    "resolution_multiplier": net.resolution,
                    **{name: getattr(law, name) for name in _COEFFICIENTS},
                    "constraint": law.constraint.value,
                    "nearest": net.nearest and net.nearest.name,
                    "inference_memory": {**inference._asdict(), "total": inference.total},
                    "training_memory": {**training._asdict(), "total": training.total},
                    "dtype": arguments.dtype,
                    "batch": arguments.batch,
                    **cost_json(config, cost),
                }
            )
        )
        return 0
    coefficients = ", ".join(f"{name} {getattr(law, name):g}" for name in _COEFFICIENTS)
    phi = "" if net.phi is None else f"phi {net.phi:.6g}: "
    print(f"{phi}depth x{net.depth:.4g}, width x{net.width:.4g}, resolution x{net.resolution:.4g} = {config.resolution} pixels")
    if net.phi is not None:
        value, distance = law.constraint
        print(f"{coefficients}: alpha * beta^2 * gamma^2 = {value:.4g}, {distance:.2g} from the 2 that would double MACs each phi")
    print(f"\n{stage_table(stage_rows(config, cost), cost)}\n")
    print(f"parameters   {cost.parameters:,}")
    print(f"MACs         {si(cost.macs)} per image")
    print(f"activations  {si(cost.activations)} elements per image")
    print(f"regularised  dropout {net.dropout:.3g}, stochastic depth {net.drop_path:.3g}")
    print(f"memory       {si(inference.total, 'B')} for inference, {si(training.total, 'B')} for training with Adam;", end=" ")
    print(f"{arguments.dtype}, batch {arguments.batch}")
    if net.nearest:
        published, apart = net.nearest
        distance_text = "the same" if apart < 1e-9 else f"log distance {apart:.2g}"
        print(f"nearest      {published} of the published networks ({distance_text})")
    return 0


def _net(law: CompoundScaling, arguments: argparse.Namespace) -> ScaledNet:
    multipliers = _given(arguments, _MULTIPLIERS)
    ways = {
        "--phi": arguments.phi is not None,
        "--depth/--width/--resolution": bool(multipliers),
        "--target-macs": arguments.target_macs is not None,
        "--target-memory": arguments.target_memory is not None,
    }
    asked = [way for way, given in ways.items() if given]
    if len(asked) != 1:
        raise ValueError(f"{' and '.join(asked) or 'nothing'} given; exactly one of {', '.join(ways)} would do")
    if arguments.training and not ways["--target-memory"]:
        raise ValueError("--training says what --target-memory counts; it needs that option")
    if multipliers:
        if _given(arguments, _COEFFICIENTS):
            raise ValueError("--alpha, --beta and --gamma change nothing with explicit multipliers; --phi would use them")
        value, unit = multipliers.pop("resolution", (1.0, "x"))
        return law.scaled(**multipliers, resolution=value / law.base.resolution if unit == "px" else value)
    if arguments.phi is not None:
        return law.at(arguments.phi)
    settings = {"dtype": arguments.dtype, "batch": arguments.batch, "training": arguments.training}
    return law.at(law.phi_for(target_macs=arguments.target_macs, target_memory=arguments.target_memory, **settings))


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
