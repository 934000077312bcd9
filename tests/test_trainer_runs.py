"""Whole runs of the trainer: data sets, resumption to the last bit, two processes, the commands."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import re
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import picture_folders
import pytest
import torch
from picture_folders import COLOURS, image_folder
from PIL import Image
from states import same
from test_readme import blocks
from test_trainer import PLAIN, batches, images, net

from effnet_fast.cli import COMMANDS, main
from effnet_fast.cli.model import device_of
from effnet_fast.cli.train import add_arguments, recipe_of
from effnet_fast.inference.images import prepare, read_image
from effnet_fast.models import create_model
from effnet_fast.ops import native
from effnet_fast.training import PRESETS, Batches, Stopped, train
from effnet_fast.training import run as runs
from effnet_fast.training.data import DATASETS, check_classes, held_out_transform, mixing, open_dataset, training_transform
from effnet_fast.training.log import draw_curves
from effnet_fast.weights import Preprocessing, read, save_checkpoint

SMALL = ["--model", "efficientnet_b0", "--img-size", "32", "--epochs", "2", "--warmup-epochs", "0", "--lr", "0.01"]
EVERYTHING = shlex.split(
    "--batch-size 4 --mixup 0.2 --cutmix 1 --mixup-prob 0.8 --aa rand-m9-mstd0.5-inc1 --vflip 0.5 --reprob 0.5 --model-ema"
    " --model-ema-decay 0.5 --opt adamw"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    """The output folder of a run with everything that is drawn by chance."""
    out = folder.parent / "whole"
    assert main(["train", str(folder), *SMALL, *EVERYTHING, "--workers", "0", "--output", str(out)]) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


KILLED = """
import os, subprocess, sys, time
from effnet_fast.cli import main, train
made, calls = train.mixing, 0
def mixing(*arguments):
    mixed = made(*arguments)
    def augment(x, y):
        global calls
        calls += 1
        if calls == 3:
            # From a process outside the group: a worker ends in silence where its own parent asks for it.
            subprocess.run(["kill", "-s", "TERM", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)
            time.sleep(1)  # in which workers would die, and the loader say so
        return mixed(x, y)
    return augment
train.mixing = mixing
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_that_sigterm_stopped_goes_on_to_the_same_weights(folder: Path, uninterrupted: Path) -> None:
    """In the middle of an epoch, in a group of processes that all get the signal, with other workers before and after."""
    out = folder.parent / "stopped"
    command = ["train", str(folder), *SMALL, *EVERYTHING, "--output", str(out)]
    stopped = subprocess.run(
        [sys.executable, "-c", KILLED, *command, "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert stopped.stdout == "" and re.fullmatch(r"effnet-fast: note: stopped by SIGTERM; \S+last.pth is[^\n]+\n", stopped.stderr)
    state = torch.load(out / "last.pth", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, 3) and [path.name for path in out.iterdir()] == ["last.pth"]
    assert main(["train", str(folder), *SMALL, *EVERYTHING, "--workers", "1", "--resume", str(out)]) == 0
    assert rows(out / "log.csv") == rows(uninterrupted / "log.csv") and len(rows(out / "log.csv")) == 2
    for name in ("model.pth", "best.pth"):
        assert same(read(out / name).state_dict, read(uninterrupted / name).state_dict), name
    ends = [torch.load(path / "last.pth", weights_only=True) for path in (out, uninterrupted)]
    assert same(*(end["state_dict"] for end in ends)) and not same(ends[0]["state_dict"], ends[0]["state_dict_ema"])


@pytest.mark.parametrize("crashes_in", [1, 2])
def test_a_run_that_crashed_goes_on_from_its_last_epoch(crashes_in: int, tmp_path: Path) -> None:
    """On either side of the epoch after which no batch is mixed."""
    recipe = replace(PLAIN, epochs=3, opt="rmsproptf", opt_eps=1e-3, lr=1e-3, freeze_epochs=1, model_ema=True, grad_accum_steps=2)
    recipe = replace(recipe, mixup=0.5, mixup_off_epoch=2)
    settings = {"validation": Batches(images(5), 4, training=False), "augment": mixing(recipe, 3)}
    whole, again = net(drop=0.3), net(drop=0.3)
    expected = train(whole, batches(recipe, 16), recipe, **settings)

    def crash(model, history):
        if len(history) == crashes_in + 1:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(copy.deepcopy(again), batches(recipe, 16), recipe, **settings, out=tmp_path, after_epoch=crash)
    assert len(rows(tmp_path / "log.csv")) == crashes_in
    got = train(again, batches(recipe, 16), recipe, **settings, out=tmp_path, resume=tmp_path / "last.pth")
    assert without_seconds(got) == without_seconds(expected) and same(again.state_dict(), whole.state_dict())
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > picture.size[1] > 300


@pytest.mark.parametrize("held_out_in", [1, 2])
def test_a_run_goes_on_with_held_out_images_or_without(held_out_in: int, tmp_path: Path) -> None:
    """From its second epoch, whose crash the first one's row outlives; the figures that an epoch has not are gaps."""
    given = [Batches(images(5), 4, training=False) if epoch == held_out_in else None for epoch in (1, 2)]

    def crash(model, history):
        if len(history) == 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(net(), batches(), PLAIN, validation=given[0], out=tmp_path, after_epoch=crash)
    history = train(net(), batches(), PLAIN, validation=given[1], out=tmp_path, resume=tmp_path / "last.pth")
    assert [{"loss", "top1"} <= row.keys() for row in history] == [held_out_in == 1, held_out_in == 2]
    told = rows(tmp_path / "log.csv")
    assert [row["epoch"] for row in told] == ["1", "2"] and told[0].keys() == told[1].keys()
    assert [row["top1"] != "" for row in told] == [held_out_in == 1, held_out_in == 2]


def test_an_epoch_that_cannot_be_drawn_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(history: list[dict[str, float]], path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "draw_curves", broken)
    with pytest.raises(OSError, match="No space left"):
        train(net(), batches(), PLAIN, out=tmp_path)
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    assert (state["epoch"], len(state["history"])) == (1, 1)


KILLED_IN_A_WRITE = """
import os, signal, sys
from pathlib import Path
from effnet_fast.weights.files import whole

with whole(Path(sys.argv[1])) as aside:
    aside.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_was_writing_is_gone_with_the_next_run(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_A_WRITE, str(tmp_path / "last.pth")], timeout=300)
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".editor.tmp").touch()  # not ours
    train(net(), batches(), replace(PLAIN, epochs=1), out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".editor.tmp", "last.pth", "log.csv", "curves.png"}


@pytest.mark.parametrize("loss", [0.0, 1e-3])
def test_curves_warn_of_nothing(loss: float, tmp_path: Path) -> None:
    """Also where a loss is 0, which no scale of logarithms has."""
    history = [{"epoch": epoch, "lr": 0.1, "train_loss": loss} for epoch in (1.0, 2.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(history, tmp_path / "curves.png")


@pytest.mark.parametrize("stops_in", [1, 2])
def test_a_run_that_stopped_in_its_evaluation_goes_on_from_there(stops_in: int, tmp_path: Path) -> None:
    class Signals:
        """Held-out images, at the third of which a signal comes."""

        asked = 0

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.asked += index == 2
            if index == 2 and self.asked == stops_in:
                signal.raise_signal(signal.SIGTERM)
            return images(5)[index]

    whole, again = net(drop=0.3), net(drop=0.3)
    expected = train(whole, batches(), PLAIN, validation=Batches(images(5), 2, training=False))
    calls: list[int] = []
    settings = {"validation": Batches(Signals(), 2, training=False), "out": tmp_path}
    with pytest.raises(Stopped):
        train(copy.deepcopy(again), batches(), PLAIN, after_epoch=lambda model, history: calls.append(1), **settings)
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    assert (state["epoch"], state["step"], len(state["history"]), len(calls)) == (stops_in - 1, 3, stops_in - 1, stops_in - 1)
    got = train(again, batches(), PLAIN, resume=tmp_path / "last.pth", **settings)
    assert without_seconds(got) == without_seconds(expected) and same(again.state_dict(), whole.state_dict())


def test_an_interrupt_stops_after_the_step_and_a_second_one_at_once(tmp_path: Path) -> None:
    calls = []

    def interrupted(x, y):
        calls.append(len(x))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
            if twice:
                signal.raise_signal(signal.SIGINT)
        return x, y

    for twice, kind in ((False, Stopped), (True, KeyboardInterrupt)):
        calls.clear()
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(kind) as caught:
            train(net(), batches(), PLAIN, augment=interrupted, out=tmp_path / str(twice))
        assert signal.getsignal(signal.SIGINT) is before and len(calls) == 2
        assert (tmp_path / str(twice) / "last.pth").exists() == (not twice)
        assert twice or caught.value.signal == signal.SIGINT


def torchrun(*arguments: str) -> str:
    """What it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as agent:
        try:
            told = agent.communicate(timeout=300)[0]
        finally:
            agent.terminate()  # and, where they wait for each other, its two processes
    assert agent.returncode == 0, told
    return told


@pytest.mark.skipif(native.REASON is not None, reason=f"{native.REASON}; PyTorch has no SyncBatchNorm on a CPU")
def test_two_processes_train_as_one_on_batches_twice_as_large(folder: Path) -> None:
    """torchrun, gloo, DistributedDataParallel and SyncBatchNorm. Augmentation is an image's, so it is the same too.

    One step an epoch: what rounding changes grows a thousandfold in every step of an untrained net.
    """
    options = [*SMALL, *shlex.split("--img-size 64 --drop 0 --drop-path 0 --mixup 0 --workers 0 --opt sgd --lr 0.001")]
    outs = [folder.parent / name for name in ("one", "two")]
    assert main(["train", str(folder), *options, "--batch-size", "24", "--output", str(outs[0])]) == 0
    torchrun("-m", "effnet_fast", "train", str(folder), *options, "--batch-size", "12", "--sync-bn", "--output", str(outs[1]))
    for one, two, precision in zip(rows(outs[0] / "log.csv"), rows(outs[1] / "log.csv"), (1e-5, 1e-3), strict=True):
        for name in ("lr", "train_loss", "loss"):
            assert float(two[name]) == pytest.approx(float(one[name]), rel=precision), name
    one, two = (read(out / "model.pth").state_dict for out in outs)
    torch.manual_seed(0)
    start = create_model("efficientnet_b0", num_classes=3).state_dict()
    for name, value in one.items():
        moved = float((value - start[name]).abs().max())
        torch.testing.assert_close(two[name], value, rtol=0, atol=0.02 * moved + 1e-7, msg=name)
    assert not same(one, start)


def test_two_processes_stop_together_and_resume(tmp_path: Path) -> None:
    told = torchrun(str(Path(__file__).parent / "two_trainers.py"), str(tmp_path))
    # The first process alone tells of the steps between, of both processes' images: as the other's are not the same, it waits.
    lines = re.findall(r"epoch 1 of 2, step (\d+) of \d+: training loss (\d+\.\d+)", told)
    assert [number for number, _ in lines] == ["4", "8"], told
    assert "Warning" not in told  # such as DistributedDataParallel's, of parameters that it looked for in vain
    (expected, weights), (got, again) = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "resumed"))
    assert without_seconds(got) == without_seconds(expected) and same(again, weights)


def opinionated(folder: Path, preprocessing: Preprocessing) -> torch.nn.Module:
    """An untrained B0 that finds the held-out images different: with their statistics, and a large classifier."""
    torch.manual_seed(0)
    model = create_model("efficientnet_b0", num_classes=3, drop_path_rate=0.0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        x = torch.stack([held_out_transform(preprocessing)(read_image(path)) for path in sorted(folder.glob("val/*/*.png"))])
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.nn.init.normal_(model.classifier.weight)
        model.classifier.bias -= model.classifier(features).mean(0)
    return model.eval()


def test_eval_counts_the_labels_of_predict(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocessing, model = Preprocessing(32, 36), str(tmp_path / "model.pth")
    save_checkpoint(opinionated(folder, preprocessing), model, classes=COLOURS, preprocessing=preprocessing)
    assert main(["eval", model, str(folder), "--json", "--batch-size", "5", "--workers", "0"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert main(["predict", model, str(folder / "val"), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [answer["labels"][0]["name"] == Path(answer["image"]).parent.name for answer in answers]
    assert scores["images"] == len(right) == 12 and scores["top1"] == pytest.approx(np.mean(right)) and scores["top5"] is None
    assert len({answer["labels"][0]["name"] for answer in answers}) > 1  # or it would not matter what the network saw
    assert {label["name"] for label in answers[0]["labels"]} == set(COLOURS)
    assert main(["eval", model, str(folder / "val")]) == 0  # the directory of classes itself
    told = capsys.readouterr().out
    assert f"{100 * np.mean(right):.2f} %" in told and "top-5" not in told
    for split, count in (("train", len(list(folder.glob("train/*/*.png")))), ("val", 12)):
        assert main(["eval", model, str(folder), "--split", split, "--json", "--workers", "0"]) == 0
        assert json.loads(capsys.readouterr().out)["images"] == count


SIZES = {"cifar10": (50, 10, 10), "cifar100": (4, 4, 100), "flowers102": (3, 2, 102), "stanford_cars": (2, 2, 2)}


@pytest.mark.parametrize("kind", [kind for kind in DATASETS if kind != "folder"])
def test_torchvisions_data_sets(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = getattr(picture_folders, kind)(tmp_path / "data", monkeypatch)
    splits = [open_dataset(root, kind=kind, training=training) for training in (True, False)]
    assert (*map(len, splits), len(splits[0].classes)) == SIZES[kind]
    if kind == "flowers102":  # whose test images chose no weights
        assert len(open_dataset(root, kind=kind, training=False, split="test")) == 2
    for split in splits:
        image, label = split[0]
        assert image.mode == "RGB" and 0 <= label < len(split.classes)
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"empty does not hold {kind} as torchvision's"):
        open_dataset(tmp_path / "empty", kind=kind, training=True)


def test_a_network_learns_cifar_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = picture_folders.cifar10(tmp_path / "data", monkeypatch)
    out = tmp_path / "out"
    options = ["--dataset", "cifar10", "--epochs", "1", "--batch-size", "16", "--workers", "0", "--num-classes", "11"]
    assert main(["train", str(root), *SMALL, *options, "--output", str(out)]) == 0
    saved = read(out / "model.pth")
    assert saved.metadata["classes"] == [*(f"class {number}" for number in range(10)), "10"]
    assert saved.preprocessing is not None and (saved.preprocessing.crop, saved.preprocessing.resize) == (32, 36)
    assert len(rows(out / "log.csv")) == 1


def test_images_are_augmented_by_torchs_generator_alone(folder: Path) -> None:
    image = read_image(folder / "train" / "red" / "0.png")
    small = Preprocessing(24, 28)
    for recipe in (
        PLAIN,
        replace(PLAIN, aa="autoaugment"),
        replace(PLAIN, aa="randaugment", reprob=1.0),
    ):
        transform = training_transform(recipe, small)
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(transform(image))
        assert drawn[0].shape == (3, 24, 24) and drawn[0].dtype == torch.float32
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    whole = training_transform(replace(PLAIN, scale=(1.0, 1.0), hflip=0.0), Preprocessing(40, 40))
    square = image.crop((0, 0, 40, 40))
    torch.testing.assert_close(whole(square), torch.from_numpy(prepare(square, Preprocessing(40, 40))), rtol=0, atol=1e-5)
    assert torch.equal(held_out_transform(small)(image), torch.from_numpy(prepare(image, small)))


def test_mixing_makes_shares_of_labels() -> None:
    x, y = images()[:4]
    assert mixing(PLAIN, 3) is None
    torch.manual_seed(0)
    for recipe in (replace(PLAIN, mixup=0.5), replace(PLAIN, cutmix=1.0), replace(PLAIN, mixup=0.5, cutmix=1.0)):
        augment = mixing(recipe, 3)
        assert augment is not None
        cut = set()
        for _ in range(20):
            mixed, shares = augment(x, y)
            assert shares.shape == (4, 3) and torch.allclose(shares.sum(1), torch.ones(4)) and shares.min() >= 0
            cut.add(bool((mixed == x).any()))  # MixUp changes every pixel
        assert cut == {recipe.cutmix > 0, not recipe.mixup > 0}
    assert len(train(net(), batches(), replace(PLAIN, smoothing=0.1), augment=augment)) == 2


BAD = [
    ("train data", "required: --model"),
    ("train nowhere --model efficientnet_b0", "nowhere is no directory"),
    ("train data/val --model efficientnet_b0", "has no directory train"),
    ("train halves --model efficientnet_b0", "has no directory val or validation or test"),
    ("train hollow --model efficientnet_b0", "hollow/train is no directory of one directory of images for each class"),
    (
        "train single --model efficientnet_b0 --num-classes 3",
        "single has one class to train on, 'images'; a directory for each of two",
    ),
    ("train strange --model efficientnet_b0", "different classes: green, purple"),
    ("train data --model efficientnet_c0", "unknown model 'efficientnet_c0'"),
    ("train data --model efficientnet_b0 --lr 0", "lr is 0.0; a number above 0 would do"),
    (f"train data --model efficientnet_b0 --seed {2**64}", f"seed is {2**64}; a whole number >= 0 and < 2**64 would do"),
    ("train data --model efficientnet_b0 --opt adam", "invalid choice: 'adam'"),
    ("train data --model efficientnet_b0 --recipe best", "invalid choice: 'best'"),
    ("train data --model efficientnet_b0 --epochs 2 --warmup-epochs 3", "warmup_epochs is 3 of 2 epochs"),
    ("train data --model efficientnet_b0 --aa v0", "aa is 'v0', which torchvision has not; none, autoaugment, original, "),
    ("train data --model efficientnet_b0 --crop-pct 0", "crop_pct is 0.0; a share above 0 and up to 1 would do"),
    ("train data --model efficientnet_b0 --std 1 1 0", "std is (1.0, 1.0, 0.0)"),
    ("train data --model efficientnet_b0 --val-split dev", "data has no directory dev, of one directory of images for each class"),
    (
        "train data --model efficientnet_b0 --dataset cifar10 --train-split val",
        "the split is 'val'; train or test, which cifar10 has, would do",
    ),
    ("train data --model efficientnet_b0 --teacher-path three.pth", "--teacher-path is three.pth, and there is no teacher"),
    ("train data --model efficientnet_b0 --teacher three.pth --teacher-path three.pth", "needs no --teacher-path; one of them"),
    (
        "train data --model efficientnet_b0 --teacher torchvision:resnet19",
        "torchvision has not; 'torchvision:resnet18' would",
    ),
    ("train data --model efficientnet_b0 --distill 0.3", "--distill is 0.3, and there is no teacher; with --teacher it would do"),
    ("train data --model efficientnet_b0 --temperature 3", "--temperature is 3, and there is no teacher"),
    ("train data --model efficientnet_b0 --num-classes 2", "--num-classes is 2, and data has 3 classes"),
    ("train data --model efficientnet_b0 --batch-size 25", "the 24 images fill no batch of 25"),
    ("train data --model efficientnet_b0 --batch-size 8 --grad-accum-steps 4", "grad_accum_steps is 4, and an epoch has 3 batches"),
    ("train data --model efficientnet_b0 --drop 1.5", "drop_rate is 1.5"),
    ("train data --model efficientnet_b0 --pretrained-path nowhere.pth", "nowhere.pth"),
    ("train data --model efficientnet_b0 --teacher two.pth", "--teacher two.pth has 2 classes; 3, as the student"),
    ("train data --model efficientnet_b0 --batch-size 8 --resume three.pth", "three.pth holds no run to go on with"),
    ("train data --model efficientnet_b0 --batch-size 8 --resume data", "directory data holds none of last.pth, "),
    ("train data --model efficientnet_b0 --batch-size 8 --resume nowhere.pth", "nowhere.pth does not exist"),
    (
        "train data --model efficientnet_b0 --output here --resume three.pth",
        "--output is here, and the run to resume is in .; that,",
    ),
    ("train torn --model efficientnet_b0 --batch-size 3 --workers 1", "torn/train/red/0.png cannot be read: "),
    ("train torn --model efficientnet_b0 --batch-size 3 --workers 0", "torn/train/red/0.png cannot be read: "),
    ("train data --model efficientnet_b0 --device toaster", "--device is 'toaster'"),
    ("train data --model efficientnet_b0 --dataset cifar10", "data does not hold cifar10 as torchvision's CIFAR10 wants it"),
    ("eval three.pth", "required: DATA"),
    ("eval three.pth nowhere", "nowhere is no directory"),
    ("eval three.pth data", "different classes: "),
    ("eval efficientnet_b0.nobody data", "no pretrained weights 'nobody'"),
    ("eval two.pth data", "data has 3 classes; 2, as the model, would do"),
    ("eval four.pth data", "data has 3 classes; 4, as the model, would do"),
]


@pytest.fixture(scope="module")
def bad(folder: Path) -> Path:
    root = folder.parent
    (root / "halves" / "train").mkdir(parents=True)
    (root / "halves" / "train" / "red").symlink_to(folder / "train" / "red")
    for split in ("train", "val"):
        (root / "hollow" / split).mkdir(parents=True)
    for split in ("train", "val"):
        (root / "single" / split).mkdir(parents=True)
        (root / "single" / split / "images").symlink_to(folder / "val" / "red")
    image_folder(root / "torn", 1, 1)
    (root / "torn" / "train" / "red" / "0.png").write_bytes(b"no image")
    for split, names in (("train", ("red", "green")), ("val", ("red", "purple"))):
        (root / "strange" / split).mkdir(parents=True)
        for name in names:
            (root / "strange" / split / name).symlink_to(folder / "train" / "red")
    for classes, name in ((2, "two"), (4, "four")):
        save_checkpoint(create_model("efficientnet_b0", num_classes=classes), root / f"{name}.pth")
    save_checkpoint(create_model("efficientnet_b0", num_classes=3), root / "three.pth", classes=["a", "b", "c"])
    return root


@pytest.mark.parametrize(("line", "piece"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_gets_one_line(
    line: str, piece: str, bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bad)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"effnet-fast: error: [^\n]+\n", err), err
    assert piece in err
    if "torn" in line:  # found out when it trains
        (bad / "output").rmdir()
    assert not (bad / "output").exists()


@pytest.mark.parametrize("package", ["torchvision", "matplotlib"])
def test_without_a_package_one_line_says_what_brings_it(package: str, folder: Path) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None\nfrom effnet_fast.cli import main\nimport effnet_fast.training\n"
        f"sys.exit(main(['train', {str(folder)!r}, '--model', 'efficientnet_b0', '--batch-size', '8']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"effnet-fast: error: this needs {package}: pip install 'effnet-fast[train]' would do\n"


def test_the_recipe_follows_from_the_weights() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for options, preset in (
        ("efficientnet_b0", "cosine"),
        ("efficientnet_b0 --pretrained", "finetune"),
        ("efficientnet_b0 --pretrained-path weights.pth", "finetune"),
        ("tf_efficientnet_b0.ns_jft_in1k", "finetune"),
        ("efficientnet_b0 --pretrained --recipe paper", "paper"),
    ):
        assert recipe_of(parser.parse_args(["data", "--model", *options.split()])) == PRESETS[preset], options


def test_each_of_torchruns_ranks_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of("cuda") == device_of("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert device_of("cuda") == device_of("auto") == torch.device("cuda", 2)
    with pytest.raises(ValueError, match="--device is 'cuda:1' for each of torchrun's processes; cuda, which gives"):
        device_of("cuda:1")


def test_classes_in_another_order_are_refused() -> None:
    with pytest.raises(ValueError, match="different classes: their order"):
        check_classes(["a", "b"], ["b", "a"])


def test_the_readmes_commands_run(
    tmp_path: Path, folder: Path, bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that train and evaluate, on small images, without what is downloaded."""
    (block,) = [block for block in blocks("bash") if "--resume pets/last.pth" in block]
    cifar = picture_folders.cifar10(tmp_path / "cifar", monkeypatch)
    monkeypatch.chdir(tmp_path)
    save_checkpoint(create_model("efficientnet_b0", num_classes=10), tmp_path / "TEACHER.pth")
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [line[0] for line in lines] == ["train", "train", "train", "eval"] and "train" in COMMANDS
    for line in lines:
        data = cifar if "cifar10" in line else folder
        made = [str(data) if word == "DATA" else word for word in line if word != "--pretrained"]
        small = [*SMALL[2:], "--batch-size", "8"] if line[0] == "train" else []
        assert main([*made, *small, "--workers", "0"]) == 0, line
    assert "top-1" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "pets").iterdir()} == {"model.pth", "best.pth", "last.pth", "log.csv", "curves.png"}
