"""Pretrained weights: the table of sources, fetching, and what to do without a network."""

from __future__ import annotations

import hashlib
import json
import math
import socket
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models._registry import _model_default_cfgs as TIMM_CFGS
from torch import nn

from effnet_fast import weights
from effnet_fast.benchmark import images
from effnet_fast.models import FAMILY, create_model, efficientnet
from effnet_fast.weights import sources
from effnet_fast.weights.preprocessing import HALF, IMAGENET_MEAN, Preprocessing

efficientnet_pytorch = pytest.importorskip("efficientnet_pytorch")

SIZE = (64, 64)


def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*arguments: Any, **settings: Any) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(sources.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(sources.torch.hub, "urlopen", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("efficientnet_b0", True, "weights efficientnet_b0.ra_in1k could not be fetched from timm/efficientnet_b0.ra_in1k"),
        ("efficientnet_b0.tv_in1k", True, r"efficientnet_b0_rwightman-7f5810bc.pth \(<urlopen error no network in tests>\)"),
        ("tf_efficientnet_b0", "lukemelas_in1k", "fetched from https://.*/efficientnet-b0-355c32eb.pth"),
    ],
)
def test_no_network_is_one_sentence_with_the_way_round_it(
    name: str, pretrained: bool | str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(weights.PretrainedUnavailable, match=message) as caught:
        create_model(name, pretrained)
    assert "offline, the path of a copy of" in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_the_hub_is_asked_once_and_then_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def cached(hub_id: str, file: str, local_files_only: bool = False) -> str:
        asked.append("cache" if local_files_only else "download")
        raise LocalEntryNotFoundError("not there")

    def head(url: str, timeout: float) -> None:
        asked.append(f"head {timeout}")
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", head)
    with pytest.raises(weights.PretrainedUnavailable, match="name or service not known"):
        weights.fetch(weights.source_of("efficientnet_b0"))
    assert asked == ["cache", "head 10.0"]


def test_a_download_is_checked_against_its_hash(b0: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served.pth"
    torch.save(b0.state_dict(), served)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(sources.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    timeouts = []

    def opened(request: Any) -> Any:
        timeouts.append(socket.getdefaulttimeout())
        return urllib.request.urlopen(served.as_uri())

    monkeypatch.setattr(sources.torch.hub, "urlopen", opened)
    before = socket.getdefaulttimeout()
    wrong = weights.Source("efficientnet_b0", "x", Preprocessing(8, 8), url="https://example.org/b0-00000000.pth")
    with pytest.raises(weights.PretrainedUnavailable, match='invalid hash value .expected "00000000"'):
        weights.fetch(wrong)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    right = replace(wrong, url=f"https://example.org/b0-{digest}.pth")
    assert weights.fetch(right).read_bytes() == served.read_bytes()
    assert weights.fetch(right) == tmp_path / "hub" / "checkpoints" / f"b0-{digest}.pth"
    assert timeouts == [10.0, 10.0] and socket.getdefaulttimeout() == before


def test_a_file_or_directory_in_place_of_the_network(tmp_path: Path) -> None:
    peer = torchvision.models.efficientnet_b0()
    name = "efficientnet_b0_rwightman-7f5810bc.pth"
    torch.save(peer.state_dict(), tmp_path / name)
    for path in (tmp_path, tmp_path / name, str(tmp_path / name)):
        ours = create_model("efficientnet_b0", pretrained=path)
        assert torch.equal(ours.classifier.weight, peer.classifier[1].weight)
        assert ours.default_cfg["tag"] == "tv_in1k" and ours.default_cfg["url"].endswith(name)
        assert weights.preprocessing_of(ours) == Preprocessing(224, 256)

    hub = tmp_path / "hub"
    hub.mkdir()
    ported = timm.create_model("tf_efficientnet_b0")
    save_file(ported.state_dict(), hub / "model.safetensors")
    card = {"architecture": "tf_efficientnet_b0", "pretrained_cfg": {"tag": "ap_in1k"}}
    (hub / "config.json").write_text(json.dumps(card))
    ours = create_model("tf_efficientnet_b0", pretrained=hub)
    assert weights.preprocessing_of(ours).mean == HALF
    assert ours.default_cfg["hf_hub_id"] == "timm/tf_efficientnet_b0.ap_in1k"
    with pytest.raises(ValueError, match="holds weights of tf_efficientnet_b0, .* and the model is efficientnet_b0"):
        create_model("efficientnet_b0", pretrained=hub)
    (hub / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        create_model("tf_efficientnet_b0", pretrained=hub)
    (hub / "config.json").unlink()
    ours = create_model("tf_efficientnet_b0", pretrained=hub)
    assert weights.preprocessing_of(ours) == Preprocessing(224, 256)
    assert "tag" not in ours.default_cfg


@pytest.mark.parametrize(
    ("name", "peer", "file", "expected"),
    [
        ("efficientnet_b4", "efficientnet_b4", "efficientnet_b4_rwightman-23ab8bcd.pth", Preprocessing(380, 384)),
        ("efficientnet_b4", "efficientnet_b4", "mine.pth", Preprocessing(380, 384)),
        (
            "efficientnetv2_s",
            "efficientnet_v2_s",
            "efficientnet_v2_s-dd5fe13b.pth",
            Preprocessing(384, 384, interpolation="bilinear"),
        ),
        ("efficientnetv2_s", "efficientnet_v2_s", "mine.pth", Preprocessing(384, 384, interpolation="bilinear")),
        ("efficientnet_b1", "efficientnet_b1", "efficientnet_b1_rwightman-bac287d4.pth", Preprocessing(240, 256)),
        ("efficientnet_b1", "efficientnet_b1", "mine.pth", Preprocessing(240, 255, interpolation="bilinear")),
        ("efficientnet_b0", "lukemelas", "adv-efficientnet-b0-b64d5a18.pth", Preprocessing(224, 224, mean=HALF, std=HALF)),
        ("efficientnet_b0", "lukemelas", "mine.pth", Preprocessing(224, 224)),
    ],
)
def test_preprocessing_travels_with_a_library_s_own_file(
    name: str, peer: str, file: str, expected: Preprocessing, tmp_path: Path
) -> None:
    if peer == "lukemelas":
        theirs = efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0", num_classes=3)
    else:
        theirs = torchvision.models.get_model(peer, num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / file)
    ours = create_model(name, num_classes=3)
    weights.load_checkpoint(ours, tmp_path / file)
    assert weights.preprocessing_of(ours) == expected
    assert ("tag" in ours.default_cfg) == (file != "mine.pth")
    weights.convert(tmp_path / file, tmp_path / "ours.safetensors", "timm", FAMILY.values())
    assert weights.read(tmp_path / "ours.safetensors").preprocessing == expected
    # What a file says of itself comes first.
    said = Preprocessing(96, 100)
    weights.save_checkpoint(ours, tmp_path / file, preprocessing=said)
    weights.load_checkpoint(ours, tmp_path / file)
    assert weights.preprocessing_of(ours) == said and "tag" not in ours.default_cfg


def test_default_weights_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = timm.create_model("efficientnet_b2")
    save_file(peer.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(hub_id: str, file: str, local_files_only: bool = False) -> str:
        asked.append((hub_id, file))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    ours = create_model("efficientnet_b2", pretrained=True, num_classes=10)
    assert asked == [("timm/efficientnet_b2.ra_in1k", "model.safetensors")]
    assert torch.equal(ours.conv_stem.weight, peer.conv_stem.weight)
    assert weights.preprocessing_of(ours) == Preprocessing(288, 288)
    assert ours.default_cfg["num_classes"] == 1000 and ours.num_classes == 10


def test_other_classes_and_channels(b0: nn.Module, saved: Path) -> None:
    state = b0.state_dict()
    for channels, expected in (
        (1, state["conv_stem.weight"].sum(1, keepdim=True)),
        (2, state["conv_stem.weight"][:, :2] * 1.5),
        (4, torch.cat([state["conv_stem.weight"], state["conv_stem.weight"][:, :1]], 1) * 0.75),
        (6, torch.cat([state["conv_stem.weight"]] * 2, 1) * 0.5),
    ):
        torch.manual_seed(channels)
        ours = create_model("efficientnet_b0", pretrained=saved, in_chans=channels, num_classes=10)
        torch.testing.assert_close(ours.conv_stem.weight.detach(), expected)
        assert ours.classifier.weight.shape == (10, 1280)
        assert torch.equal(ours.conv_head.weight, b0.conv_head.weight)
        assert len(weights.preprocessing_of(ours).mean) == channels
    # A grey image gives one channel what it gives three.
    grey = images(1, SIZE, channels=1)
    one = create_model("efficientnet_b0", pretrained=saved, in_chans=1)
    torch.testing.assert_close(one.conv_stem(grey), b0.conv_stem(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    ours = create_model("efficientnet_b0", num_classes=10, in_chans=1)
    with pytest.raises(ValueError, match=r"3 of another shape \(conv_stem.weight is \[32, 3, 3, 3\] where \[32, 1, 3, 3\]"):
        weights.load_checkpoint(ours, saved)


@pytest.mark.parametrize(
    ("name", "pretrained", "error", "message"),
    [
        (
            "efficientnet_b0",
            "in21k",
            ValueError,
            "no pretrained weights 'in21k'; 'ra_in1k', 'ra4_e3600_r224_in1k', 'tv_in1k' or the path",
        ),
        ("efficientnet_b8", True, ValueError, "efficientnet_b8 has no pretrained weights; those of tf_efficientnet_b8"),
        ("efficientnetv2_b0", "in1k", ValueError, "those of tf_efficientnetv2_b0, which pads as TensorFlow does, or the path"),
        ("efficientnet_b0", "weights/b0.pth", FileNotFoundError, "checkpoint weights/b0.pth does not exist"),
        ("efficientnet_b0", 1.5, TypeError, "pretrained is 1.5; True, a tag or a path would do"),
    ],
)
def test_what_pretrained_cannot_be(name: str, pretrained: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_model(name, pretrained)


# --- the table of sources


def test_every_name_has_a_default_or_a_reason() -> None:
    assert weights.SOURCES.keys() <= FAMILY.keys()
    for name in FAMILY:
        if name in weights.SOURCES:
            default = weights.source_of(name)
            assert default.num_classes == 1000 and default is next(iter(weights.SOURCES[name].values()))
        else:
            with pytest.raises(ValueError, match=f"{name} has no pretrained weights; those of tf_{name}"):
                weights.source_of(name)


def test_the_hub_s_weights_are_timm_s() -> None:
    for name in FAMILY:
        theirs = TIMM_CFGS[name] if timm.is_model(name) else None
        tags = {tag: cfg for tag, cfg in (theirs.cfgs.items() if theirs else ()) if cfg.has_weights}
        ours = {tag: source for tag, source in weights.SOURCES.get(name, {}).items() if not source.url}
        assert list(ours) == list(tags)
        for tag, cfg in tags.items():
            source = ours[tag]
            size, crop_pct = (cfg.test_input_size or cfg.input_size)[-1], cfg.test_crop_pct or cfg.crop_pct
            rule = source.preprocessing
            assert (source.num_classes, rule.crop, rule.crop_mode) == (cfg.num_classes, size, cfg.crop_mode), (name, tag)
            assert (rule.interpolation, rule.mean, rule.std) == (cfg.interpolation, cfg.mean, cfg.std), (name, tag)
            # TensorFlow's rule is crop + 32, which timm rounds to a share of two or three digits.
            digits = len(str(crop_pct).partition(".")[2])
            tensorflow = rule.resize == size + 32 and abs(size / rule.resize - crop_pct) < 10.0**-digits and name.startswith("tf_")
            assert rule.resize == math.floor(size / crop_pct) or tensorflow, (name, tag)


def test_torchvision_s_weights_are_its_own() -> None:
    seen = set()
    for name in weights.SOURCES:
        short = name.replace("efficientnetv2", "efficientnet_v2")
        if short not in torchvision.models.list_models():
            continue
        theirs = {entry.url: entry.transforms() for entry in torchvision.models.get_model_weights(short)}
        ours = {source.url: source.preprocessing for source in weights.SOURCES[name].values() if source.url}
        assert ours.keys() == theirs.keys()
        for url, rule in ours.items():
            seen.add(url)
            peer = theirs[url]
            assert ([rule.crop], [rule.resize]) == (peer.crop_size, peer.resize_size)
            assert (rule.interpolation, list(rule.mean), list(rule.std)) == (peer.interpolation.value, peer.mean, peer.std)
    assert len(seen) == 12


def test_lukemelas_weights_are_its_own() -> None:
    utils = efficientnet_pytorch.utils
    for tag, table, mean in (
        ("lukemelas_in1k", utils.url_map, IMAGENET_MEAN),
        ("lukemelas_adv_in1k", utils.url_map_advprop, HALF),
    ):
        ours = {name: known[tag] for name, known in weights.SOURCES.items() if tag in known}
        assert {f"tf_{name.replace('-', '_')}": url for name, url in table.items()} == {n: s.url for n, s in ours.items()}
        for name, source in ours.items():
            size = efficientnet_pytorch.EfficientNet.get_image_size(name.removeprefix("tf_").replace("_", "-"))
            assert source.preprocessing == Preprocessing(size, size, mean=mean, std=source.preprocessing.std)
            assert (source.preprocessing.std == HALF) == (mean == HALF)


@pytest.mark.parametrize("name", FAMILY)
def test_default_cfg_is_what_timm_would_read(name: str) -> None:
    config = FAMILY[name]
    for source in (None, *weights.SOURCES.get(name, {}).values()):
        cfg = weights.default_cfg(config, source)
        rule = source.preprocessing if source else Preprocessing.of(config.resolution)
        resolved = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
        assert resolved["input_size"] == (3, rule.crop, rule.crop)
        assert math.floor(rule.crop / resolved["crop_pct"]) == rule.resize
        assert (resolved["interpolation"], resolved["crop_mode"]) == (rule.interpolation, rule.crop_mode)
        assert ("tag" in cfg, "url" in cfg or "hf_hub_id" in cfg) == (bool(source), bool(source))
        assert cfg["pool_size"] == (math.ceil(rule.crop / 32),) * 2


def test_without_weights_the_preprocessing_is_the_paper_s() -> None:
    assert weights.preprocessing_of(create_model("efficientnet_b3")) == Preprocessing(300, 332)
    assert weights.preprocessing_of(create_model("efficientnet_lite2")) == Preprocessing(260, 292, mean=HALF, std=HALF)
    small = efficientnet(width=0.3, depth=0.5, resolution=0.25, in_chans=1)
    rule = weights.preprocessing_of(small)
    assert rule.crop == small.config.resolution and rule.mean == (sum(IMAGENET_MEAN) / 3,)


@example(crop=200, margin=41)  # where crop / (crop / resize) falls just below the resize
@given(crop=st.integers(1, 2000), margin=st.integers(0, 500))
def test_the_crop_s_share_gives_the_resize_back(crop: int, margin: int) -> None:
    rule = Preprocessing(crop, crop + margin)
    assert Preprocessing.of(crop, rule.crop_pct) == rule == Preprocessing.from_dict(json.loads(json.dumps(rule.to_dict())))
