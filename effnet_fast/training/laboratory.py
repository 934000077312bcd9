"""A laboratory around ResNet-18 on small images: how optimizer, learning rate, momentum, time and size change what it learns.

An experiment is a handful of runs of :func:`effnet_fast.training.train`, one figure and one JSON file, beside published values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effnet_fast.benchmark.machine import facts
from effnet_fast.models import build
from effnet_fast.scaling import RESNET18, RESNET18_CIFAR, RESNET34, RESNET50, RESNET101, BaseNet, CompoundScaling, Cost, NetConfig
from effnet_fast.settings import differing, plain
from effnet_fast.training.loop import Diverged
from effnet_fast.training.pictures import SIDE, Pictures
from effnet_fast.training.recipes import Recipe
from effnet_fast.training.run import CURVES, LAST, LOG, train
from effnet_fast.weights.files import whole

CLASSES = 10
_ROW = (
    "label",
    "series",
    "value",
    "net",
    "resolution",
    "parameters",
    "macs",
    "recipe",
    "top1",
    "loss",
    "seconds",
    "device",
    "machine",
    "history",
)
# SGD as He et al. train ResNets on CIFAR-10 (arXiv 1512.03385, section 4.2), but for a cosine and the weight decay that wide
# ResNets take there (arXiv 1605.07146, section 3).
RECIPE = Recipe(epochs=25, batch_size=128, opt="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
ADAM = replace(RECIPE, opt="adamw", lr=1e-3, weight_decay=0.0)  # without weight decay AdamW is Adam (arXiv 1412.6980)


class Published(NamedTuple):
    """A value of others: ``top1`` in per cent; ``parameters``, in millions, are counted."""

    net: str
    data: str
    parameters: float
    top1: float
    source: str


def small_images(base: BaseNet) -> BaseNet:
    """A ResNet as it is built for images of 32x32 pixels: its stem 3x3 without stride, and no pool."""
    return replace(base, name=f"{base.name}_cifar", resolution=SIDE, stem_kernel=3, stem_stride=1, stem_pool=False)


def _on_cifar10(base: BaseNet, top1: float) -> Published:
    parameters = Cost.of(small_images(base).scaled(num_classes=CLASSES)).parameters
    return Published(base.name, "CIFAR-10", parameters / 1e6, top1, "github.com/kuangliu/pytorch-cifar at 00166a3, 350 epochs")


def _on_imagenet(base: BaseNet, top1: float) -> Published:
    return Published(base.name, "ImageNet", Cost.of(base.scaled()).parameters / 1e6, top1, "torchvision's IMAGENET1K_V1 weights")


CIFAR10 = (_on_cifar10(RESNET18, 93.02), _on_cifar10(RESNET50, 93.62), _on_cifar10(RESNET101, 93.75))
IMAGENET = (
    _on_imagenet(RESNET18, 69.758),
    _on_imagenet(RESNET34, 73.314),
    _on_imagenet(RESNET50, 76.130),
    _on_imagenet(RESNET101, 77.374),
)


@dataclass(frozen=True)
class Size:
    """Multipliers of every net's depth and width, and the side of its images in pixels (at phi = 0)."""

    depth: float = 1.0
    width: float = 1.0
    resolution: int = SIDE

    def of(self, base: BaseNet) -> NetConfig:
        return base.scaled(self.depth, self.width, self.resolution, num_classes=CLASSES)


class Run(NamedTuple):
    """One training. ``series`` it belongs to in the figure, ``value`` on the axis of a sweep."""

    label: str
    config: NetConfig
    recipe: Recipe
    series: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Experiment:
    """``runs`` at a size and under a recipe; ``axis`` is what the figure has accuracy over (``""``: epochs alone)."""

    title: str
    axis: str
    runs: Callable[[Size, Recipe], list[Run]]
    published: tuple[Published, ...] = CIFAR10[:1]
    logarithmic: bool = False


def _optimizers(size: Size, recipe: Recipe) -> list[Run]:
    config, adam = size.of(RESNET18_CIFAR), replace(recipe, opt=ADAM.opt, lr=ADAM.lr, weight_decay=ADAM.weight_decay)
    return [Run("SGD with momentum", config, recipe), Run("SGD", config, replace(recipe, momentum=0.0)), Run("Adam", config, adam)]


def _learning_rates(size: Size, recipe: Recipe) -> list[Run]:
    rates = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    return [Run(f"lr {rate:g}", size.of(RESNET18_CIFAR), replace(recipe, lr=rate), value=rate) for rate in rates]


def _momenta(size: Size, recipe: Recipe) -> list[Run]:
    shares = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
    return [Run(f"momentum {share:g}", size.of(RESNET18_CIFAR), replace(recipe, momentum=share), value=share) for share in shares]


def _epochs(size: Size, recipe: Recipe) -> list[Run]:
    return [Run("ResNet-18", size.of(RESNET18_CIFAR), recipe)]


def _sizes(size: Size, recipe: Recipe) -> list[Run]:
    small = [small_images(base) for base in (RESNET18, RESNET34, RESNET50, RESNET101)]
    return [Run(base.name.removesuffix("_cifar"), size.of(base), recipe) for base in small]


