"""A laboratory around ResNet-18 on small images. An experiment trains a handful of nets and draws one figure, beside published
values, from a JSON file of all that it measured:

  optimizers  Adam against SGD, with momentum and without
  lr          learning rates of SGD
  momentum    momenta of SGD
  epochs      cross entropy and accuracy over the epochs of one run
  sizes       accuracy against size: ResNet-18, 34, 50 and 101
  compound    ResNet-18 at phi 0, 1 and 2 of the compound scaling law, with a 3x3 and a 7x7 stem

The images are CIFAR-10 from --data (what torchvision calls its root) or a folder named data, else scikit-learn's digits at 32x32.
The folder --out gets EXPERIMENT.png and EXPERIMENT.json. Asked again it does the runs that are missing, and goes on within one that
Ctrl-C or SIGTERM stopped. The accuracies are the last epoch's on the held-out images.

examples: effnet-fast lab epochs
          effnet-fast lab sizes --data cifar --epochs 25 --device cuda
          effnet-fast lab lr --width 0.25 --epochs 5
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from effnet_fast.cli import say
from effnet_fast.cli.model import device_of
from effnet_fast.cli.options import count, index
from effnet_fast.cli.table import si, table
from effnet_fast.training import Stopped
from effnet_fast.training.laboratory import EXPERIMENTS, RECIPE, Size, perform
from effnet_fast.training.pictures import SIDE, load_pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", choices=list(EXPERIMENTS), help="one of those above")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="directory of CIFAR-10 (default: where it is found, else the digits)"
    )
    parser.add_argument("--out", type=Path, default=Path("lab"), metavar="DIR", help="where the files go (default: lab)")
    parser.add_argument("--epochs", type=count, default=RECIPE.epochs, metavar="N", help=f"of each run (default {RECIPE.epochs})")
    parser.add_argument(
        "--batch-size", type=count, default=RECIPE.batch_size, metavar="N", help=f"images of a step (default {RECIPE.batch_size})"
    )
    parser.add_argument(
        "--images", type=count, metavar="N", help="at most so many to learn from, and to be judged by (default: all)"
    )
    parser.add_argument("--depth", type=float, default=1.0, metavar="D", help="multiplier of every net's layers (default 1)")
    parser.add_argument("--width", type=float, default=1.0, metavar="W", help="multiplier of every net's channels (default 1)")
    parser.add_argument("--resolution", type=count, default=SIDE, metavar="PIXELS", help=f"side of the images (default {SIDE})")
    parser.add_argument(
        "--seed", type=index, default=0, metavar="N", help="weights, order and augmentation follow from it (default 0)"
    )
    parser.add_argument("--device", default="auto", help="as in predict (default: auto)")


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments.device)
    recipe = replace(RECIPE, epochs=arguments.epochs, batch_size=arguments.batch_size, seed=arguments.seed)
    size = Size(arguments.depth, arguments.width, arguments.resolution)
    pictures = load_pictures(arguments.data, arguments.images, arguments.seed)
    try:
        result = perform(arguments.experiment, pictures, arguments.out, size=size, recipe=recipe, device=device)
    except Stopped as stopped:
        say("note", f"{stopped}; the same command goes on")
        return 128 + stopped.signal
    print(table(("run", "pixels", "parameters", "MACs", "held out right", "seconds"), map(_cells, result["rows"]), "lrrrrr"))
    published = [(v["net"], v["data"], f"{v['parameters']:.2f} M", f"{v['top1']:g} %", v["source"]) for v in result["published"]]
    print("\n" + table(("published", "on", "parameters", "right", "source"), published, "llrrl"))
    print(f"\n{arguments.out / arguments.experiment}.png and .json: {result['data']}, {recipe.epochs} epochs, seed {recipe.seed}")
    return 0


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    right = "no finite loss" if row["top1"] is None else f"{row['top1']:.2f} %"
    return row["label"], row["resolution"], row["parameters"], si(row["macs"]), right, f"{row['seconds']:.0f}"
