"""Draw where in an image the evidence for a class is: its class activation map (arXiv 1512.04150), which is exact for these
networks: the mean of the map over the image, plus the classifier's bias, is the class's logit. Shown is the part of the image that
the network sees; a file that cannot be decoded is an error before any work, where it is named here.

With --compare the network is EfficientNet-B0 in four forms, each about four times as much work: by depth, by width, by resolution
alone, and by all three (the paper's table 7 and figure 7), side by side on the same images. Each map has a scale of its own.

examples: effnet-fast cam efficientnet_b0 --pretrained photo.jpg --out map.png
          effnet-fast cam efficientnet_b0 photo.jpg --compare d4.pth w2.pth r2.pth compound.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from effnet_fast.cli.model import Loaded, add_model_arguments, device_of, load_into, load_model, note_if_random, ready
from effnet_fast.cli.options import index
from effnet_fast.cli.table import si, table
from effnet_fast.inference.cam import class_activation_maps
from effnet_fast.inference.images import check_images, find_images, prepare, read_image, seen_box
from effnet_fast.models import build
from effnet_fast.scaling import CompoundScaling, Cost
from effnet_fast.scaling.published import B0_SCALED, PublishedNet

if TYPE_CHECKING:
    from PIL import Image

_SIDE = 384
_RANDOM = "random weights: this means nothing"
BASE, *FORMS = B0_SCALED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="files, or directories of files; one row of the picture for each"
    )
    parser.add_argument(
        "--class", type=index, dest="of_class", metavar="N", help="class index (default: the most probable of each image)"
    )
    parser.add_argument("--out", default="cam.png", metavar="FILE.png", help="the picture to write (default: cam.png)")
    parser.add_argument(
        "--compare",
        nargs="*",
        metavar="FILE",
        help=f"efficientnet_b0 as {', '.join(map(_label, FORMS))}, with a checkpoint of each, or untrained",
    )


def run(arguments: argparse.Namespace) -> int:
    from effnet_fast.inference.picture import stack

    out = Path(arguments.out)
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise ValueError(f"--out is {out}; a name that ends in .png, in a directory that exists, would do")
    images = find_images(arguments.images)
    check_images(arguments.images)
    compare = arguments.compare is not None
    nets = _forms(arguments) if compare else {"": load_model(arguments)}
    rows, lines = [], []
    for path in images:
        seen = {label: _explain(loaded, path, arguments.of_class) for label, loaded in nets.items()}
        rows.append(_side_by_side(path, nets, seen) if compare else _alone(path, nets[""], seen[""]))
        lines += [(path, *([label] if compare else []), *_cells(one)) for label, one in seen.items()]
    stack(rows).save(out)
    header = ("image", *(["form"] if compare else []), "map of", "probability", "predicted", "probability")
    print(table(header, lines, "l" * compare + "llrlr"))
    print(f"\n{out}: written")
    loaded = next(iter(nets.values()))  # all have weights, or none has
    note_if_random(loaded, *([f"--compare with {len(FORMS)} files"] if compare else []))
    return 0


def _label(form: PublishedNet) -> str:
    return form.name.removeprefix(f"{BASE.name} ")


def _forms(arguments: argparse.Namespace) -> dict[str, Loaded]:
    """B0 scaled four ways, by what was done to it; their weights are the files', or random."""
    law, files = CompoundScaling(base=BASE.base), arguments.compare
    if arguments.model != law.base.name:
        raise ValueError(f"--compare scales {law.base.name}, MODEL is {arguments.model}; {law.base.name} would do")
    if arguments.checkpoint or arguments.pretrained:
        raise ValueError("--compare takes the checkpoints of its forms itself; without --checkpoint and --pretrained it would do")
    if files and len(files) != len(FORMS):
        labels = ", ".join(map(_label, FORMS))
        raise ValueError(f"--compare has {len(files)} checkpoints; {len(FORMS)}, of {labels}, or none would do")
    if arguments.ema and not files:
        raise ValueError("--ema chooses among the weights of checkpoints; --compare needs some")
    device, nets = device_of(arguments.device), {}
    for form, file in zip(FORMS, files or [None] * len(FORMS), strict=True):
        config = law.scaled(form.depth, form.width, form.resolution).config
        model, classes = load_into(config, file, arguments.ema) if file else (build(config), None)
        nets[_label(form)] = ready(model, classes, bool(file), device, arguments.classes)
    return nets


class _Explained(NamedTuple):
    """What a network saw of an image, as it is shown; the map of a class, and (name, probability) of that class and of the best."""

    photo: Image.Image
    evidence: np.ndarray
    logit: float
    of: tuple[str, float]
    best: tuple[str, float]


def _explain(loaded: Loaded, path: Path, of_class: int | None) -> _Explained:
    from PIL import Image

    model, preprocessing, classes, _ = loaded
    image = read_image(path, model.config.in_channels)
    x = torch.from_numpy(prepare(image, preprocessing))[None]
    activation = class_activation_maps(model, x, of_class)
    probabilities = activation.logits[0].softmax(0).tolist()

    def named(number: int) -> tuple[str, float]:
        return (classes[number] if classes else f"class {number}"), probabilities[number]

    of = int(activation.classes[0])
    photo = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=seen_box(image.size, preprocessing))
    best = int(activation.logits[0].argmax())
    return _Explained(photo, np.asarray(activation.maps[0].cpu()), float(activation.logits[0, of]), named(of), named(best))


def _alone(path: Path, loaded: Loaded, seen: _Explained) -> Image.Image:
    from effnet_fast.inference.picture import beside

    title = f"{path.name}: {_percent(seen.best, 1)}"
    note = f"evidence for {seen.of[0]} ({100 * seen.of[1]:.1f} %); logit {seen.logit:.2f}"
    return beside(seen.photo, seen.evidence, title, note, "" if loaded.trained else _RANDOM)


def _side_by_side(path: Path, nets: dict[str, Loaded], seen: dict[str, _Explained]) -> Image.Image:
    from effnet_fast.inference.picture import compared, overlay

    tiles = []
    for label, one in seen.items():
        config, limit = nets[label].model.config, float(one.evidence.max())
        told = f"{config.resolution} pixels, {si(Cost.of(config).macs, 'MACs')}"
        lines = [label, told, f"predicts {_percent(one.best, 1)}", f"map of {one.of[0]}, up to {max(limit, 0):.2g}"]
        tiles.append((overlay(one.photo, one.evidence, limit), lines))
    photo = next(iter(seen.values())).photo
    trained = next(iter(nets.values())).trained
    return compared(photo, tiles, path.name, "" if trained else _RANDOM)


def _percent(told: tuple[str, float], digits: int) -> str:
    return f"{told[0]}, {100 * told[1]:.{digits}f} %"


def _cells(seen: _Explained) -> tuple[str, ...]:
    return tuple(cell for name, share in (seen.of, seen.best) for cell in (name, f"{100 * share:.2f} %"))
