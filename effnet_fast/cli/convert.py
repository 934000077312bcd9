"""Rewrite a checkpoint in another layout: the names of timm (this package's own), of torchvision, or of lukemelas's
efficientnet_pytorch. SOURCE's layout is recognised by its keys. The suffix of TARGET decides the file: .safetensors, or .pth, .pt,
.bin by torch.save. TARGET is written whole or not at all.

example: effnet-fast convert efficientnet_b0_rwightman-7f5810bc.pth b0.safetensors --layout timm
"""

from __future__ import annotations

import argparse

from effnet_fast.weights import LAYOUTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint file")
    parser.add_argument("target", metavar="TARGET", help="the file to write")
    parser.add_argument("--layout", required=True, choices=LAYOUTS, help="of TARGET")
    parser.add_argument("--model", metavar="NAME", help="the network, where the tensors fit several")


def run(arguments: argparse.Namespace) -> int:
    from effnet_fast.interop import convert

    config = convert(arguments.source, arguments.target, arguments.layout, arguments.model)
    print(f"{arguments.target}: {config.name} in the layout of {arguments.layout}")
    return 0