def _compound(size: Size, recipe: Recipe) -> list[Run]:
    runs = []
    for series, base in (("3x3 stem", RESNET18_CIFAR), ("7x7 stem", replace(RESNET18, resolution=SIDE))):
        law = CompoundScaling(base=base)
        for phi in (0, 1, 2):
            net = law.at(phi)
            side = round(size.resolution * net.resolution)
            config = base.scaled(size.depth * net.depth, size.width * net.width, side, num_classes=CLASSES)
            runs.append(Run(f"{series}, phi {phi}", config, recipe, series, phi))
    return runs


EXPERIMENTS = {
    "optimizers": Experiment("Adam against SGD", "", _optimizers),
    "lr": Experiment("Learning rates of SGD", "highest learning rate", _learning_rates, logarithmic=True),
    "momentum": Experiment("Momenta of SGD", "momentum", _momenta),
    "epochs": Experiment("Cross entropy over the epochs", "", _epochs),
    "sizes": Experiment("Accuracy against size", "parameters (M)", _sizes, (*CIFAR10, *IMAGENET), logarithmic=True),
    "compound": Experiment("Compound scaling of ResNet-18", "phi", _compound),
}


def perform(
    name: str,
    pictures: Pictures,
    out: Path,
    *,
    size: Size | None = None,
    recipe: Recipe = RECIPE,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Do an experiment; returns what ``out/NAME.json`` holds, beside which stands the figure ``NAME.png``.

    name    one of ``EXPERIMENTS``
    size    of the nets, by default the published ones at 32x32 pixels
    recipe  of the runs, but for what the experiment varies

    Both are replaced whole, the JSON after each run. Where it is there already, runs that it has are not done again, and one that
    was stopped goes on where it was (its folder is within ``out``). Each row has the device, the machine and the versions that
    finished it. A run whose loss is not finite has no accuracy. Raises ValueError for an unknown name, and where the JSON is of
    other settings; Stopped as :func:`effnet_fast.training.train`.
    """
    from tqdm import tqdm

    from effnet_fast.training.figures import draw_experiment

    if name not in EXPERIMENTS:
        raise ValueError(f"experiment is {name!r}; one of {', '.join(EXPERIMENTS)} would do")
    experiment, path = EXPERIMENTS[name], out / f"{name}.json"
    runs = experiment.runs(size or Size(), recipe)
    settings = {"experiment": name, "data": pictures.name, "size": size or Size(), "recipe": recipe}
    result: dict[str, Any] = {
        **plain(settings),
        "title": experiment.title,
        "seed": recipe.seed,
        "published": [value._asdict() for value in experiment.published],
        "rows": _finished(path, settings),
    }
    done = {row["label"] for row in result["rows"]}
    out.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if run.label not in done]
    try:
        for run in tqdm(missing, pictures.name, unit="run", disable=None, delay=2):
            folder = out / f"{name}-{run.label.replace(' ', '-').replace(',', '')}"
            result["rows"].append(_row(run, pictures, folder, device))
            with whole(path) as aside:
                aside.write_text(json.dumps(result, indent=1) + "\n")
            for file in (LAST, LOG, CURVES):  # what is worth keeping of them is in the JSON
                (folder / file).unlink(missing_ok=True)
            folder.rmdir()
    finally:
        if result["rows"]:
            draw_experiment(result, experiment.axis, experiment.logarithmic, out / f"{name}.png")
    return result


def _row(run: Run, pictures: Pictures, folder: Path, device: torch.device | str) -> dict[str, Any]:
    """Train, and tell what came of it."""
    torch.manual_seed(run.recipe.seed)
    model, cost, last = build(run.config), Cost.of(run.config), folder / LAST
    seen, held_out = pictures.batches(run.config.resolution, run.recipe)
    try:
        history = train(
            model,
            seen,
            run.recipe,
            validation=held_out,
            augment=pictures.augment,
            device=device,
            out=folder,
            resume=last if last.exists() else None,
            same={"pictures": pictures.name, "resolution": run.config.resolution},
        )
    except Diverged:
        history = []
    return {
        "label": run.label,
        "series": run.series,
        "value": run.value,
        "net": run.config.name,
        "resolution": run.config.resolution,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "recipe": plain(run.recipe),
        "top1": 100 * history[-1]["top1"] if history else None,
        "loss": history[-1]["loss"] if history else None,
        "seconds": sum(row["seconds"] for row in history),
        "device": str(device),
        "machine": facts(),
        "history": history,
    }


def _finished(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier call with the same settings."""
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no result of an experiment: no JSON ({error}); another folder would do") from error
    rows = before.get("rows") if isinstance(before, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} is no result of an experiment: rows is {rows!r:.80}; a list, or another folder, would do")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or set(_ROW) - row.keys():
            raise ValueError(
                f"{path} is no result of an experiment: row {number} is {row!r:.80}; an object with {', '.join(_ROW)}, or another "
                "folder, would do"
            )
    if told := differing({name: before.get(name) for name in settings}, settings):
        raise ValueError(f"{path} is of {told}; the same, or another folder, would do")
    return rows
