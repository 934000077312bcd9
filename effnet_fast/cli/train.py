"""Train or fine-tune a network on images. A recipe is a named set of all settings; options change single ones.

DATA is a directory with train and val of one directory of images for each class; or, with --dataset, what torchvision reads
CIFAR-10, CIFAR-100, Flowers-102 or Stanford Cars from. The folder --output gets model.pth (the last epoch's weights: the average
where one is kept) and best.pth (the best epoch's on the held-out images: for CIFAR and Stanford Cars on their test split, which
judges it no more), which are MODEL to predict, eval and cam; log.csv and curves.png; and last.pth, from which --resume goes on
exactly where Ctrl-C or SIGTERM stopped it, or at the epoch of a crash.

examples: effnet-fast train pets --model efficientnet_b0 --pretrained --recipe finetune --output pets-b0
          effnet-fast train pets --model efficientnet_b0 --pretrained --recipe finetune --resume pets-b0/last.pth
          effnet-fast train cifar --dataset cifar10 --model efficientnet_b0 --img-size 64 --epochs 10 --scale 0.5 1
          torchrun --nproc-per-node 8 -m effnet_fast train imagenet --model tf_efficientnet_b0 --recipe paper --sync-bn --amp
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnet_fast.cli import say
from effnet_fast.cli.model import device_of, is_path, load_into, load_saved
from effnet_fast.cli.options import LOADERS, count, index
from effnet_fast.models import Classifier, config_of, create_model
from effnet_fast.training import PRESETS, Batches, Recipe, Stopped, distributed, load_teacher, train
from effnet_fast.training.data import DATASETS, Images, check_classes, held_out_transform, mixing, open_dataset, training_transform
from effnet_fast.training.run import LAST
from effnet_fast.training.teachers import LIBRARIES, Teacher
from effnet_fast.weights import Preprocessing, preprocessing_of, save_checkpoint
from effnet_fast.weights.files import locate
from effnet_fast.weights.preprocessing import INTERPOLATIONS

_SHORT = {"batch_size": ("-b",)}  # timm's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="directory of the data set")
    parser.add_argument("--dataset", choices=DATASETS, default="folder", help="what DATA is (default: folder)")
    parser.add_argument("--train-split", metavar="NAME", help="what of DATA to train on (default: train)")
    parser.add_argument(
        "--val-split", metavar="NAME", help="held-out images of DATA (default: val, validation or test; flowers102: val)"
    )
    parser.add_argument("--dataset-download", action="store_true", help="fetch the data set into DATA where it is not there")
    parser.add_argument("--model", required=True, metavar="NAME", help="the network, or NAME.TAG for one set of pretrained weights")
    weights_from = parser.add_mutually_exclusive_group()
    weights_from.add_argument("--pretrained", action="store_true", help="begin with its default weights and a new classifier")
    weights_from.add_argument(
        "--pretrained-path", metavar="FILE", help="begin with the weights of a checkpoint, or of a directory's"
    )
    parser.add_argument("--num-classes", type=count, metavar="N", help="at least the data set's, which is the default")
    parser.add_argument("--img-size", type=count, metavar="PIXELS", help="side of the network's input (default: the weights')")
    parser.add_argument(
        "--crop-pct", type=float, metavar="X", help="share of a held-out image's side that it is given (default: the weights')"
    )
    parser.add_argument("--mean", nargs=3, type=float, metavar="X", help="of the colours, from 0 to 1 (default: the weights')")
    parser.add_argument("--std", nargs=3, type=float, metavar="X", help="deviation of the colours (default: the weights')")
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="how images are resized (default: the weights')")
    parser.add_argument("--drop", type=float, metavar="P", help="dropout (default: the network's)")
    parser.add_argument("--drop-path", type=float, metavar="P", help="stochastic depth of the last block (default: the network's)")
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="distil from it: a checkpoint of effnet-fast's, or NAME, timm:NAME or torchvision:NAME with its pretrained weights",
    )
    parser.add_argument(
        "--teacher-path",
        metavar="FILE",
        help="the teacher's weights: a checkpoint of the library it is of, or of ours the raw ones",
    )
    parser.add_argument(
        "--recipe", choices=sorted(PRESETS), help="settings to begin with (default: finetune for pretrained weights, else cosine)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="(default: the folder of --resume, else output)")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="go on from a last.pth, or its folder; the other options as before"
    )
    parser.add_argument(
        "-vb", "--validation-batch-size", type=count, metavar="N", help="held-out images at a time (default: the batch size)"
    )
    parser.add_argument(
        "--log-interval", type=index, default=0, metavar="N", help="steps between lines that tell the loss (default: an epoch's)"
    )
    parser.add_argument(
        "-j", "--workers", type=index, default=LOADERS, metavar="N", help=f"processes that load images (default {LOADERS})"
    )
    parser.add_argument("--device", default="auto", help="as in predict (default: auto)")
    group = parser.add_argument_group("settings (in place of the recipe's)")
    for setting in fields(Recipe):
        _add_setting(group, setting.name, setting.default, setting.metadata)


def _add_setting(group: Any, name: str, default: Any, metadata: Any) -> None:
    options = [*_SHORT.get(name, ()), "--" + name.replace("_", "-")]
    common = {"dest": f"recipe_{name}", "default": None, "help": metadata["help"]}
    if isinstance(default, bool):
        group.add_argument(*options, action=argparse.BooleanOptionalAction, **common)
    elif metadata["choices"]:
        group.add_argument(*options, choices=metadata["choices"], **common)
    elif metadata["values"] > 1:
        group.add_argument(*options, nargs=metadata["values"], type=float, metavar="X", **common)
    else:
        kind = type(default) if isinstance(default, int | str) else float
        group.add_argument(*options, type=kind, metavar={int: "N", str: "NAME", float: "X"}[kind], **common)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The named recipe with the options in place of its own; ValueError names one that is out of range or of no use."""
    given = {setting.name: getattr(arguments, f"recipe_{setting.name}") for setting in fields(Recipe)}
    changed: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    pretrained = arguments.pretrained or arguments.pretrained_path or Path(arguments.model).suffix  # a tag
    recipe = replace(PRESETS[arguments.recipe or ("finetune" if pretrained else "cosine")], **changed)
    for name in ("distill", "temperature"):
        if name in changed and not arguments.teacher:
            raise ValueError(f"--{name} is {changed[name]:g}, and there is no teacher; with --teacher it would do")
    if arguments.teacher_path and not arguments.teacher:
        raise ValueError(f"--teacher-path is {arguments.teacher_path}, and there is no teacher; with --teacher it would do")
    return recipe


