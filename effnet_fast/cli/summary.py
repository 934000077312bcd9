"""Print a network stage by stage: operator, kernel size, stride, expand ratio, squeeze-excite ratio, channels, layers, the height
and width that the stage is given, parameters, multiply-adds (MACs; what papers call FLOPS, half the floating-point operations) and
activation elements (convolution outputs), all per image. Nothing is built: the figures are counted from the config.

example: effnet-fast summary efficientnet_b5
"""

from __future__ import annotations

import argparse
import json

from effnet_fast.cli.options import count
from effnet_fast.cli.stages import cost_json, stage_rows, stage_table
from effnet_fast.cli.table import si


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="such as efficientnet_b0, tf_efficientnet_b3, efficientnetv2_s")
    parser.add_argument("--resolution", type=count, metavar="N", help="image side in pixels (default: the network's own)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")


def run(arguments: argparse.Namespace) -> int:
    from effnet_fast.models import config_of
    from effnet_fast.scaling import Cost

    config = config_of(arguments.name)
    cost = Cost.of(config, arguments.resolution)
    if arguments.json:
        print(json.dumps(cost_json(config, cost)))
        return 0
    side = arguments.resolution or config.resolution
    print(stage_table(stage_rows(config, cost), cost))
    print(
        f"\n{config.name} at {side}x{side}: {cost.parameters:,} parameters, {si(cost.macs, 'MACs')}, "
        f"{si(cost.activations)} activations per image; weights {si(cost.weight_bytes(), 'B')} in fp32"
    )
    return 0
