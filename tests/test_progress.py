"""While a command works: threads or processes load images, as many as asked, and a bar tells of it, on a terminal alone."""

from __future__ import annotations

import importlib
import io
import itertools
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from picture_folders import COLOURS, image_folder
from PIL import Image
from test_trainer import PLAIN, batches, images, net
from torch.utils.data import get_worker_info

from effnet_fast.cli import bench, main
from effnet_fast.scaling import grid
from effnet_fast.training import Batches, distributed, train
from effnet_fast.weights import Preprocessing, save_checkpoint

predicting = importlib.import_module("effnet_fast.inference.predict")  # the name in its package is the function's
SMALL = Preprocessing(32, 36)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    path = folder.parent / "model.pth"
    save_checkpoint(net(), path, classes=COLOURS, preprocessing=SMALL)
    return str(path)


@pytest.mark.parametrize("readers", [1, 3])
def test_files_are_read_by_threads(readers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many at once, and those of the next batch while the network runs."""
    files = sorted(folder.glob("val/*/*.png"))[:6]
    monkeypatch.setattr(predicting, "_READERS", readers)
    together, all_begun, begun = threading.Barrier(readers), threading.Event(), []
    read, run = predicting.read_image, predicting.class_probabilities

    def reading(path: Path, channels: int) -> Image.Image:
        begun.append(threading.get_ident())
        if len(begun) == len(files):
            all_begun.set()
        together.wait(30)
        return read(path, channels)

    def running(*arguments: object) -> torch.Tensor:
        assert all_begun.wait(30), "the next batch is not read"
        return run(*arguments)

    monkeypatch.setattr(predicting, "read_image", reading)
    monkeypatch.setattr(predicting, "class_probabilities", running)
    predictions = list(predicting.predict(net().eval(), files, SMALL, batch=3))
    assert [prediction.path for prediction in predictions] == files
    assert len(set(begun)) == readers and threading.get_ident() not in begun


def who_loads(image: Image.Image) -> torch.Tensor:
    """In place of an image: the number of the process that loads it, and of how many."""
    worker = get_worker_info()
    return torch.tensor([worker.id, worker.num_workers] if worker else [-1, 0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["train", "eval"])
def test_processes_load_images(name: str, workers: int, folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command, loaded = importlib.import_module(f"effnet_fast.cli.{name}"), []

    def trained(model: object, seen: Batches, recipe: object, *, validation: Batches, **settings: object) -> list[dict[str, float]]:
        loaded.extend([list(seen.of_epoch(0)), list(validation.of_epoch(0))])
        return [{"top1": 1.0}]

    def evaluated(serving: object, batches: object, device: object) -> SimpleNamespace:
        loaded.append(list(batches))  # type: ignore[call-overload]
        return SimpleNamespace(_asdict=dict)

    for function, fake in (("train", trained), ("evaluate", evaluated)):
        monkeypatch.setattr(command, function, fake, raising=False)
    for function in ("training_transform", "held_out_transform"):
        monkeypatch.setattr(command, function, lambda *_: who_loads, raising=False)
    options = {"train": [str(folder), "--model", "efficientnet_b0"], "eval": [model, str(folder), "--json"]}[name]
    assert main([name, *options, "--batch-size", "4", "--workers", str(workers)]) == 0
    assert len(loaded) == {"train": 2, "eval": 1}[name]
    for split in loaded:
        of = torch.cat([x for x, _ in split])
        assert set(of[:, 1].tolist()) == {workers} and set(of[:, 0].tolist()) == (set(range(workers)) or {-1})


def predict_all(folder: Path, model: str) -> None:
    assert main(["predict", model, str(folder / "val"), "--json", "--batch", "4"]) == 0


def predict_half(folder: Path, model: str) -> None:
    assert main(["predict", model, str(folder / "val"), "--json", "--batch", "4", "--shard", "0/2"]) == 0


def predict_another_half(folder: Path, model: str) -> None:
    assert main(["predict", model, str(folder / "val"), "--json", "--batch", "4", "--shard", "1/2"]) == 0


def evaluate_all(folder: Path, model: str) -> None:
    assert main(["eval", model, str(folder), "--json", "--batch-size", "4", "--workers", "0"]) == 0


def evaluate_in_another_process(folder: Path, model: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "rank", lambda: 1)
        evaluate_all(folder, model)


def train_two_epochs(folder: Path, model: str) -> None:
    train(net(), batches(), PLAIN, validation=Batches(images(5), 4, training=False))


def time_peers(folder: Path, model: str) -> None:
    """Without taking the time."""

    def compared(planned, seconds, logs, advance):
        advance(7)
        yield {"cases": []}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "compare", compared)
        patch.setattr(bench, "_told", str)
        assert main(["bench", "efficientnet_b0", "--peers", "none", "--batch", "1", "--device", "cpu"]) == 0


def accuracy(net: object) -> float:
    return 0.5


def judge_laws(folder: Path, model: str) -> None:
    pools = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "ProcessPoolExecutor", lambda number, _: pools.append(number) or ThreadPoolExecutor(number))
        grid.grid_search(accuracy, processes=3)
    assert pools == [3]


BARS: list[tuple[Callable[[Path, str], None], list[str]]] = [
    (predict_all, [r"/12 .*image"]),
    (predict_half, [r"/6 .*image"]),
    (predict_another_half, []),
    (evaluate_all, [r"/3 .*batch"]),
    (evaluate_in_another_process, []),
    (train_two_epochs, [r"/6 .*step", r"held out: .*/2 .*batch"]),
    (time_peers, [r"7/45 .*turn"]),
    (judge_laws, [r"/22 .*net"]),
]
AT_ONCE = (judge_laws, train_two_epochs)  # a net takes minutes; and the bar is drawn again below an epoch's line


@pytest.mark.parametrize("where", ["a terminal", "a file", "a terminal, within two seconds"])
@pytest.mark.parametrize(("work", "bars"), BARS, ids=[work.__name__ for work, _ in BARS])
def test_bars_are_for_who_waits(
    work: Callable[[Path, str], None], bars: list[str], where: str, folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: where != "a file", raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    clock = itertools.count(step=0 if "within" in where else 3)  # seconds
    monkeypatch.setattr("tqdm.std.time", clock.__next__)
    work(folder, model)
    drawn = [line for line in re.split(r"[\r\n]", shown.getvalue()) if re.search(r"\d+/\d+ \[", line)]
    if where == "a terminal":
        assert all(any(re.search(bar, line) for line in drawn) for bar in bars), shown.getvalue()
    waits = where == "a terminal" or ("within" in where and work in AT_ONCE)
    assert bool(drawn) == (waits and bool(bars)), shown.getvalue()
