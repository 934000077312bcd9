"""Checkpoints into and out of the models, in every layout, and what the peers make of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from states import same
from torch import nn

from effnet_fast import weights
from effnet_fast.benchmark import calibrate, images
from effnet_fast.models import FAMILY, create_model, efficientnet
from effnet_fast.weights.layouts import LAYOUTS, key_map
from effnet_fast.weights.preprocessing import HALF, Preprocessing

efficientnet_pytorch = pytest.importorskip("efficientnet_pytorch")

SIZE = (64, 64)


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
    foreign = pytest.warns(UserWarning, match="its answers would be wrong") if layout != "timm" else contextlib.nullcontext()
    with foreign:
        weights.save_checkpoint(model, path, layout, force=True)
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


@pytest.mark.filterwarnings("ignore:.*its answers would be wrong")
@pytest.mark.parametrize("through", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_there_and_back(layout: str, through: str, b0: nn.Module, tmp_path: Path) -> None:
    weights.save_checkpoint(b0, tmp_path / "a.pth", layout, force=True)
    weights.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", through, force=True)
    config = weights.convert(tmp_path / "b.safetensors", tmp_path / "c.pth", layout, force=True)
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
    peer.load_state_dict(torch.load(target, weights_only=True))

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


# --- written for a peer, and read by it


def by_torchvision(path: Path) -> nn.Module:
    peer = torchvision.models.efficientnet_b0()
    peer.load_state_dict(torch.load(path, weights_only=True))
    return peer


def by_lukemelas(path: Path) -> nn.Module:
    peer = efficientnet_pytorch.EfficientNet.from_pretrained("efficientnet-b0", weights_path=str(path))
    other = efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0", image_size=SIZE[0])
    other.load_state_dict(torch.load(path, weights_only=True))
    assert same(peer.state_dict(), other.state_dict())
    return other


def by_timm(path: Path) -> nn.Module:
    peer = timm.create_model("tf_efficientnet_b0")
    timm.models.load_checkpoint(peer, str(path), strict=True)
    return peer


@pytest.mark.parametrize(
    ("name", "layout", "theirs"),
    [
        ("efficientnet_b0", "torchvision", by_torchvision),
        ("tf_efficientnet_b0", "lukemelas", by_lukemelas),
        ("tf_efficientnet_b0", "timm", by_timm),
    ],
)
def test_the_peer_s_own_loader_reads_it_and_answers_the_same(
    name: str, layout: str, theirs: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    ours = calibrate(create_model(name), SIZE)
    x = images(1, SIZE)
    weights.save_checkpoint(ours, tmp_path / "timm.safetensors")
    weights.convert(tmp_path / "timm.safetensors", tmp_path / "converted.pth", layout)
    weights.save_checkpoint(ours, tmp_path / "saved.pth", layout)
    for file in ("saved.pth", "converted.pth"):
        peer = theirs(tmp_path / file).eval()
        with torch.no_grad():
            exact = ours.double()(x.double())
            assert exact.std() > 1e-2
            torch.testing.assert_close(peer.double()(x.double()), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "arguments", "layout", "message"),
    [
        (
            "tf_efficientnet_b0",
            {},
            "torchvision",
            "runs tf_efficientnet_b0 with symmetric padding and eps 1e-05, and these weights want",
        ),
        ("efficientnet_b0", {}, "lukemelas", "layout 'timm' or 'torchvision' would do, or force"),
        (
            "efficientnet_b5",
            {},
            "torchvision",
            "with symmetric padding and eps 0.001, .* symmetric padding and eps 1e-05: its answers",
        ),
        ("efficientnet_b0", {"bn_eps": 1e-3}, "torchvision", "layout 'timm' would do, or force"),
    ],
)
def test_a_layout_whose_library_would_answer_wrongly_is_refused(
    name: str, arguments: dict[str, Any], layout: str, message: str, tmp_path: Path
) -> None:
    model = create_model(name, num_classes=2, **arguments)
    weights.save_checkpoint(model, tmp_path / "a.safetensors")
    calls: list[Callable[..., Any]] = [
        lambda **how: weights.save_checkpoint(model, tmp_path / "b.pth", layout, **how),
        lambda **how: weights.convert(tmp_path / "a.safetensors", tmp_path / "b.pth", layout, **how),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
        assert not (tmp_path / "b.pth").exists()
        with pytest.warns(UserWarning, match="its answers would be wrong"):
            call(force=True)
        # Even so what travels comes back.
        again = create_model(name, num_classes=2)
        weights.load_checkpoint(again, tmp_path / "b.pth")
        assert again.config == model.config
        (tmp_path / "b.pth").unlink()
