"""Checkpoints: into and out of the models, in every layout, and files that are damaged."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import efficientnet_pytorch
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from effnet_fast import weights
from effnet_fast.benchmark import calibrate, images
from effnet_fast.models import FAMILY, create_model, efficientnet
from effnet_fast.weights import files
from effnet_fast.weights.layouts import LAYOUTS, key_map
from effnet_fast.weights.preprocessing import HALF, Preprocessing

SIZE = (64, 64)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


@pytest.fixture(scope="module")
def b0() -> nn.Module:
    return create_model("efficientnet_b0", num_classes=5).eval()


@pytest.fixture
def saved(b0: nn.Module, tmp_path: Path) -> Path:
    torch.save(b0.state_dict(), tmp_path / "b0.pth")
    return tmp_path / "b0.pth"


# --- peers' weights give peers' logits


def torchvision_b(number: int) -> nn.Module:
    return torchvision.models.get_model(f"efficientnet_b{number}", num_classes=50)


def lukemelas_b0() -> nn.Module:
    # It fixes its SAME padding at the size given here.
    return efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0", image_size=SIZE[0], num_classes=50)


@pytest.mark.parametrize(
    ("name", "theirs", "wrong"),
    [
        ("efficientnet_b0", lambda: torchvision_b(0), [{"padding": "same"}, {"bn_eps": 1e-3}]),
        ("efficientnet_b5", lambda: torchvision_b(5), [{"bn_eps": 1e-5}]),
        ("efficientnet_b0", lukemelas_b0, [{"padding": "symmetric"}, {"bn_eps": 1e-5}]),
    ],
)
def test_a_peer_s_weights_give_its_logits_because_its_convention_travels(
    name: str, theirs: Callable[[], nn.Module], wrong: list[dict[str, Any]], tmp_path: Path
) -> None:
    peer = calibrate(theirs(), SIZE)
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = create_model(name, num_classes=50).eval()
    # Whatever the model had before, the file's convention is adopted.
    ours.set_weights_convention("same" if ours.config.padding == "symmetric" else "symmetric", 3e-2, 0.3)
    weights.load_checkpoint(ours, tmp_path / "peer.pth")
    rules = {"padding": ours.config.padding, "bn_eps": ours.config.bn_eps, "bn_momentum": ours.config.bn_momentum}
    x = images(1, SIZE)
    with torch.no_grad():
        single, exact = peer(x), peer.double()(x.double())
        rounding = (single - exact).abs().max()
        for change in wrong:
            ours.set_weights_convention(**{**rules, **change})
            assert not (ours(x) - exact).abs().max() <= 10 * rounding  # not finite is different too
        ours.set_weights_convention(**rules)
        # In double precision ours is a thousand times nearer to theirs than their own single precision is.
        assert (ours.double()(x.double()) - exact).abs().max() < 1e-3 * rounding
    theirs_now, ours_now = ([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in (peer, ours))
    assert [(m.eps, pytest.approx(m.momentum)) for m in theirs_now] == [(m.eps, m.momentum) for m in ours_now]


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "efficientnet_lite0", "efficientnetv2_s"])
def test_timm_s_weights_load_and_keep_the_row_s_convention(name: str, tmp_path: Path) -> None:
    peer = timm.create_model(name, num_classes=3)
    save_file(peer.state_dict(), tmp_path / "peer.safetensors", metadata={"format": "pt"})
    ours = create_model(name, num_classes=3)
    weights.load_checkpoint(ours, tmp_path / "peer.safetensors")
    assert same(ours.state_dict(), peer.state_dict())
    assert ours.config == replace(FAMILY[name], num_classes=3)


# --- round trips


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_loaded_with_all_that_travels(layout: str, suffix: str, tmp_path: Path) -> None:
    model = create_model("tf_efficientnet_b0", num_classes=7, bn_eps=2e-3, bn_momentum=0.02)
    model.default_cfg |= {"mean": HALF, "std": HALF, "crop_pct": 1.0, "input_size": (3, 100, 100), "interpolation": "bilinear"}
    path = tmp_path / f"model{suffix}"
    weights.save_checkpoint(model, path, layout)
    assert list(weights.read(path).state_dict) == list(key_map(model.config, layout).values()) or suffix == ".safetensors"
    other = create_model("efficientnet_b0", num_classes=7)
    weights.load_checkpoint(other, path)
    assert same(other.state_dict(), model.state_dict())
    assert replace(other.config, name=model.config.name) == model.config
    assert {(m.eps, m.momentum) for m in other.modules() if isinstance(m, nn.BatchNorm2d)} == {(2e-3, 0.02)}
    assert weights.preprocessing_of(other) == Preprocessing(100, 100, interpolation="bilinear", mean=HALF, std=HALF)
    metadata = weights.read(path).metadata
    assert (metadata["architecture"], metadata["layout"], metadata["num_classes"]) == ("tf_efficientnet_b0", layout, 7)


def test_a_checkpoint_says_which_net_it_is_of(tmp_path: Path) -> None:
    model = efficientnet(width=0.3, depth=0.5, resolution=0.2, num_classes=2, in_chans=1)
    weights.save_checkpoint(model, tmp_path / "small.safetensors")
    assert weights.read(tmp_path / "small.safetensors").config == model.config


def test_a_norm_of_the_user_s_is_saved_as_it_is(tmp_path: Path) -> None:
    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, eps=5e-3)

    model = create_model("efficientnet_b0", num_classes=0, norm_layer=norm)
    weights.save_checkpoint(model, tmp_path / "a.pth")
    weights.load_checkpoint(model, tmp_path / "a.pth")
    assert model.bn1.eps == 5e-3

    grouped = create_model("efficientnet_b0", num_classes=0, norm_layer=lambda channels: nn.GroupNorm(1, channels))
    weights.save_checkpoint(grouped, tmp_path / "b.pth")
    again = create_model("efficientnet_b0", num_classes=0, norm_layer=lambda channels: nn.GroupNorm(1, channels))
    weights.load_checkpoint(again, tmp_path / "b.pth")
    assert same(again.state_dict(), grouped.state_dict())
    with pytest.raises(ValueError, match="surplus .bn1.running_mean"):
        weights.load_checkpoint(again, tmp_path / "a.pth")


@pytest.mark.parametrize("through", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_there_and_back(layout: str, through: str, b0: nn.Module, tmp_path: Path) -> None:
    weights.save_checkpoint(b0, tmp_path / "a.pth", layout)
    weights.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", through)
    config = weights.convert(tmp_path / "b.safetensors", tmp_path / "c.pth", layout)
    first, last = weights.read(tmp_path / "a.pth"), weights.read(tmp_path / "c.pth")
    assert same(first.state_dict, last.state_dict) and first.metadata == last.metadata
    assert config == b0.config


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (lambda: torchvision_b(0), ("efficientnet_b0", "symmetric", 1e-5)),
        (lambda: torchvision_b(5), ("efficientnet_b5", "symmetric", 1e-3)),
        (lukemelas_b0, ("tf_efficientnet_b0", "same", 1e-3)),
    ],
)
def test_convert_finds_the_net_by_its_tensors(
    peer: Callable[[], nn.Module], expected: tuple[str, str, float], tmp_path: Path
) -> None:
    theirs = peer()
    torch.save({"model": theirs.state_dict()}, tmp_path / "peer.pth")
    config = weights.convert(tmp_path / "peer.pth", tmp_path / "ours.safetensors", "timm", FAMILY.values())
    assert (config.name, config.padding, config.bn_eps) == expected and config.num_classes == 50
    ours = create_model(config.name, num_classes=50)
    weights.load_checkpoint(ours, tmp_path / "ours.safetensors")
    assert [value.sum() for value in ours.state_dict().values()] == [value.sum() for value in theirs.state_dict().values()]


def test_convert_asks_where_only_the_padding_differs(saved: Path, b0: nn.Module, tmp_path: Path) -> None:
    family = list(FAMILY.values())
    target = tmp_path / "tv.pth"
    with pytest.raises(ValueError, match="fits efficientnet_b0 and tf_efficientnet_b0, which differ in padding"):
        weights.convert(saved, target, "torchvision", family)
    assert not target.exists()
    config = weights.convert(saved, target, "torchvision", family, "efficientnet_b0")
    assert config == b0.config
    peer = torchvision.models.get_model("efficientnet_b0", num_classes=5)
    peer.load_state_dict(torch.load(target, weights_only=True)["state_dict"])

    cases = {
        ("timm", "efficientnet_b1"): r"fits no known net; the nearest is efficientnet_b1: \d+ missing",
        ("timm", "resnet50"): "unknown architecture 'resnet50'",
    }
    for (layout, architecture), message in cases.items():
        with pytest.raises(ValueError, match=message):
            weights.convert(saved, target, layout, family, architecture)
    v2 = create_model("efficientnetv2_b0", num_classes=2)
    weights.save_checkpoint(v2, tmp_path / "v2.pth")
    with pytest.raises(ValueError, match="lukemelas has no FusedMBConv"):
        weights.convert(tmp_path / "v2.pth", target, "lukemelas")


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"features_only": True}])
def test_convert_takes_nets_without_a_head(arguments: dict[str, Any], tmp_path: Path) -> None:
    backbone = create_model("efficientnet_b0", **arguments)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    weights.convert(tmp_path / "backbone.pth", tmp_path / "tv.pth", "torchvision", FAMILY.values(), "efficientnet_b0")
    weights.convert(tmp_path / "tv.pth", tmp_path / "back.pth", "timm")
    assert same(weights.read(tmp_path / "back.pth").state_dict, backbone.state_dict())


# --- what a file may be wrapped in


def averaged(model: nn.Module) -> AveragedModel:
    average = AveragedModel(nn.DataParallel(model), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(average.module)
    return average


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model": state, "loss": torch.tensor(0.5)},
        lambda state: {"model_state_dict": state},
        lambda state: {"model_ema": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model._orig_mod.module.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
    ],
)
def test_wrapped_state_dicts(wrap: Callable[[dict[str, Tensor]], Any], b0: nn.Module, tmp_path: Path) -> None:
    torch.save(wrap(copied(b0.state_dict())), tmp_path / "wrapped.pth.tar")
    ours = create_model("efficientnet_b0", num_classes=5)
    weights.load_checkpoint(ours, tmp_path / "wrapped.pth.tar")
    assert same(ours.state_dict(), b0.state_dict())


def test_averaged_weights_on_request(b0: nn.Module, tmp_path: Path) -> None:
    raw, mean = b0.state_dict(), create_model("efficientnet_b0", num_classes=5).state_dict()
    ours = create_model("efficientnet_b0", num_classes=5)
    for key in ("state_dict_ema", "model_ema"):
        path = tmp_path / f"{key}.pth"
        torch.save({"state_dict": raw, key: {f"module.{name}": value for name, value in mean.items()}}, path)
        for ema, expected in ((False, raw), (True, mean)):
            weights.load_checkpoint(ours, path, ema=ema)
            assert same(ours.state_dict(), expected)
    torch.save(averaged(b0).state_dict(), tmp_path / "swa.pth")
    for ema in (False, True):
        weights.load_checkpoint(ours, tmp_path / "swa.pth", ema=ema)
        assert same(ours.state_dict(), raw)
    torch.save(raw, tmp_path / "raw.pth")
    with pytest.raises(ValueError, match="holds no averaged weights"):
        weights.load_checkpoint(ours, tmp_path / "raw.pth", ema=True)


def test_dtype_and_headless_models(b0: nn.Module, saved: Path) -> None:
    half = create_model("efficientnet_b0", num_classes=5).to(torch.bfloat16)
    weights.load_checkpoint(half, saved)
    assert half.conv_stem.weight.dtype == torch.bfloat16
    assert torch.equal(half.conv_stem.weight, b0.conv_stem.weight.to(torch.bfloat16))
    for arguments in ({"num_classes": 0}, {"features_only": True}):
        headless = create_model("efficientnet_b0", **arguments)
        weights.load_checkpoint(headless, saved)
        assert all(torch.equal(value, b0.state_dict()[key]) for key, value in headless.state_dict().items())


# --- what does not fit


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: without(s, "blocks.3.0.conv_dw.weight"),
            r"does not fit efficientnet_b0: 1 missing \(blocks.3.0.conv_dw.weight\)$",
        ),
        (lambda s: {**s, "blocks.9.9.conv.weight": torch.zeros(1)}, r"1 surplus \(blocks.9.9.conv.weight\)$"),
        (
            lambda s: {**s, "classifier.weight": torch.zeros(8, 1280), "classifier.bias": torch.zeros(8)},
            r"2 of another shape \(classifier.weight is \[8, 1280\] where \[5, 1280\] would do, classifier.bias is \[8\]",
        ),
        (lambda s: without(without(s, "bn1.weight"), "bn1.bias") | {"bn1.scale": torch.zeros(32)}, "2 missing .*; 1 surplus"),
        (lambda s: {key.replace("blocks", "layers"): value for key, value in s.items()}, "no layout known here: .* nearest, timm"),
        (
            lambda s: torchvision.models.efficientnet_b1(num_classes=5).state_dict(),
            r"\(torchvision layout\) .* surplus \(features.1.1",
        ),
        (lambda s: {}, "holds no tensors; its entries are none"),
        (lambda s: {"epoch": 3, "best": "yes"}, "holds no tensors; its entries are epoch, best"),
        (lambda s: [torch.zeros(1)], "holds a list; a state dict would do"),
        (lambda s: {"state_dict": s, "effnet_fast": {"padding": "same"}}, "metadata beside its tensors is damaged"),
        (
            lambda s: {"state_dict": s, "effnet_fast": {"padding": "both", "bn_eps": 1e-5, "bn_momentum": 0.1}},
            "metadata beside its tensors is damaged",
        ),
        (lambda s: {"state_dict": s, "effnet_fast": {"preprocessing": {"crop": 3}}}, "metadata beside its tensors is damaged"),
    ],
)
def test_nothing_is_half_loaded(damage: Callable[[dict[str, Tensor]], Any], message: str, b0: nn.Module, tmp_path: Path) -> None:
    torch.save(damage(copied(b0.state_dict())), tmp_path / "odd.pth")
    ours = create_model("efficientnet_b0", num_classes=5)
    before = (copied(ours.state_dict()), ours.config, dict(ours.default_cfg))
    with pytest.raises(ValueError, match=message) as caught:
        weights.load_checkpoint(ours, tmp_path / "odd.pth")
    assert "\n" not in str(caught.value) and str(tmp_path / "odd.pth") in str(caught.value)
    assert same(ours.state_dict(), before[0]) and (ours.config, ours.default_cfg) == before[1:]


class Arbitrary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 4, 100, -200])
def test_truncated_files(suffix: str, kept: int, b0: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / f"cut{suffix}"
    weights.save_checkpoint(b0, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is (damaged|empty)") as caught:
        weights.load_checkpoint(b0, path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoints(b0: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("hello, world " * 50)
    torch.save({"state_dict": b0.state_dict(), "more": Arbitrary()}, "code.pth")
    torch.save(b0, "module.pt")
    torch.save({"state_dict": b0.state_dict(), "more": Arbitrary()}, "old.pth", _use_new_zipfile_serialization=False)
    save_file({}, "none.safetensors")
    (tmp_path / "empty").mkdir()
    for name, error, message in (
        ("absent.pth", FileNotFoundError, "checkpoint absent.pth does not exist"),
        ("empty", FileNotFoundError, "directory empty holds none of model.safetensors, pytorch_model.bin"),
        ("text.pth", ValueError, "text.pth is damaged or no checkpoint"),
        ("code.pth", ValueError, "code.pth holds more than tensors, and reading it would run code from it"),
        ("module.pt", ValueError, "module.pt holds more than tensors"),
        ("old.pth", ValueError, "old.pth holds more than tensors"),
        ("none.safetensors", ValueError, "none.safetensors holds no tensors"),
    ):
        with pytest.raises(error, match=message) as caught:
            weights.load_checkpoint(b0, name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(TypeError, match="the model is a ResNet; one of effnet_fast's"):
        weights.load_checkpoint(torchvision.models.resnet18(), "code.pth")  # type: ignore[arg-type]


def test_a_missing_package_is_named(b0: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install effnet-fast\[weights\]"):
        weights.save_checkpoint(b0, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install effnet-fast\[weights\]"):
        create_model("efficientnet_b0", pretrained=True)


# --- writing


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_failing_write_leaves_the_old_file_whole(
    suffix: str, b0: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"kept{suffix}"
    weights.save_checkpoint(b0, path)
    old = path.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, place, full)
            with pytest.raises(OSError, match="No space left"):
                weights.save_checkpoint(b0, path)
        assert path.read_bytes() == old
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(TypeError):
        weights.write(path, b0.state_dict(), {"not plain": {1, 2}} if suffix == ".safetensors" else 3)  # type: ignore[arg-type]
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_where_nothing_can_be_written(b0: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ends in '.onnx'; .safetensors or .pth, .pt, .bin would do"):
        weights.save_checkpoint(b0, tmp_path / "b0.onnx")
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        weights.save_checkpoint(b0, tmp_path / "nowhere" / "b0.pth")
    with pytest.raises(ValueError, match="layout is 'keras'"):
        weights.save_checkpoint(b0, tmp_path / "b0.pth", layout="keras")
    grouped = create_model("efficientnet_b0", norm_layer=lambda channels: nn.InstanceNorm2d(channels), num_classes=0)
    weights.save_checkpoint(grouped, tmp_path / "norms.pth", "torchvision")
    prelu = create_model("efficientnet_b0", act_layer=nn.PReLU, num_classes=0)
    with pytest.raises(ValueError, match="layout 'lukemelas' has no name for act1.weight"):
        weights.save_checkpoint(prelu, tmp_path / "prelu.pth", "lukemelas")
