"""Draw where in an image the evidence for a class is: its class activation map (arXiv 1512.04150), which is exact for these
networks: the mean of the map over the image, plus the classifier's bias, is the class's logit. Shown is the part of the image that
the network sees; a file that cannot be decoded is an error before any work, where it is named here.

example: effnet-fast cam efficientnet_b0 --pretrained photo.jpg --out map.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from effnet_fast.cli.model import Loaded, add_model_arguments, load_model, note_if_random
from effnet_fast.cli.options import index
from effnet_fast.cli.table import table
from effnet_fast.inference.cam import class_activation_maps
from effnet_fast.inference.images import check_images, find_images, prepare, read_image, seen_box

if TYPE_CHECKING:
    from PIL import Image

_SIDE = 384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="files, or directories of files; one row of the picture for each"
    )
    parser.add_argument(
        "--class", type=index, dest="of_class", metavar="N", help="class index (default: the most probable of each image)"
    )
    parser.add_argument("--out", default="cam.png", metavar="FILE.png", help="the picture to write (default: cam.png)")


def run(arguments: argparse.Namespace) -> int:
    from effnet_fast.inference.picture import stack

    out = Path(arguments.out)
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise ValueError(f"--out is {out}; a name that ends in .png, in a directory that exists, would do")
    images = find_images(arguments.images)
    check_images(arguments.images)
    loaded = load_model(arguments)
    rows, lines = [], []
    for path in images:
        row, line = _explain(loaded, path, arguments.of_class)
        rows.append(row)
        lines.append(line)
    stack(rows).save(out)
    print(table(("image", "map of", "probability", "predicted", "probability"), lines, "llrlr"))
    print(f"\n{out}: written")
    note_if_random(loaded)
    return 0


def _explain(loaded: Loaded, path: Path, of_class: int | None) -> tuple[Image.Image, tuple[object, ...]]:
    from PIL import Image

    from effnet_fast.inference.picture import beside

    model, preprocessing, classes, trained = loaded
    image = read_image(path, model.config.in_channels)
    x = torch.from_numpy(prepare(image, preprocessing))[None]
    activation = class_activation_maps(model, x, of_class)
    probabilities = activation.logits[0].softmax(0).tolist()
    of, best = int(activation.classes[0]), int(activation.logits[0].argmax())

    def name(number: int) -> str:
        return classes[number] if classes else f"class {number}"

    photo = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=seen_box(image.size, preprocessing))
    title = f"{path.name}: {name(best)}, {100 * probabilities[best]:.1f} %"
    note = f"evidence for {name(of)} ({100 * probabilities[of]:.1f} %); logit {float(activation.logits[0, of]):.2f}"
    warning = "" if trained else "random weights: this means nothing"
    row = beside(photo, np.asarray(activation.maps[0].cpu()), title, note, warning)
    return row, (path, name(of), f"{100 * probabilities[of]:.2f} %", name(best), f"{100 * probabilities[best]:.2f} %")