def run(arguments: argparse.Namespace) -> int:
    recipe, device = recipe_of(arguments), device_of(arguments.device)
    with distributed.process_group(device):
        try:
            return _train(arguments, recipe, device)
        except Stopped as stopped:
            if distributed.rank() == 0:
                say("note", f"{stopped} (--resume {stopped.path})")
            return 128 + stopped.signal


def _train(arguments: argparse.Namespace, recipe: Recipe, device: torch.device) -> int:
    if arguments.dataset_download and distributed.processes() > 1:
        raise ValueError("--dataset-download with several processes, which would all fetch it; one process, first, would do")
    seen, held_out = (
        open_dataset(arguments.data, training=training, kind=arguments.dataset, split=split, download=arguments.dataset_download)
        for training, split in ((True, arguments.train_split), (False, arguments.val_split))
    )
    check_classes(seen.classes, held_out.classes)
    if len(seen.classes) < 2:
        raise ValueError(
            f"{arguments.data} has one class to train on, {seen.classes[0]!r}; a directory for each of two or more would do"
        )
    torch.manual_seed(recipe.seed)
    model = _model(arguments, len(seen.classes))
    preprocessing = _preprocessing(arguments, preprocessing_of(model))
    teacher = _teacher(arguments.teacher, arguments.teacher_path, model, preprocessing) if arguments.teacher else None
    settings = {"seed": recipe.seed, "workers": arguments.workers}
    folder = _folder(arguments)
    best = _Best(folder, _named(seen.classes, model.num_classes), preprocessing)
    history = train(
        model,
        Batches(Images(seen, training_transform(recipe, preprocessing)), recipe.batch_size, training=True, **settings),
        recipe,
        validation=Batches(
            Images(held_out, held_out_transform(preprocessing)),
            arguments.validation_batch_size or recipe.batch_size,
            training=False,
            **settings,
        ),
        augment=mixing(recipe, model.num_classes),
        teacher=teacher,
        device=device,
        out=folder,
        resume=arguments.resume,
        same={
            "preprocessing": preprocessing.to_dict(),
            "teacher": arguments.teacher,
            "teacher_path": arguments.teacher_path,
            "classes": list(seen.classes),
        },
        after_epoch=best.save,
        log_interval=arguments.log_interval,
    )
    if distributed.rank() == 0:
        top = max(history, key=lambda row: row["top1"])
        print(f"{100 * history[-1]['top1']:.2f} % of {len(held_out)} held-out images right, at best {100 * top['top1']:.2f} %")
        print(f"effnet-fast predict {folder / 'model.pth'} IMAGE")
    return 0


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.resume is None:
        return arguments.output or Path("output")
    folder = locate(arguments.resume, LAST).parent
    if arguments.output is not None and arguments.output.resolve() != folder.resolve():
        raise ValueError(f"--output is {arguments.output}, and the run to resume is in {folder}; that, or no --output, would do")
    return folder


