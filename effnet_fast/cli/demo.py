"""The whole way on real input, offline, on a CPU, in about two minutes: a small EfficientNet from the scaling law learns
scikit-learn's 1797 scanned digits (8x8 pixels), is saved, loaded again and judged on digits it never saw, from image files, by the
code of ``predict``. A picture shows its answers and where in each digit it found the evidence.

example: effnet-fast demo --out digits
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from effnet_fast.benchmark.timing import interleaved
from effnet_fast.cli.digits import BATCH, CLASSES, CONFIG, DEPTH, RECIPE, SIDE, WIDTH, train_model
from effnet_fast.cli.model import load_saved
from effnet_fast.cli.options import count
from effnet_fast.cli.table import si, table
from effnet_fast.inference.cam import class_activation_maps
from effnet_fast.inference.images import prepare, read_image
from effnet_fast.inference.predict import Prediction, predict
from effnet_fast.models import Classifier
from effnet_fast.nn import explain
from effnet_fast.ops import backend
from effnet_fast.scaling import Cost
from effnet_fast.training.pictures import load_digits
from effnet_fast.weights import Preprocessing, preprocessing_of, save_checkpoint

if TYPE_CHECKING:
    from PIL import Image

_TILES, _COLUMNS, _TILE = 24, 6, 96
REQUIRED = 0.97


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where the files go (default: demo)")
    parser.add_argument(
        "--epochs",
        type=count,
        metavar="N",
        help=f"passes over the training digits (default {RECIPE.epochs}, where less than {REQUIRED:.0%} right fails: exit code 1)",
    )


def run(arguments: argparse.Namespace) -> int:
    from PIL import Image

    started, out = time.perf_counter(), arguments.out
    (out / "held_out").mkdir(parents=True, exist_ok=True)
    scans, digits, train, held_out = load_digits()
    seen = scans[train] / 255
    preprocessing = Preprocessing(SIDE, SIDE, mean=(float(seen.mean()),), std=(float(seen.std()),))
    x = np.stack([prepare(Image.fromarray(scan), preprocessing) for scan in scans[train]])
    trained = train_model(torch.from_numpy(x), torch.from_numpy(digits[train]), arguments.epochs or RECIPE.epochs)

    checkpoint, picture = out / "digits.pth", out / "digits.png"
    save_checkpoint(trained, checkpoint, classes=CLASSES, preprocessing=preprocessing)
    files = [out / "held_out" / f"{digits[i]}_{i:04}.png" for i in held_out]
    for file, scan in zip(files, scans[held_out], strict=True):
        Image.fromarray(scan).save(file)

    model, classes = load_saved(checkpoint)
    model.eval()
    preprocessing = preprocessing_of(model)
    predictions = list(predict(model, files, preprocessing, top=1, batch=BATCH, channels=1, classes=classes))
    wrong = [prediction for prediction in predictions if not _is_right(prediction)]
    accuracy = f"{100 * (1 - len(wrong) / len(files)):.2f} %"
    batch = _prepared(files[:BATCH], preprocessing)
    agreement, times = _fused_against_plain(model, batch), _times(model, batch)
    _picture(model, preprocessing, predictions, f"{accuracy} of {len(files)} held-out digits are right").save(picture)

    cost = Cost.of(CONFIG)
    rows = [
        ("network", f"depth x{DEPTH:g}, width x{WIDTH:g} of B0, at {SIDE}x{SIDE} pixels"),
        ("parameters", f"{cost.parameters:,}"),
        ("MACs", f"{si(cost.macs)} per image"),
        ("accuracy", f"{accuracy} ({len(wrong)} of {len(files)} held-out digits wrong)"),
        ("fused and plain", agreement),
        ("training", _trained_fused(model, batch)),
        ("forward", times),
        ("time", f"{time.perf_counter() - started:.0f} s on {torch.get_num_threads()} threads"),
        ("checkpoint", checkpoint),
        ("held-out images", f"{out / 'held_out'} (effnet-fast predict {checkpoint} {out / 'held_out'})"),
        ("picture", picture),
    ]
    print(table(("demo", "result"), rows, "ll"))
    if arguments.epochs is None and len(wrong) > (1 - REQUIRED) * len(files):
        print(f"effnet-fast: the demo failed: {accuracy} of the held-out digits are right, {REQUIRED:.0%} must be", file=sys.stderr)
        return 1
    return 0


def _truth(prediction: Prediction) -> str:
    return prediction.path.name.partition("_")[0]


def _is_right(prediction: Prediction) -> bool:
    return prediction.labels[0].name == _truth(prediction)


def _prepared(files: list[Path], preprocessing: Preprocessing) -> Tensor:
    return torch.from_numpy(np.stack([prepare(read_image(file, 1), preprocessing) for file in files]))


def _fused_against_plain(model: Classifier, x: Tensor) -> str:
    """Compare both forms of the forward with float64: fused may be off twice as far as plain; RuntimeError beyond."""
    with torch.no_grad():
        fused = model(x)
        with backend("reference"):
            plain, exact = model(x), copy.deepcopy(model).double()(x.double())
    off, allowed = (fused - exact).abs().max(), 2 * (plain - exact).abs().max() + exact.abs().max() * torch.finfo(torch.float32).eps
    if off > allowed:
        raise RuntimeError(f"the fused forward is {off:.2g} off, the plain one allows {allowed:.2g}")
    blocks = explain(model, x[:1])
    fused_blocks = sum(block.plain is None for block in blocks)
    return f"logits differ by at most {(fused - plain).abs().max():.1g} ({fused_blocks} of {len(blocks)} blocks fused)"


def _trained_fused(model: Classifier, x: Tensor) -> str:
    """How much of the network trains by the fused kernels, forward and backward, at the demo's batch size."""
    rows = explain(copy.deepcopy(model).train(), x, grad=True)
    plain = [row.name for row in rows if row.plain is not None]
    return f"{len(rows) - len(plain)} of {len(rows)} blocks fused" + (f" (plain PyTorch: {', '.join(plain)})" if plain else "")


