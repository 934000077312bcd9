"""Checkpoint files: what their tensors may be wrapped in, what is refused whole, and writing."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from states import same
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from effnet_fast import weights
from effnet_fast.models import FAMILY, create_model
from effnet_fast.weights import files
from effnet_fast.weights.preprocessing import Preprocessing


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


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
        lambda state: {"model": {"state_dict": state, "epoch": 3}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        lambda state: {"model_ema": {"module": state}, "loss": torch.tensor(0.5)},
        lambda state: {"net": state},
        lambda state: {"weights": state},
        lambda state: {
            "state_dict": {**{f"model.{key}": value for key, value in state.items()}, "criterion.weight": torch.ones(5)}
        },
        lambda state: {**{f"encoder.backbone.{key}": value for key, value in state.items()}, "decoder.0.weight": torch.ones(5)},
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
    wrapped = {f"module.{name}": value for name, value in mean.items()}
    lightning = {
        **{f"model.{name}": value for name, value in raw.items()},
        **{f"ema_model.{name}": v for name, v in wrapped.items()},
    }
    for number, content in enumerate(
        (
            {"state_dict": raw, "state_dict_ema": wrapped},
            {"state_dict": raw, "model_ema": wrapped},
            {"model": {"state_dict": raw, "ema": {"module": mean}}},
            {"model": raw, "model_ema": {"module": mean}},
            {"state_dict": lightning},
        )
    ):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        for ema, expected in ((False, raw), (True, mean)):
            weights.load_checkpoint(ours, path, ema=ema)
            assert same(ours.state_dict(), expected)
    named = [OrderedDict(state) for state in (raw, mean)]
    for state, name in zip(named, ("raw", "mean"), strict=True):
        state.effnet_fast = {"classes": [name]}  # type: ignore[attr-defined]
    torch.save({"state_dict": named[0], "state_dict_ema": named[1]}, tmp_path / "named.pth")
    assert [weights.read(tmp_path / "named.pth", ema).metadata["classes"] for ema in (False, True)] == [["raw"], ["mean"]]
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
        (lambda s: {**s, "classifier.weight": torch.eye(5, 1280).to_sparse()}, "classifier.weight is sparse_coo; dense tensors of"),
        (
            lambda s: {**s, "classifier.bias": torch.ones(5, dtype=torch.complex64)},
            "classifier.bias is complex64; dense tensors of",
        ),
        (
            lambda s: {**s, "classifier.bias": torch.ones(5, dtype=torch.uint8)},
            "classifier.bias is uint8; dense tensors of floating",
        ),
        (lambda s: {**s, "bn1.num_batches_tracked": torch.ones((), dtype=torch.complex64)}, "bn1.num_batches_tracked is complex64"),
        (lambda s: {**s, "classifier.bias": torch.ones(5, device="meta")}, "classifier.bias is on the meta device"),
        (
            lambda s: {f"{net}.{key}": value for net in ("student", "teacher") for key, value in s.items()},
            "holds 2 nets, under 'student.', 'teacher.'",
        ),
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


GOOD = {
    "padding": "same",
    "bn_eps": 1e-3,
    "bn_momentum": None,
    "preprocessing": Preprocessing(64, 72).to_dict(),
    "classes": list("abcde"),
}
NET = {**files.metadata_of(replace(FAMILY["efficientnet_b0"], num_classes=5)), **GOOD}
STAGE = NET["stages"][0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([1], "it is a list; a mapping would do"),
        ({"padding": "same"}, "'bn_eps' is missing"),
        ({**GOOD, "padding": "both"}, "padding is 'both'; one of 'symmetric', 'same' would do"),
        ({**GOOD, "bn_eps": -1e-3}, "bn_eps is -0.001"),
        ({**GOOD, "bn_eps": "tiny"}, "bn_eps is 'tiny'"),
        ({**GOOD, "bn_momentum": 3}, "bn_momentum is 3"),
        ({**GOOD, "classes": "abc"}, "classes is str; a list of strings would do"),
        ({**GOOD, "classes": [1, 2]}, "classes is list; a list of strings"),
        ({**GOOD, "preprocessing": 3}, "preprocessing is no mapping"),
        *(
            ({**GOOD, "preprocessing": {**GOOD["preprocessing"], field: value}}, f"{field} is ")
            for field, value in (
                ("crop", 0),
                ("crop", True),
                ("crop", 1 << 40),
                ("resize", 0.5),
                ("crop_mode", "border"),
                ("interpolation", "nearest"),
                ("mean", []),
                ("mean", [None] * 3),
                ("std", [1.0]),
                ("std", [0.2, 0.2, 0]),
            )
        ),
        ({**GOOD, "preprocessing": {**GOOD["preprocessing"], "resize": 63}}, "a crop of 64 pixels from 63"),
        ({**GOOD, "preprocessing": {**GOOD["preprocessing"], "gamma": 2}}, "unexpected keyword argument 'gamma'"),
        ({**NET, "architecture": 5}, "name is 5; a string would do"),
        ({**NET, "stages": []}, "stages is no tuple of StageConfig, or an empty one"),
        ({**NET, "stages": 5}, "not iterable"),
        ({**NET, "stages": [STAGE] * 300}, "stages has 300 rows"),
        ({**NET, "stages": [{**STAGE, "layers": 1 << 40}]}, "layers is 1099511627776; a whole number from 1 to 4096"),
        ({**NET, "stages": [{**STAGE, "se_ratio": "a"}]}, "se_ratio is 'a'"),
        ({**NET, "activation": "foo"}, "activation is 'foo'; one of 'silu', 'relu', 'relu6', 'identity' would do"),
        ({**NET, "stem_channels": -8}, "stem_channels is -8; a whole number from 1"),
        ({**NET, "head_channels": 1 << 60}, "head_channels is "),
        ({**NET, "num_classes": -1}, "num_classes is -1; a whole number from 0"),
        ({**NET, "resolution": 0}, "resolution is 0"),
        ({**NET, "dropout": 2}, "dropout is 2; a probability"),
        ({**NET, "drop_path": 10**400}, "drop_path is 1000"),
    ],
)
def test_damaged_metadata_is_named_and_nothing_is_loaded(
    metadata: Any, message: str, suffix: str, b0: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / f"odd{suffix}"
    if suffix == ".pth":
        state = OrderedDict(b0.state_dict())
        state.effnet_fast = metadata  # type: ignore[attr-defined]
        torch.save(state, path)
    else:
        save_file(b0.state_dict(), path, metadata={"effnet_fast": json.dumps(metadata)})
    ours = create_model("efficientnet_b0", num_classes=5)
    before = (copied(ours.state_dict()), ours.config, dict(ours.default_cfg))
    with pytest.raises(ValueError, match=re.escape(f"{path}: the metadata beside its tensors is damaged: ")) as caught:
        weights.load_checkpoint(ours, path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert same(ours.state_dict(), before[0]) and (ours.config, ours.default_cfg) == before[1:]


def test_whole_metadata_passes(b0: nn.Module, tmp_path: Path) -> None:
    """What the table above damages."""
    for metadata in (GOOD, NET):
        weights.write(tmp_path / "good.pth", b0.state_dict(), metadata)
        ours = create_model("efficientnet_b0", num_classes=5)
        weights.load_checkpoint(ours, tmp_path / "good.pth")
        assert (ours.config.padding, ours.config.bn_eps) == ("same", 1e-3)
        assert weights.preprocessing_of(ours) == Preprocessing(64, 72)


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
    (tmp_path / "digits.pth").write_text("is this a checkpoint? " * 50)
    itself: dict[str, Any] = {}
    itself["model"] = itself
    torch.save(itself, "itself.pth")
    torch.save({"state_dict": b0.state_dict(), "more": Arbitrary()}, "code.pth")
    torch.save(b0, "module.pt")
    torch.save({"state_dict": b0.state_dict(), "more": Arbitrary()}, "old.pth", _use_new_zipfile_serialization=False)
    save_file({}, "none.safetensors")
    (tmp_path / "empty").mkdir()
    for name, error, message in (
        ("absent.pth", FileNotFoundError, "checkpoint absent.pth does not exist"),
        ("empty", FileNotFoundError, "directory empty holds none of model.safetensors, pytorch_model.bin"),
        ("text.pth", ValueError, "text.pth is damaged or no checkpoint$"),
        ("digits.pth", ValueError, "digits.pth is damaged or no checkpoint$"),
        ("itself.pth", ValueError, "itself.pth holds no tensors"),
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
    with pytest.raises(ImportError, match=r"pip install 'effnet-fast\[weights\]'"):
        weights.save_checkpoint(b0, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'effnet-fast\[weights\]'"):
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
            with pytest.raises(OSError, match="No space left") as caught:
                weights.save_checkpoint(b0, path)
            assert caught.value.filename == str(path)
        assert path.read_bytes() == old
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(TypeError):
        weights.write(path, b0.state_dict(), {"not plain": {1, 2}} if suffix == ".safetensors" else 3)  # type: ignore[arg-type]
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_where_nothing_can_be_written(b0: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ends in '.onnx'; .safetensors or .pth, .pt, .bin would do"):
        weights.save_checkpoint(b0, tmp_path / "b0.onnx")
    long = "b" * 246 + ".pth"  # as long as most file systems allow, or nearly
    weights.save_checkpoint(b0, tmp_path / long)
    assert [path.name for path in tmp_path.iterdir()] == [long]
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        weights.save_checkpoint(b0, tmp_path / "nowhere" / "b0.pth")
    with pytest.raises(ValueError, match="layout is 'keras'"):
        weights.save_checkpoint(b0, tmp_path / "b0.pth", layout="keras")
    grouped = create_model("efficientnet_b0", norm_layer=lambda channels: nn.InstanceNorm2d(channels), num_classes=0)
    weights.save_checkpoint(grouped, tmp_path / "norms.pth", "torchvision")
    prelu = create_model("efficientnet_b0", act_layer=nn.PReLU, num_classes=0)
    with pytest.raises(ValueError, match="layout 'lukemelas' has no name for act1.weight"):
        weights.save_checkpoint(prelu, tmp_path / "prelu.pth", "lukemelas")