class _Best:
    """Writes model.pth after every epoch, and best.pth after the best."""

    def __init__(self, folder: Path, classes: list[str], preprocessing: Preprocessing) -> None:
        self.folder, self.classes, self.preprocessing = folder, classes, preprocessing

    def save(self, model: nn.Module, history: list[dict[str, float]]) -> None:
        names = ["model.pth"]
        if history[-1]["top1"] >= max(row["top1"] for row in history):
            names.append("best.pth")
        for name in names:
            save_checkpoint(model, self.folder / name, classes=self.classes, preprocessing=self.preprocessing)  # type: ignore[arg-type]


def _named(classes: list[str], outputs: int) -> list[str]:
    """The classes, and a number for each output beyond them."""
    return [*classes, *map(str, range(len(classes), outputs))]


def _model(arguments: argparse.Namespace, classes: int) -> Classifier:
    wanted = arguments.num_classes or classes
    if wanted < classes:
        raise ValueError(f"--num-classes is {wanted}, and {arguments.data} has {classes} classes; at least as many would do")
    rates = {"drop_rate": arguments.drop, "drop_path_rate": arguments.drop_path}
    sizes = {"num_classes": wanted, **{name: value for name, value in rates.items() if value is not None}}
    return create_model(arguments.model, arguments.pretrained_path or arguments.pretrained, **sizes)  # type: ignore[return-value]


def _preprocessing(arguments: argparse.Namespace, weights: Preprocessing) -> Preprocessing:
    """That of the weights but for what the options say."""
    crop = arguments.img_size or weights.crop
    share = weights.crop_pct if arguments.crop_pct is None else arguments.crop_pct
    given: dict[str, Any] = {name: getattr(arguments, name) for name in ("mean", "std", "interpolation")}
    changed: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    return replace(weights, crop=crop, resize=Preprocessing.of(crop, share).resize, **changed)


def _teacher(name: str, path: str | None, model: Classifier, preprocessing: Preprocessing) -> nn.Module:
    """What --teacher and --teacher-path say, for the student's images, of which it is shown one."""
    teacher = _teacher_of(name, path, model.num_classes)
    if teacher.num_classes != model.num_classes:
        raise ValueError(f"--teacher {name} has {teacher.num_classes} classes; {model.num_classes}, as the student, would do")
    made = teacher.for_images(preprocessing.mean, preprocessing.std).eval()
    try:
        with torch.no_grad():
            shape = made(torch.zeros(1, 3, preprocessing.crop, preprocessing.crop)).shape
    except Exception as error:  # a peer's net may refuse a size in any way
        raise ValueError(f"--teacher {name} takes no images of {preprocessing.crop} x {preprocessing.crop}: {error}") from error
    if shape != (1, model.num_classes):
        raise ValueError(f"--teacher {name} answers with {tuple(shape)}; logits {(1, model.num_classes)} would do")
    return made


def _teacher_of(name: str, path: str | None, num_classes: int) -> Teacher:
    if name.partition(":")[0] in LIBRARIES:
        return load_teacher(name, path, num_classes)
    if path is not None and is_path(name):
        raise ValueError(f"--teacher is the checkpoint {name}, which needs no --teacher-path; one of them would do")
    net: Any
    if is_path(name):
        net = load_saved(name)[0]
    elif path is not None:
        net = load_into(config_of(name), path, ema=False)[0]
    else:
        net = create_model(name, pretrained=True)
    wanted = preprocessing_of(net)
    return Teacher(net, net.num_classes, wanted.mean, wanted.std)
