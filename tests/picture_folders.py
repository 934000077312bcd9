"""Small image data sets, written by the tests: folders of PNGs, and the files that torchvision's data sets are read from."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("blue", "green", "red")


def pixels(rng: np.random.Generator, label: int, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    """[H, W, 3] uint8 noise in which one of three colours is stronger."""
    noise = rng.integers(0, 120, (*size, 3))
    noise[..., 2 - label] += 100
    return noise.astype(np.uint8)


def image_folder(root: Path, train: int = 8, val: int = 4) -> Path:
    """``root``/train and /val with a folder for each of ``COLOURS``."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(COLOURS):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels(rng, label)).save(root / split / name / f"{number}.png")
    return root


def cifar10(root: Path, monkeypatch) -> Path:
    """CIFAR-10 as torchvision reads it, of ten images a file; the checksums it holds files to are set aside."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        rows = {"data": rng.integers(0, 256, (10, 3 * 32 * 32)).astype(np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(rows))
    meta = {"label_names": [f"class {number}" for number in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setitem(CIFAR10.meta, "md5", None)
    return root


def cifar100(root: Path, monkeypatch) -> Path:
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    folder = root / CIFAR100.base_folder
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        rows = {"data": np.zeros((4, 3072), dtype=np.uint8), "fine_labels": [0, 1, 2, 99]}
        (folder / name).write_bytes(pickle.dumps(rows))
    (folder / CIFAR100.meta["filename"]).write_bytes(pickle.dumps({"fine_label_names": [f"class {n}" for n in range(100)]}))
    monkeypatch.setitem(CIFAR100.meta, "md5", None)
    return root


def flowers102(root: Path, monkeypatch) -> Path:
    import scipy.io
    from torchvision.datasets import Flowers102

    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 8):
        Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(folder / "jpg" / f"image_{number:05}.jpg")
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 1, 2, 102, 3]])})
    splits = {"trnid": np.array([[1, 2, 3]]), "valid": np.array([[4, 5]]), "tstid": np.array([[6, 7]])}
    scipy.io.savemat(folder / "setid.mat", splits)
    return root


def stanford_cars(root: Path, monkeypatch) -> Path:
    import scipy.io

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["coupe", "van"], dtype=object)})
    for split, at in (("train", folder / "devkit" / "cars_train_annos.mat"), ("test", folder / "cars_test_annos_withlabels.mat")):
        (folder / f"cars_{split}").mkdir()
        for name in ("1.jpg", "2.jpg"):
            Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(folder / f"cars_{split}" / name)
        rows = np.array([("1.jpg", 1), ("2.jpg", 2)], dtype=[("fname", object), ("class", object)])
        scipy.io.savemat(at, {"annotations": rows})
    return root
