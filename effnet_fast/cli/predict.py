"""Classify images, prepared as the weights want them: resize, crop, interpolation, mean and deviation travel with the weights.

Directories are searched for images, recursively and in sorted order. A path that does not exist, a directory without images, or a
file named here that cannot be decoded is an error before any work; a file found in a directory that cannot be decoded is named on
stderr and left out, and the exit code is 2 when the others are done (under torchrun 0: it ends all ranks with the first to fail).

examples: effnet-fast predict efficientnet_b0 --pretrained photo.jpg
          effnet-fast predict efficientnet_b0 --checkpoint mine.safetensors --classes names.txt --json photos/
          effnet-fast predict demo/digits.pth demo/held_out
          torchrun --nproc-per-node 4 -m effnet_fast predict efficientnet_b0 --pretrained --json photos/ --shard
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from effnet_fast.cli import BAD_INPUT, print_error
from effnet_fast.cli.model import add_model_arguments, load_model, note_if_random
from effnet_fast.cli.options import count, shard
from effnet_fast.cli.table import table
from effnet_fast.inference.images import check_images, find_images
from effnet_fast.inference.predict import Prediction, predict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("images", metavar="IMAGE|DIR", nargs="+", help="files, or directories of files")
    parser.add_argument(
        "--top", type=count, default=5, metavar="K", help="labels for each image (default 5; all where there are fewer)"
    )
    parser.add_argument("--batch", type=count, default=16, metavar="N", help="images at a time (default 16)")
    parser.add_argument(
        "--shard",
        type=shard,
        nargs="?",
        const="",
        default=(0, 1),
        metavar="I/N",
        help="every N-th of the images, from number I on, the first being 0; --shard alone, at the end: by torchrun's ranks",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each image, as soon as it is known")


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    share, shares = arguments.shard
    images = find_images(arguments.images)[share::shares]
    check_images([path for path in map(Path, arguments.images) if path in images])  # those found in directories are not named
    loaded = load_model(arguments)
    model, preprocessing, classes, _ = loaded
    damaged: list[Exception] = []
    predictions = predict(
        model,
        images,
        preprocessing,
        top=arguments.top,
        batch=arguments.batch,
        channels=model.config.in_channels,
        classes=classes,
        unreadable=damaged.append,
    )
    shown, any_known = [], False
    # disable=None: only where stderr is a terminal, and of several shares the first's; delay: only where it takes longer than that.
    bar = {"unit": "image", "delay": 2, "disable": True if share else None, "leave": False}
    for prediction in tqdm(predictions, total=len(images), **bar):
        any_known = True
        if arguments.json:
            print(json.dumps(_as_dict(prediction)), flush=True)
        else:
            shown.append(prediction)
    if shown:
        print(_table(shown))
    if any_known:
        note_if_random(loaded)
    for error in damaged:
        print_error(error)
    return BAD_INPUT if damaged and "TORCHELASTIC_RUN_ID" not in os.environ else 0


def _as_dict(prediction: Prediction) -> dict:
    return {"image": str(prediction.path), "labels": [asdict(label) for label in prediction.labels]}


def _table(predictions: list[Prediction]) -> str:
    rows = []
    for path, labels in predictions:
        for rank, label in enumerate(labels):
            rows.append(("" if rank else str(path), str(label.index), label.name or "", f"{100 * label.probability:.2f} %"))
    named = any(row[2] for row in rows)
    keep = (0, 1, 2, 3) if named else (0, 1, 3)
    header = ("image", "class", "name", "probability")
    return table([header[i] for i in keep], [[row[i] for i in keep] for row in rows], "".join("lrlr"[i] for i in keep))
