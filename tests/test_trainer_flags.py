"""What the trainer has of timm's flags: each reaches what it is to change, and means what it does there."""

from __future__ import annotations

import argparse
import copy
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_folders import image_folder
from safetensors.torch import save_file
from test_trainer import PLAIN, batches, images, net
from torch import nn

import effnet_fast
from effnet_fast.cli import main
from effnet_fast.cli import train as command
from effnet_fast.inference.images import read_image
from effnet_fast.training import PRESETS, Recipe, Trainer, build_optimizer, load_teacher, train
from effnet_fast.training.data import mixing, training_transform
from effnet_fast.training.policies import options_of, policy
from effnet_fast.weights import Preprocessing, PretrainedUnavailable, source_of

v2 = pytest.importorskip("torchvision.transforms.v2")
SMALL = Preprocessing(24, 28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "data")


def arguments_of(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_arguments(parser)
    return parser.parse_args(shlex.split(line))


def test_a_command_of_timms_is_its_recipe() -> None:
    """EfficientNet-B2 with RandAugment, as timm's documentation trains it, but that every operation is stronger with m."""
    given = arguments_of(
        "/imagenet --model efficientnet_b2 -b 128 -vb 256 --sched step --epochs 450 --decay-epochs 2.4 --decay-rate .97"
        " --opt rmsproptf --opt-eps .001 -j 8 --warmup-lr 1e-6 --weight-decay 1e-5 --drop 0.3 --drop-path 0.2 --model-ema "
        "--model-ema-decay 0.9999 --aa rand-m9-mstd0.5-inc1 --remode pixel --reprob 0.2 --amp --lr .016 --warmup-epochs 3 --mixup 0"
    )
    assert (given.workers, given.validation_batch_size, given.drop, given.drop_path) == (8, 256, 0.3, 0.2)
    preset = PRESETS["randaugment"]
    assert replace(command.recipe_of(given), lr=None, lr_base=preset.lr_base) == preset


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        ({"ratio": (0.5, 2.0)}, v2.RandomResizedCrop, "ratio=(0.5, 2.0)"),
        ({"vflip": 0.7}, v2.RandomVerticalFlip, "p=0.7"),
        ({"color_jitter": 0.4}, v2.ColorJitter, "brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4)"),
        ({"reprob": 1.0}, v2.RandomErasing, "p=1.0"),
        ({"reprob": 1.0, "remode": "const"}, v2.RandomErasing, "value=[0.0]"),
        ({"aa": "original"}, v2.AutoAugment, "AutoAugmentPolicy.IMAGENET"),
        ({"aa": "trivialaugment"}, v2.TrivialAugmentWide, "num_magnitude_bins=31"),
        ({"aa": "augmix-m5-w4-d2"}, v2.AugMix, "severity=5, mixture_width=4, chain_depth=2"),
        ({"aa": "rand-m7-n3-p0.9-inc1"}, v2.RandomApply, "'p': 0.9"),
    ],
    ids=str,
)
def test_each_setting_is_a_transform(changed: dict[str, Any], kind: type, told: str, folder: Path) -> None:
    plain, transform = (training_transform(recipe, SMALL) for recipe in (PLAIN, replace(PLAIN, **changed)))
    made = [step for step in transform.transforms if isinstance(step, kind)]
    assert told in f"{made[0]} {vars(made[0])}" and len(made) == options_of(changed.get("aa", "none")).get("n", 1)
    image, differ = read_image(folder / "train" / "red" / "0.png"), 0
    for seed in range(8):
        drawn = []
        for prepare in (plain, transform, transform):
            torch.manual_seed(seed)
            drawn.append(prepare(image))
        assert torch.equal(drawn[1], drawn[2]) and drawn[1].shape == (3, 24, 24)
        differ += not torch.equal(drawn[0], drawn[1])
    assert differ >= 2


