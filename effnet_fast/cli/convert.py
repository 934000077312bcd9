"""Rewrite a checkpoint in another layout: the names of timm (this package's own), of torchvision, or of lukemelas's
efficientnet_pytorch. SOURCE's layout is recognised by its keys. The suffix of TARGET decides the file: .safetensors, or .pth, .pt,
.bin by torch.save, a plain state dict. TARGET is written whole or not at all, and not where its library would run the weights with
another padding or batch norm eps than theirs, and so answer wrongly.

example: effnet-fast convert efficientnet_b0_rwightman-7f5810bc.pth b0.safetensors --layout timm
"""

from __future__ import annotations

import argparse
import warnings

from effnet_fast.cli import say
from effnet_fast.weights import LAYOUTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint file")
    parser.add_argument("target", metavar="TARGET", help="the file to write")
    parser.add_argument("--layout", required=True, choices=LAYOUTS, help="of TARGET")
    parser.add_argument("--model", metavar="NAME", help="the network, where the tensors fit several")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    parser.add_argument("--force", action="store_true", help="write TARGET even where its library would answer wrongly, and warn")


def run(arguments: argparse.Namespace) -> int:
    from effnet_fast.interop import convert

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = convert(
            arguments.source, arguments.target, arguments.layout, arguments.model, ema=arguments.ema, force=arguments.force
        )
    told = f"{config.padding} padding, batch norm eps {config.bn_eps:g}"
    print(f"{arguments.target}: {config.name} ({told}) in the layout of {arguments.layout}")
    for warning in caught:
        say("warning", str(warning.message))
    return 0