def _times(model: Classifier, x: Tensor) -> str:
    """Time the forward on the best backends and on the reference alone."""

    def fused() -> None:
        model(x)

    def reference() -> None:
        with backend("reference"):
            model(x)

    with torch.no_grad():
        seconds = interleaved({"fused": fused, "reference": reference}, rounds=15)
    medians = [f"{name} {1e3 * statistics.median(times):.1f} ms" for name, times in seconds.items()]
    return f"{' and '.join(medians)} for {len(x)} images (medians, in turn)"


def _picture(model: Classifier, preprocessing: Preprocessing, predictions: list[Prediction], title: str) -> Image.Image:
    """Held-out digits beside their maps, up to a third of them wrong ones."""
    from PIL import Image

    from effnet_fast.inference.picture import grid, overlay

    wrong = [prediction for prediction in predictions if not _is_right(prediction)][: _TILES // 3]
    right = sorted(filter(_is_right, predictions), key=_truth)
    shown = [*wrong, *right[:: max(1, len(right) // (_TILES - len(wrong)))]][:_TILES]
    activation = class_activation_maps(model, _prepared([prediction.path for prediction in shown], preprocessing))
    tiles = []
    for prediction, evidence in zip(shown, activation.maps.numpy(), strict=True):
        scan = read_image(prediction.path).resize((_TILE, _TILE), Image.Resampling.NEAREST)
        tile = Image.new("RGB", (2 * _TILE + 4, _TILE), "white")
        tile.paste(scan, (0, 0))
        tile.paste(overlay(scan, evidence, float(evidence.max())), (_TILE + 4, 0))
        label, right_answer = prediction.labels[0], _is_right(prediction)
        caption = f"{label.name}, {100 * label.probability:.0f} %" + ("" if right_answer else f" (is {_truth(prediction)})")
        tiles.append((tile, caption, right_answer))
    note = "left the scan, right where the network found evidence for its answer (class activation map); framed: wrong"
    return grid(tiles, _COLUMNS, title, note)