@pytest.mark.parametrize(
    ("aa", "piece"),
    [
        ("v0", "which torchvision has not; none, autoaugment, "),
        ("rand-m9-mmax40", "torchvision's rand has no 'mmax40'; m0 to 10, n1 to 100, p0 to 1, mstd0 to 100, inc1 would do"),
        ("rand-m11", "has no 'm11'"),
        ("rand-m9.5", "has no 'm9.5'"),
        ("rand-m9-inc0", "has no 'inc0'"),
        ("rand-m9-mstd0.5", "some operations are weaker for a larger m, and torchvision's are not; rand-m9-mstd0.5-inc1 would do"),
        ("rand-tweights", "has no 'tweights'"),
        ("augmix-m3-b1", "torchvision's augmix has no 'b1'; m1 to 10, w1 to 100, d1 to 100 would do"),
        ("original-mstd0.5", "aa is 'original-mstd0.5', which torchvision has not"),
    ],
)
def test_what_torchvision_cannot_do_is_named(aa: str, piece: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(PLAIN, aa=aa)
    assert str(caught.value).startswith(f"aa is {aa!r}") and piece in str(caught.value)


def test_strengths_are_timms() -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    assert options_of("rand-n3-mstd0.5-inc1") == {"m": 10, "n": 3, "p": 0.5, "mstd": 0.5, "inc": 1}
    image = v2.ToPILImage()(torch.rand(3, 20, 20))
    (layer,) = policy("rand-m9-n1-p1-inc1", [0, 0, 0], v2.InterpolationMode.BILINEAR)
    (operation,) = layer.transforms
    layer(image)
    increasing = {"Rotate": "Rotate", "ShearX": "ShearX", "Solarize": "SolarizeIncreasing", "Color": "ColorIncreasing"}
    for ours, theirs in increasing.items():
        strength = operation.augment._AUGMENTATION_SPACE[ours][0](operation.augment.num_magnitude_bins, 20, 20)
        value = float(strength[operation.augment.magnitude]) * (255 if ours == "Solarize" else 1)
        told = timm.LEVEL_TO_ARG[theirs](9, {})[0]
        assert value == pytest.approx(abs(told - 1) if ours == "Color" else abs(told), rel=0.05), ours
    (noisy,) = policy("rand-m9-n1-p1-mstd2-inc1", [0, 0, 0], v2.InterpolationMode.BILINEAR)
    drawn = set()
    for _ in range(200):
        noisy(image)
        drawn.add(noisy.transforms[0].augment.magnitude)
    assert max(drawn) == 1000 and min(drawn) < 700 and 200 > len(drawn) > 50


@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_rmsproptf_is_tensorflows(eps: float) -> None:
    """Also when the learning rate changes, and when it goes on from what was saved; timm's is no other."""
    recipe = replace(PLAIN, opt="rmsproptf", lr=0.1, opt_eps=eps, weight_decay=0.01)
    model, peer = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    peer.load_state_dict(model.state_dict())
    optimizer = build_optimizer(model, recipe)
    timms = pytest.importorskip("timm.optim").RMSpropTF(peer.parameters(), 0.1, eps=eps, momentum=0.9, weight_decay=0.01)
    expected, square, momentum = model.weight.detach().double(), torch.ones(3).double(), torch.zeros(3).double()
    for step in range(30):
        gradient = torch.tensor([[1e-3, 0.1, 10.0]]) * (1 + step % 3)
        lr = 0.1 / (1 + step // 7)
        decayed = gradient.double() + 0.01 * expected
        square = 0.9 * square + 0.1 * decayed**2
        momentum = 0.9 * momentum + lr * decayed / (square + eps).sqrt()
        expected = expected - momentum
        for weight, stepping in ((model.weight, optimizer), (peer.weight, timms)):
            weight.grad = gradient.clone()
            stepping.param_groups[0]["lr"] = lr
            stepping.step()
            torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
        if step == 4:
            saved, optimizer = copy.deepcopy(optimizer.state_dict()), build_optimizer(model, recipe)
            optimizer.load_state_dict(saved)


def test_rmsproptf_of_several_groups_is_timms() -> None:
    """Each with its own learning rate and weight decay; a parameter that has no gradient yet begins when it has one."""
    model, recipe = net(width=0.5), replace(PLAIN, opt="rmsproptf", lr=0.01, opt_eps=1e-3, weight_decay=0.1, layer_decay=0.7)
    peer = copy.deepcopy(model)
    optimizer, names = build_optimizer(model, recipe), {id(p): name for name, p in model.named_parameters()}
    theirs, groups = dict(peer.named_parameters()), []
    for group in optimizer.param_groups:
        groups.append({**group, "params": [theirs[names[id(p)]] for p in group["params"]]})
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) > 10
    keys = ("params", "lr", "weight_decay")
    timms = pytest.importorskip("timm.optim").RMSpropTF(
        [{key: group[key] for key in keys} for group in groups], 0.01, eps=1e-3, momentum=recipe.momentum
    )
    for step in range(3):
        for (name, mine), other in zip(model.named_parameters(), peer.parameters(), strict=True):
            gradient = torch.randn_like(mine)
            mine.grad, other.grad = (None, None) if step == 0 and "conv_dw" in name else (gradient, gradient.clone())
        optimizer.step()
        timms.step()
    for (name, mine), other in zip(model.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


def test_rmsproptf_waits_out_gradients_that_are_not_finite() -> None:
    """With a GradScaler, which then makes its scale smaller, nothing moves, nor begins; else steps are those without it."""
    model, recipe = nn.Linear(3, 1), replace(PLAIN, opt="rmsproptf", lr=0.1, opt_eps=1e-3)
    alone = copy.deepcopy(model)
    optimizer, other, scaler = build_optimizer(model, recipe), build_optimizer(alone, recipe), torch.amp.GradScaler("cpu", 1024.0)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(x).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 512 and not optimizer.state
    for _ in range(3):
        optimizer.zero_grad()
        other.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        alone(x).square().sum().backward()
        scaler.step(optimizer)
        scaler.update()
        other.step()
    for mine, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)


def test_batches_are_mixed_as_often_as_asked() -> None:
    x, y = images()[:4]
    kinds = {}
    for changed in ({"mixup_prob": 0.25}, {"mixup_switch_prob": 0.25}, {"mixup_switch_prob": 1.0}):
        augment = mixing(Recipe(mixup=0.5, cutmix=1.0, **changed), 3)
        assert augment is not None
        torch.manual_seed(0)
        counted = {"plain": 0, "mixup": 0, "cutmix": 0}
        for _ in range(200):
            mixed, shares = augment(x, y)
            assert shares.shape == (4, 3) and shares.dtype == torch.float32 and torch.allclose(shares.sum(1), torch.ones(4))
            counted["plain" if mixed is x else "cutmix" if (mixed == x).any() or (mixed == x.roll(1, 0)).all() else "mixup"] += 1
        kinds[str(changed)] = counted
    rarely, seldom, always = kinds.values()
    assert 130 < rarely["plain"] < 170 and rarely["cutmix"] > 10 and rarely["mixup"] > 10
    assert 35 < seldom["cutmix"] < 65 and seldom["plain"] == 0 and always == {"plain": 0, "mixup": 0, "cutmix": 200}


def test_batches_are_mixed_up_to_an_epoch() -> None:
    epochs = []

    def augment(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        epochs.append(trainer.epoch)
        return x, y

    for off, mixed in ((0, [0, 0, 0, 1, 1, 1]), (1, [0, 0, 0])):
        epochs.clear()
        recipe = replace(PLAIN, mixup_off_epoch=off)
        trainer = Trainer(net(), recipe, batches(recipe), augment=augment)
        for _ in range(2):
            list(trainer.run_epoch())
            trainer.end_epoch()
        assert epochs == mixed


def test_lines_between_steps(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(PLAIN, epochs=1)
    trainer = Trainer(net(), recipe, batches(recipe))
    means = [trainer.finite_total() / trainer.step for _ in trainer.run_epoch()]
    train(net(), batches(recipe), recipe, log_interval=1)
    *steps, epoch = capsys.readouterr().err.splitlines()
    assert steps == [
        f"epoch 1 of 1, step {number} of 3: training loss {mean:.3f}, learning rate {rate}"
        for number, mean, rate in zip((1, 2, 3), means, ("0.05", "0.0375", "0.0125"), strict=True)
    ]
    assert epoch == f"epoch 1 of 1: training loss {means[-1]:.3f}"


def test_options_reach_the_data_and_the_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the training itself."""
    data = tmp_path / "data"
    shutil.copytree(folder / "train", data / "learn")
    shutil.copytree(folder / "val", data / "dev")
    called: dict[str, Any] = {}

    def trained(model: Any, seen: Any, recipe: Recipe, **settings: Any) -> list[dict[str, float]]:
        called.update(settings, seen=seen)
        return [{"top1": 1.0}]

    monkeypatch.setattr(command, "train", trained)
    line = (
        f"train {data} --model efficientnet_b0 --train-split learn --val-split dev -b 4 -vb 5 -j 0 --log-interval 7 --img-size 40"
        f" --mean 0.1 0.2 0.3 --std 0.4 0.5 0.6 --crop-pct 0.8 --interpolation bilinear --output {tmp_path / 'out'}"
    )
    assert main(line.split()) == 0
    wanted = Preprocessing(40, 50, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert called["same"]["preprocessing"] == wanted.to_dict() and called["log_interval"] == 7
    assert (called["seen"].batch_size, called["validation"].batch_size, len(called["validation"].dataset)) == (4, 5, 12)
    assert called["after_epoch"].__self__.preprocessing == wanted
    assert Path(called["seen"].dataset.dataset.root).name == "learn"
    image = next(iter(called["validation"].of_epoch(0)))[0]
    assert image.shape == (5, 3, 40, 40) and float(image.min()) >= -0.3 / 0.4 - 1e-6 and float(image.max()) <= 0.9 / 0.4


@pytest.mark.parametrize("how", ["--pretrained", "--pretrained-path FILE", "a tag"])
def test_training_begins_with_weights_and_a_new_classifier(
    how: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything else is the file's, statistics too, and images are prepared as its weights want them."""
    torch.manual_seed(1)
    state = {name: torch.rand(value.shape) for name, value in effnet_fast.create_model("efficientnet_b0").state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    asked, began = [], {}

    def downloaded(hub_id: str, file: str, **settings: Any) -> str:
        asked.append(hub_id)
        return str(tmp_path / file)

    def trained(model: nn.Module, seen: Any, recipe: Recipe, **settings: Any) -> list[dict[str, float]]:
        began.update(settings, state=copy.deepcopy(model.state_dict()), recipe=recipe, frozen=not all_train(model))
        return [{"top1": 1.0}]

    def all_train(model: nn.Module) -> bool:
        return all(parameter.requires_grad for parameter in model.parameters())

    monkeypatch.setattr("huggingface_hub.hf_hub_download", downloaded)
    monkeypatch.setattr(command, "train", trained)
    options = how.replace("FILE", str(tmp_path / "model.safetensors")).split() if how.startswith("--") else []
    name, tag = ("efficientnet_b0", "ra_in1k") if options else ("efficientnet_b0.ra4_e3600_r224_in1k", "ra4_e3600_r224_in1k")
    assert main(["train", str(folder), "--model", name, *options, "-b", "4", "-j", "0", "--output", str(tmp_path / "out")]) == 0
    head = {key: began["state"].pop(key) for key in ("classifier.weight", "classifier.bias")}
    assert began["state"].keys() == state.keys() - head.keys()
    for key, value in began["state"].items():
        assert torch.equal(value, state[key].to(value.dtype)), key
    assert head["classifier.weight"].shape == (3, 1280) and 0.1 < head["classifier.weight"].abs().max() <= 3**-0.5
    assert head["classifier.weight"].min() < 0 and not head["classifier.bias"].any()
    assert replace(began["recipe"], batch_size=PRESETS["finetune"].batch_size) == PRESETS["finetune"] and not began["frozen"]
    if "FILE" not in how:
        assert asked == [f"timm/efficientnet_b0.{tag}"]
        assert began["same"]["preprocessing"] == source_of("efficientnet_b0", tag).preprocessing.to_dict()


IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("timm:test_resnet", [0.5] * 3, [0.5] * 3), ("torchvision:shufflenet_v2_x0_5", IMAGENET_MEAN, IMAGENET_STD)],
)
def test_a_teacher_of_a_peer_teaches(
    name: str, mean: list[float], std: list[float], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On images that the student's mean and deviation normalised."""
    library, _, of = name.partition(":")
    peers = pytest.importorskip(library)
    torch.manual_seed(0)
    peer = (peers.create_model if library == "timm" else peers.models.get_model)(of, num_classes=3).eval()
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "peer.pth")
    called: dict[str, Any] = {}

    def trained(model: Any, seen: Any, recipe: Recipe, **settings: Any) -> list[dict[str, float]]:
        called.update(settings)
        return [{"top1": 1.0}]

    monkeypatch.setattr(command, "train", trained)
    line = f"train {folder} --model efficientnet_b0 -b 4 -j 0 --teacher {name} --teacher-path {tmp_path / 'peer.pth'}"
    assert main(line.split()) == 0
    pixels = torch.rand(2, 3, 64, 64)
    x, theirs = (v2.functional.normalize(pixels, *of) for of in ((IMAGENET_MEAN, IMAGENET_STD), (mean, std)))
    torch.testing.assert_close(called["teacher"](x), peer(theirs), rtol=1e-4, atol=1e-5)
    assert called["same"]["teacher_path"].endswith("peer.pth") and not called["teacher"].training
    with pytest.raises(ValueError, match=f"peer.pth is no checkpoint of {name} with 4 classes: "):
        load_teacher(name, tmp_path / "peer.pth", 4)


def test_checkpoints_of_peers_are_read_as_they_are(tmp_path: Path) -> None:
    """Wrapped by DataParallel, from before norms counted their batches, with tables of whole numbers, averaged beside the raw."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    for name in ("resnet18", "swin_t"):
        peer = models.get_model(name, num_classes=3)
        state = {f"module.{key}": value for key, value in peer.state_dict().items() if not key.endswith("num_batches_tracked")}
        raw = {key: torch.zeros_like(value) for key, value in state.items()}
        torch.save({"state_dict": raw, "state_dict_ema": state}, tmp_path / "peer.pth")
        loaded = load_teacher(f"torchvision:{name}", tmp_path / "peer.pth", 3).model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in peer.state_dict().items())


def test_a_teacher_that_takes_other_images_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "peer.pth")
    line = (
        f"train {folder} --model efficientnet_b0 -b 4 -j 0 --img-size 40 --teacher timm:test_vit --teacher-path {tmp_path}/peer.pth"
    )
    assert main(line.split()) == 2
    assert "--teacher timm:test_vit takes no images of 40 x 40: " in capsys.readouterr().err


def test_ours_by_name_with_a_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = effnet_fast.create_model("efficientnet_b0", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    called: dict[str, Any] = {}
    monkeypatch.setattr(command, "train", lambda *_, **settings: called.update(settings) or [{"top1": 1.0}])
    line = f"train {folder} --model efficientnet_b0 -b 4 --img-size 32 --teacher efficientnet_b0 --teacher-path {tmp_path}/ours.pth"
    assert main(line.split()) == 0
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(called["teacher"](x), model.eval()(x))


def test_rmsprop_is_pytorchs() -> None:
    optimizer = build_optimizer(nn.Linear(2, 1), replace(PLAIN, opt="rmsprop", lr=0.1, opt_eps=1e-3, momentum=0.8))
    assert type(optimizer) is torch.optim.RMSprop
    assert all((group["alpha"], group["eps"], group["momentum"]) == (0.9, 1e-3, 0.8) for group in optimizer.param_groups)


def test_a_teacher_of_a_peer_has_its_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    create, get = timm.create_model, torchvision.models.get_model
    asked = []

    def of_timm(name: str, pretrained: bool = False, num_classes: int = 1000) -> nn.Module:
        asked.append((name, pretrained))
        return create(name, num_classes=num_classes)

    def of_torchvision(name: str, weights: Any = None) -> nn.Module:
        asked.append((name, weights is not None))
        return get(name)

    monkeypatch.setattr(timm, "create_model", of_timm)
    monkeypatch.setattr(torchvision.models, "get_model", of_torchvision)
    teachers = [load_teacher(name) for name in ("timm:resnet18.a1_in1k", "torchvision:resnet18")]
    assert asked == [("resnet18.a1_in1k", True), ("resnet18", True)]
    assert [(teacher.num_classes, teacher.mean[0], teacher.std[0]) for teacher in teachers] == [(1000, 0.485, 0.229)] * 2


def test_a_teacher_that_cannot_be_had_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    for name, piece in (
        ("resnet18", "'resnet18'; timm:NAME or torchvision:NAME would do"),
        ("timm:resnet19", "which timm has not; 'timm:resnet"),
        ("torchvision:fasterrcnn_resnet50_fpn", "which torchvision has not; "),
    ):
        with pytest.raises(ValueError, match=piece):
            load_teacher(name)
    for name in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(ValueError, match=f"{name}'s pretrained weights have 1000 classes, not 10; a checkpoint with these"):
            load_teacher(name, num_classes=10)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no network\nat all")))
    with pytest.raises(PretrainedUnavailable, match=r"teacher timm:resnet18 cannot be had \(no network\); a checkpoint of it"):
        load_teacher("timm:resnet18")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="the teacher timm:resnet18 needs timm: pip install timm would do"):
        load_teacher("timm:resnet18")
