"""Accuracy on the held-out images of a data set, prepared as the weights want them.

DATA is a directory with val (or validation, test) of one directory of images for each class, or that directory itself; or, with
--dataset, what torchvision reads. Where the weights carry class names, the data set must have the same, else as many classes.

examples: effnet-fast eval pets-b0/best.pth pets
          effnet-fast eval efficientnet_b0 imagenet --pretrained --json
          effnet-fast eval flowers/best.pth flowers --dataset flowers102 --split test
          torchrun --nproc-per-node 8 -m effnet_fast eval efficientnet_b5 imagenet --pretrained
"""

from __future__ import annotations

import argparse
import json

from effnet_fast.cli.model import add_model_arguments, device_of, load_model, note_if_random
from effnet_fast.cli.options import LOADERS, count, index
from effnet_fast.cli.table import table
from effnet_fast.inference import optimize_for_inference
from effnet_fast.training import Batches, distributed, evaluate
from effnet_fast.training.data import DATASETS, Images, check_classes, held_out_transform, open_dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("data", metavar="DATA", help="directory of the data set")
    parser.add_argument("--dataset", choices=DATASETS, default="folder", help="what DATA is (default: folder)")
    parser.add_argument("--split", metavar="NAME", help="of DATA, as test (default: val, validation or test; flowers102: val)")
    parser.add_argument("--batch-size", type=count, default=64, metavar="N", help="images at a time (default 64)")
    parser.add_argument(
        "--workers", type=index, default=LOADERS, metavar="N", help=f"processes that load images (default {LOADERS})"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    device = device_of(arguments.device)
    with distributed.process_group(device):
        images = open_dataset(arguments.data, kind=arguments.dataset, training=False, split=arguments.split)
        loaded = load_model(arguments)
        model, preprocessing, classes, _ = loaded
        if classes is not None:
            check_classes(classes[: len(images.classes)], images.classes)
        elif len(images.classes) != model.num_classes:
            raise ValueError(f"{arguments.data} has {len(images.classes)} classes; {model.num_classes}, as the model, would do")
        prepared = Images(images, held_out_transform(preprocessing))
        batches = Batches(prepared, arguments.batch_size, training=False, workers=arguments.workers)
        serving = optimize_for_inference(model, preprocessing=preprocessing)
        first = distributed.rank() == 0
        bar = {"unit": "batch", "delay": 2, "disable": None if first else True, "leave": False}
        scores = evaluate(serving, tqdm(batches.of_epoch(0), total=len(batches), **bar), device)
    if not first:
        return 0
    if arguments.json:
        print(json.dumps(scores._asdict()))
    else:
        shares = [("top-1", scores.top1), ("top-5", scores.top5)]
        told = [(name, f"{100 * share:.2f} %") for name, share in shares if share is not None]
        print(table(("score", "value"), [*told, ("loss", f"{scores.loss:.4f}"), ("images", scores.images)], "lr"))
    note_if_random(loaded)
    return 0
