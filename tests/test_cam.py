"""Four forms of one net side by side: each with its own checkpoint, size and map; and one line for every bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_fast.cli import cam, main
from effnet_fast.models import build
from effnet_fast.scaling import B0, CompoundScaling
from effnet_fast.scaling.published import B0_SCALED
from effnet_fast.weights import read, save_checkpoint, write

LABELS = ["d=4", "w=2", "r=2", "d=1.4 w=1.2 r=1.3"]
FILES = ["d4.pth", "w2.pth", "r2.pth", "compound.pth"]
TINY = replace(B0, stages=B0.stages[:2], stem_channels=8, head_channels=16, resolution=32)
RED = (198, 40, 40)


@pytest.fixture
def forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the working directory, with images and a checkpoint of each form of a tiny B0 of two classes."""
    monkeypatch.setattr(cam, "BASE", cam.BASE._replace(base=TINY))
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3)).astype(np.uint8)
    for name in ("photo.png", "other.png"):
        Image.fromarray(pixels).save(name)
    torch.manual_seed(0)
    law = CompoundScaling(base=TINY)
    for form, file in zip(cam.FORMS, FILES, strict=True):
        config = replace(law.scaled(form.depth, form.width, form.resolution).config, num_classes=2)
        save_checkpoint(build(config), file)
        saved = read(file)
        write(file, saved.state_dict, {**saved.metadata, "classes": ["cat", "dog"]})
    return tmp_path


def test_forms_are_the_published_ones() -> None:
    assert [cam._label(form) for form in cam.FORMS] == LABELS and (cam.BASE, *cam.FORMS) == B0_SCALED


def test_four_forms_side_by_side(forms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cam", "efficientnet_b0", "photo.png", "other.png", "--out", "map.png", "--compare", *FILES]) == 0
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if line.startswith(("photo.png", "other.png"))]
    assert err == "" and len(rows) == 8 and all(label in row for label, row in zip(2 * LABELS, rows, strict=True))
    assert all("cat" in row or "dog" in row for row in rows)
    with Image.open("map.png") as picture:
        trained = np.asarray(picture)
    assert trained.shape[1] > 5 * 384 and trained.shape[0] > 2 * 384 and not (trained == RED).all(-1).any()
    tiles = [trained[52 : 52 + 384, 16 + 400 * number :][:, :384] for number in range(5)]
    for number, tile in enumerate(tiles):
        assert not any(np.array_equal(tile, other) for other in tiles[:number])
    # The map of the other class is another one.
    first = rows[0].split()[2] if rows[0].split()[1] == "d=4" else ""
    other = ["dog", "cat"].index(first)
    assert main(["cam", "efficientnet_b0", "photo.png", "--out", "map.png", "--class", str(other), "--compare", *FILES]) == 0
    with Image.open("map.png") as picture:
        assert not np.array_equal(np.asarray(picture)[52 : 52 + 384, 416:800], tiles[1])


def test_untrained_forms_own_up_to_it(forms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cam", "efficientnet_b0", "photo.png", "--class", "7", "--compare"]) == 0
    out, err = capsys.readouterr()
    assert out.count(" class 7 ") == 4 and err.count("random") == 1
    with Image.open("cam.png") as picture:
        assert (np.asarray(picture)[:52] == RED).all(-1).any()


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ("efficientnet_b1 photo.png --compare", "scales efficientnet_b0, MODEL is efficientnet_b1"),
        ("efficientnet_b0 photo.png --compare d4.pth w2.pth", "has 2 checkpoints; 4, of d=4, w=2, r=2, d=1.4 w=1.2 r=1.3, or none"),
        ("efficientnet_b0 photo.png --compare w2.pth d4.pth r2.pth compound.pth", "w2.pth"),
        ("efficientnet_b0 photo.png --compare d4.pth w2.pth r2.pth nowhere.pth", "nowhere.pth"),
        ("efficientnet_b0 photo.png --checkpoint d4.pth --compare", "takes the checkpoints of its forms itself"),
        ("efficientnet_b0 photo.png --pretrained --compare", "without --checkpoint and --pretrained"),
        ("efficientnet_b0 photo.png --ema --compare", "--compare needs some"),
        ("efficientnet_b0 photo.png --class 2 --compare d4.pth w2.pth r2.pth compound.pth", "0 to 1 would do"),
        ("efficientnet_b0 nowhere.png --compare", "nowhere.png does not exist"),
        ("efficientnet_b0 --compare photo.png", "required: IMAGE"),
    ],
)
def test_bad_input_gets_one_line(arguments: str, piece: str, forms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cam", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("effnet-fast: error: ") and err.count("\n") == 1 and piece in err
    assert not Path("cam.png").exists()
