"""The laboratory: its experiments do what they say, keep what is done, and draw it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folders import cifar10
from PIL import Image

from effnet_fast.cli import lab, main
from effnet_fast.models import build
from effnet_fast.scaling import Cost
from effnet_fast.training import laboratory
from effnet_fast.training.laboratory import CIFAR10, EXPERIMENTS, IMAGENET, RECIPE, Run, Size, perform
from effnet_fast.training.optimizer import build_optimizer
from effnet_fast.training.pictures import Pictures, load_pictures

TINY = "--epochs 1 --width 0.125 --resolution 8 --images 64 --batch-size 32"
LABELS = {
    "optimizers": ["SGD with momentum", "SGD", "Adam"],
    "lr": [f"lr {rate}" for rate in ("0.001", "0.01", "0.03", "0.1", "0.3", "1")],
    "momentum": [f"momentum {share}" for share in ("0", "0.5", "0.8", "0.9", "0.95", "0.99")],
    "epochs": ["ResNet-18"],
    "sizes": ["resnet18", "resnet34", "resnet50", "resnet101"],
    "compound": [f"{stem} stem, phi {phi}" for stem in ("3x3", "7x7") for phi in (0, 1, 2)],
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_gives_a_figure_and_its_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["lab", name, *TINY.split(), "--out", "here", "--seed", "3"]) == 0
    told = capsys.readouterr().out
    result = json.loads(Path("here", f"{name}.json").read_text())
    assert result["data"] == "scikit-learn's digits (64 images, 64 held out)" and result["data"] in told and result["seed"] == 3
    assert [row["label"] for row in result["rows"]] == LABELS[name]
    for row in result["rows"]:
        assert row["device"] == "cpu" and row["machine"]["date"] and row["machine"]["versions"]["torch"]
        assert f"{row['parameters']:,}" in told and (row["top1"] is None or f"{row['top1']:.2f} %" in told)
        if row["top1"] is not None:
            assert [entry["epoch"] for entry in row["history"]] == [1] and row["top1"] == 100 * row["history"][-1]["top1"]
    sources = {value["source"] for value in result["published"]}
    assert sources and all(source in told for source in sources)
    with Image.open(Path("here", f"{name}.png")) as figure:
        pixels = np.asarray(figure.convert("L"))
    assert pixels.shape[0] > 400 and 0.005 < (pixels < 200).mean() < 0.3
    assert sorted(os.listdir("here")) == [f"{name}.json", f"{name}.png"]


def test_what_an_experiment_varies_is_all_that_differs() -> None:
    size = Size(width=0.25)
    for name in ("optimizers", "lr", "momentum", "epochs"):
        runs = EXPERIMENTS[name].runs(size, RECIPE)
        assert {run.config for run in runs} == {runs[0].config} and runs[0].config.num_classes == 10
        varied = {"lr": {"lr"}, "momentum": {"momentum"}, "optimizers": {"opt", "lr", "weight_decay", "momentum"}}.get(name, set())
        for run in runs:
            kept = {key: getattr(RECIPE, key) for key in varied}
            assert replace(run.recipe, **kept) == RECIPE
    adam = EXPERIMENTS["optimizers"].runs(size, RECIPE)[-1]
    optimizer = build_optimizer(torch.nn.Linear(2, 2), adam.recipe)
    assert isinstance(optimizer, torch.optim.AdamW) and {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert RECIPE.epochs == 25 and RECIPE.smoothing == 0


def test_the_nets_are_the_published_ones() -> None:
    sizes = EXPERIMENTS["sizes"].runs(Size(), RECIPE)
    millions = {run.label: round(Cost.of(run.config).parameters / 1e6, 2) for run in sizes}
    counted = {data: {value.net: round(value.parameters, 2) for value in data} for data in (CIFAR10, IMAGENET)}
    assert counted[CIFAR10].items() <= millions.items() and counted[CIFAR10]["resnet18"] == 11.17
    assert counted[IMAGENET] == {"resnet18": 11.69, "resnet34": 21.8, "resnet50": 25.56, "resnet101": 44.55}
    assert {run.config.resolution for run in sizes} == {32}
    compound = EXPERIMENTS["compound"].runs(Size(), RECIPE)
    assert [run.config.resolution for run in compound] == [32, 37, 42] * 2
    assert [(run.config.stem_kernel, run.config.stem_pool) for run in compound] == [(3, False)] * 3 + [(7, True)] * 3
    assert round(Cost.of(compound[3].config).parameters / 1e6, 2) == 11.18
    assert [value.top1 for value in IMAGENET] == [69.758, 73.314, 76.130, 77.374]


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pictures:
    monkeypatch.chdir(tmp_path)
    return load_pictures(images=64)


QUICK = replace(RECIPE, epochs=1, batch_size=32)
SMALL = Size(width=0.125, resolution=8)


def test_finished_runs_are_not_done_again(digits: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perform("optimizers", digits, tmp_path / "whole", size=SMALL, recipe=QUICK)
    built: list[str] = []

    def stopping(config):
        built.append(config.name)
        if len(built) == 3:
            raise KeyboardInterrupt
        return build(config)

    monkeypatch.setattr(laboratory, "build", stopping)
    with pytest.raises(KeyboardInterrupt):
        perform("optimizers", digits, tmp_path / "parts", size=SMALL, recipe=QUICK)
    stopped = json.loads((tmp_path / "parts" / "optimizers.json").read_text())
    assert [row["label"] for row in stopped["rows"]] == LABELS["optimizers"][:2]
    monkeypatch.setattr(laboratory, "facts", lambda: {"cpu": "another"})
    resumed = perform("optimizers", digits, tmp_path / "parts", size=SMALL, recipe=QUICK)
    # Each row says where it was made: not where the last was.
    assert [row["machine"] == {"cpu": "another"} for row in resumed["rows"]] == [False, False, True] and "machine" not in resumed
    assert len(built) == 4 and resumed["rows"][:2] == stopped["rows"]
    for a, b in zip(whole["rows"], resumed["rows"], strict=True):
        assert (a["label"], a["top1"], a["loss"]) == (b["label"], b["top1"], b["loss"])
    # Nothing is left to do; the figure comes back.
    (tmp_path / "parts" / "optimizers.png").unlink()
    assert perform("optimizers", digits, tmp_path / "parts", size=SMALL, recipe=QUICK) == resumed and len(built) == 4
    assert (tmp_path / "parts" / "optimizers.png").exists()
    with pytest.raises(ValueError, match="optimizers.json is of recipe.seed 0, not 1; the same, or another folder, would do"):
        perform("optimizers", digits, tmp_path / "parts", size=SMALL, recipe=replace(QUICK, seed=1))
    stored = tmp_path / "parts" / "optimizers.json"
    # A setting of the recipe, or the size, that is newer than the file had its default.
    older = json.loads(stored.read_text())
    del older["recipe"]["cuda_graph"], older["size"]["depth"]
    stored.write_text(json.dumps(older))
    assert (
        perform("optimizers", digits, tmp_path / "parts", size=SMALL, recipe=QUICK)["rows"] == resumed["rows"] and len(built) == 4
    )
    for damaged, told in (
        ([], r"rows is None; a list"),
        ({**resumed, "rows": 5}, "rows is 5; a list"),
        ({**resumed, "rows": [{}]}, r"row 0 is \{\}; an object with label, series"),
        ({**resumed, "rows": [7]}, "row 0 is 7; an object with label"),
    ):
        stored.write_text(json.dumps(damaged))
        with pytest.raises(
            ValueError, match=rf"optimizers.json is no result of an experiment: {told}.* or another folder, would do"
        ):
            perform("optimizers", digits, tmp_path / "parts", size=SMALL, recipe=QUICK)
    with pytest.raises(ValueError, match="experiment is 'adam'; one of optimizers, lr"):
        perform("adam", digits, tmp_path)


class Interrupted(Pictures):
    """A signal comes with the third batch."""

    asked: list[int] = []

    def augment(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append(len(x))
        if len(self.asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().augment(x, y)


def test_a_stopped_run_goes_on_where_it_was(
    digits: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Interrupted(digits.name, digits.seen, digits.held_out, digits.mirrored)
    monkeypatch.setattr(lab, "load_pictures", lambda *_: images)
    command = ["lab", "epochs", *TINY.replace("epochs 1", "epochs 2").split(), "--out", "stopped"]
    assert main(command) == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err and Path("stopped/epochs-ResNet-18/last.pth").exists()
    assert main(command) == 0 and len(images.asked) == 4  # two epochs of two batches
    assert not Path("stopped/epochs-ResNet-18").exists()
    perform("epochs", digits, Path("whole"), size=SMALL, recipe=replace(QUICK, epochs=2))
    row, other = (json.loads(Path(place, "epochs.json").read_text())["rows"][0] for place in ("stopped", "whole"))
    assert [entry["train_loss"] for entry in row["history"]] == [entry["train_loss"] for entry in other["history"]]


def test_a_run_that_diverges_has_no_accuracy(digits: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(size: Size, recipe) -> list[Run]:
        config = size.of(laboratory.RESNET18_CIFAR)
        return [Run(f"lr {rate:g}", config, replace(recipe, lr=rate), value=rate) for rate in (0.1, 1e30)]

    monkeypatch.setitem(EXPERIMENTS, "lr", replace(EXPERIMENTS["lr"], runs=runs))
    rows = perform("lr", digits, tmp_path / "lab", size=SMALL, recipe=replace(QUICK, epochs=3))["rows"]
    assert rows[0]["top1"] is not None and rows[1]["top1"] is None and rows[1]["history"] == []
    assert sorted(os.listdir(tmp_path / "lab")) == ["lr.json", "lr.png"]


def test_cifar10_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cifar10(tmp_path / "data", monkeypatch)
    given, found = load_pictures(tmp_path / "data"), load_pictures(images=7)
    assert given.name == "CIFAR-10 (50 images, 10 held out)" and given.mirrored
    assert found.name == "CIFAR-10 (7 images, 7 held out)"
    seen, held_out = given.batches(24, replace(RECIPE, batch_size=10))
    x = torch.cat([x for x, _ in seen.of_epoch(0)])
    assert x.shape == (50, 3, 24, 24) and abs(float(x.mean())) < 0.05
    assert [len(y) for _, y in held_out.of_epoch(0)] == [10]
    for path, error in ((tmp_path / "nowhere", FileNotFoundError), (tmp_path, ValueError)):
        with pytest.raises(error):
            monkeypatch.undo()
            load_pictures(path)


def test_images_are_shifted_and_mirrored() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(200, 3, 16, 16) + 1, torch.arange(200)
    for mirrored in (False, True):
        moved, labels = Pictures("", (x, y), (x, y), mirrored).augment(x, y)
        assert moved.shape == x.shape and labels is y
        seen = set()
        for before, after in zip(x, moved, strict=True):
            padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
            crops = {(down, right): padded[:, down : down + 16, right : right + 16] for down in range(5) for right in range(5)}
            views = {(*place, flip): crop.flip(2) if flip else crop for place, crop in crops.items() for flip in (False, True)}
            found = [place for place, view in views.items() if torch.equal(after, view)]
            assert len(found) == 1
            seen.add(found[0])
        assert {flip for _, _, flip in seen} == ({False, True} if mirrored else {False})
        assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(5))


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ("lab", "required: EXPERIMENT"),
        ("lab adam", "invalid choice: 'adam'"),
        ("lab lr --data nowhere", "nowhere is no directory"),
        ("lab lr --epochs 0", "'0' is no whole number >= 1"),
        ("lab lr --width 0", "width is 0.0"),
        ("lab lr --images 5", "the 5 images fill no batch of 128"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: str, piece: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("effnet-fast: error: ") and err.count("\n") == 1 and piece in err
