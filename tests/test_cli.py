"""The command line: what it prints, its exit codes, and one line for every bad input."""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from states import same

from effnet_fast.cli import COMMANDS, demo, digits, main
from effnet_fast.cli.model import add_model_arguments, load_model
from effnet_fast.models import EfficientNet, create_model, list_models
from effnet_fast.ops import backends, native
from effnet_fast.scaling import CompoundScaling, Cost
from effnet_fast.weights import read, save_checkpoint, write

COMMAND = [sys.executable, "-m", "effnet_fast"]
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def photograph(path: Path, width: int = 60, height: int = 50) -> Path:
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Good and bad files; the working directory while the tests of this module use it."""
    folder = tmp_path_factory.mktemp("cli")
    photograph(folder / "photo.png")
    photograph(folder / "photo.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:900])
    (folder / "text.png").write_text("no image")
    (folder / "names.txt").write_text("cat\ndog\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "empty").mkdir()
    (folder / "mixed").mkdir()
    (folder / "mixed" / "1.png").write_bytes((folder / "photo.png").read_bytes())
    (folder / "mixed" / "2.jpg").write_bytes((folder / "truncated.jpg").read_bytes())
    (folder / "mixed" / "3.png").write_bytes((folder / "photo.png").read_bytes())
    torch.save({"weight": torch.zeros(3)}, folder / "wrong.pth")
    (folder / "garbage.pth").write_text("no checkpoint")
    torch.manual_seed(0)
    net = create_model("efficientnet_b0", num_classes=2, in_chans=3)
    save_checkpoint(net, folder / "pets.pth")
    saved = read(folder / "pets.pth")
    write(folder / "named.pth", saved.state_dict, {**saved.metadata, "classes": ["cat", "dog"]})
    write(folder / "misnamed.pth", saved.state_dict, {**saved.metadata, "classes": ["cat", "dog", "cow"]})
    torch.save(net.state_dict(), folder / "plain.pth")
    averaged = {f"module.{key}": value / 2 if value.is_floating_point() else value for key, value in saved.state_dict.items()}
    torch.save({"state_dict": saved.state_dict, "state_dict_ema": averaged}, folder / "training.pth")
    huge = OrderedDict(saved.state_dict)
    huge.effnet_fast = {**saved.metadata, "head_channels": 1 << 20, "num_classes": 1 << 24}  # type: ignore[attr-defined]
    torch.save(huge, folder / "huge.pth")
    odd = OrderedDict(saved.state_dict)
    odd.effnet_fast = {**saved.metadata, "activation": "foo"}  # type: ignore[attr-defined]
    torch.save(odd, folder / "odd.pth")
    Image.new("RGB", (1, 20000)).save(folder / "sliver.png")
    save_checkpoint(create_model("tf_efficientnet_b0", num_classes=2), folder / "tf.pth")
    with contextlib.chdir(folder) if sys.version_info >= (3, 11) else _chdir(folder):
        yield folder


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# Arguments, and a piece of the one line that they get.
BAD = [
    ("bogus", "unknown command 'bogus'"),
    ("sumary efficientnet_b0", "'summary' would do"),
    ("summary", "required: NAME"),
    ("summary efficientnet_b99", "unknown model 'efficientnet_b99'"),
    ("summary efficientnet_b0 --resolution 0", "'0' is no whole number >= 1"),
    ("summary efficientnet_b0 --resolution 1.5", "'1.5' is no whole number >= 1"),
    ("summary efficientnet_b0 more", "unrecognized arguments: more"),
    ("scale", "nothing given"),
    ("scale --phi -1", "phi is -1.0"),
    ("scale --phi nan", "phi is nan"),
    ("scale --phi 99", "phi is 99.0"),
    ("scale --phi 1 --depth 2", "--phi and --depth/--width/--resolution given"),
    ("scale --phi 1 --alpha 0.9", "alpha is 0.9"),
    ("scale --depth 0", "depth is 0.0"),
    ("scale --width -1", "width is -1.0"),
    ("scale --resolution 260", "resolution is 260.0"),
    ("scale --resolution wide", "1.15 (a multiplier) or 260px would do"),
    ("scale --depth 2 --beta 1.2", "change nothing with explicit multipliers"),
    ("scale --phi 1 --training", "it needs that option"),
    ("scale --target-macs 1k", "already needs 385,814,752 MACs"),
    ("scale --target-macs 1M", "no smaller net is searched, so that or more, or a smaller base, would do"),
    ("scale --phi 0 --beta 1e200", "beta is 1e+200; a coefficient from 1 to 100 would do"),
    ("scale --target-macs big", "390M or 1.5G would do"),
    ("scale --target-memory 500", "500MB or 2GiB would do"),
    ("scale --target-memory 1MB", "already needs"),
    ("scale --phi 1 --dtype int8", "invalid choice: 'int8'"),
    ("scale --macs b99", "390M or 1.5G would do"),
    ("scale --macs 1.5G --phi 1", "--phi and --target-macs/--target-parameters/--target-memory/--target-ms given"),
    ("scale --macs 1k --parameters 1k", "and parameters is 1,000; efficientnet_b0 already needs 5,288,548 parameters"),
    ("scale --ms 0", "'0' is no number > 0"),
    ("scale --free --phi 1", "--free says how a budget is spent"),
    ("scale --macs 1.5G --free --alpha 1.2", "change nothing"),
    ("scale --macs 1.5G --free --base efficientnet_lite0", "the published points, which are of efficientnet_b0"),
    ("scale --macs 1.5G --plot out.jpg", "ends in .png"),
    ("scale --phi 1 --plot out.png", "--plot draws what a budget found"),
    ("scale --growth --macs 1G", "--target-macs given, but --growth is of twice each dimension"),
    ("scale --growth --free --training --batch 2 --dtype bf16", "--free, --batch, --dtype, --training given, but --growth"),
    ("scale --growth --phi 1 --depth 2", "--phi, --depth given, but --growth is"),
    ("scale --growth --plot out.png", "--plot given, but --growth is"),
    ("scale --phi 1 --base resnet", "invalid choice: 'resnet'"),
    ("grid --step 0.4 --tolerance 0.01", "the nearest product is 1.96, 0.04 off"),
    ("grid --out nowhere/grid.json", "in a directory that exists"),
    ("grid --out names.txt", "no file of a grid search"),
    ("predict efficientnet_b0", "required: IMAGE|DIR"),
    ("predict efficientnet_b0 nowhere.jpg", "nowhere.jpg does not exist"),
    ("predict efficientnet_b0 truncated.jpg", "truncated.jpg cannot be read: image file is truncated"),
    ("predict efficientnet_b0 photo.png text.png", "text.png cannot be read: no image"),
    ("predict efficientnet_b0 empty", "empty holds no images"),
    ("predict efficientnet_c0 photo.png", "unknown model 'efficientnet_c0'"),
    ("predict efficientnet_b0 photo.png --top 0", "'0' is no whole number >= 1"),
    ("predict efficientnet_b0 photo.png --top -3", "'-3' is no whole number >= 1"),
    ("predict efficientnet_b0 photo.png --top many", "'many' is no whole number >= 1"),
    ("predict efficientnet_b0 photo.png --batch 0", "'0' is no whole number >= 1"),
    ("predict efficientnet_b0 photo.png --shard 2/2", "'2/2' is no share; 0/2 and 1/2 would do"),
    ("predict efficientnet_b0 photo.png --shard 0/0", "'0/0' is no share"),
    ("predict efficientnet_b0 photo.png --shard -1/2", "--shard"),
    ("predict efficientnet_b0 --shard photo.png", "'photo.png' is no share"),
    (
        "predict efficientnet_b0 photo.png --shard",
        "RANK and WORLD_SIZE are not set, as torchrun does",
    ),
    ("predict efficientnet_b0 photo.png --device meta", "--device is 'meta'"),
    ("predict efficientnet_b0 photo.png --device toaster", "--device is 'toaster'"),
    ("predict efficientnet_b0 photo.png --checkpoint nowhere.pth", "nowhere.pth does not exist"),
    ("predict efficientnet_b0 photo.png --checkpoint garbage.pth", "garbage.pth is damaged or no checkpoint"),
    ("predict efficientnet_b0 photo.png --checkpoint wrong.pth", "wrong.pth: the keys are in no layout known here"),
    ("predict efficientnet_b1 photo.png --checkpoint plain.pth", "does not fit efficientnet_b1"),
    ("predict efficientnet_b0 photo.png --checkpoint plain.pth --classes nowhere.txt", "nowhere.txt: No such file"),
    ("predict efficientnet_b0 photo.png --checkpoint plain.pth --classes latin.txt", "latin.txt, which is no UTF-8 text"),
    ("predict efficientnet_b0 photo.png --checkpoint misnamed.pth", "3 class names for a model of 2 classes"),
    ("predict efficientnet_b0 photo.png --classes names.txt", "2 class names for a model of 1000 classes"),
    ("predict efficientnet_b0 photo.png --pretrained --checkpoint plain.pth", "not allowed with argument"),
    ("predict plain.pth photo.png", "plain.pth does not say which network it is of"),
    ("predict pets.pth photo.png --checkpoint plain.pth", "it needs no --checkpoint"),
    ("predict odd.pth photo.png", "odd.pth: the metadata beside its tensors is damaged: NetConfig: activation is 'foo'"),
    ("predict huge.pth photo.png", "huge.pth (timm layout) fits no known net"),
    ("predict efficientnet_b0 sliver.png", "sliver.png: 1 x 20000 pixels is too elongated"),
    ("predict ../nowhere/x photo.png", "checkpoint ../nowhere/x does not exist"),
    ("predict efficientnet_b0 photo.png --ema", "--ema chooses among the weights of a checkpoint"),
    ("predict pets.pth photo.png --ema", "pets.pth holds no averaged weights"),
    ("predict efficientnet_b8 photo.png --pretrained", "efficientnet_b8 has no pretrained weights"),
    ("predict efficientnet_b0.nobody photo.png", "no pretrained weights 'nobody'"),
    ("cam pets.pth photo.png --out cam.jpg", "ends in .png"),
    ("cam pets.pth photo.png --out nowhere/cam.png", "in a directory that exists"),
    ("cam pets.pth photo.png --out cam.png --class 2", "0 to 1 would do"),
    (f"cam pets.pth photo.png --class {10**30}", "0 to 1 would do"),
    ("cam pets.pth photo.png --out cam.png --class -1", "'-1' is no whole number >= 0"),
    ("cam pets.pth truncated.jpg --out cam.png", "truncated.jpg cannot be read"),
    ("convert pets.pth out.pth", "required: --layout"),
    ("convert nowhere.pth out.pth --layout timm", "nowhere.pth does not exist"),
    ("convert wrong.pth out.pth --layout timm", "wrong.pth: the keys are in no layout known here"),
    ("convert pets.pth out.pth --layout keras", "invalid choice: 'keras'"),
    ("convert pets.pth out.zip --layout timm", "ends in '.zip'"),
    ("convert plain.pth out.pth --layout timm", "differ in padding and batch norm's eps; naming the architecture would do"),
    ("convert pets.pth out.pth --layout timm --model nobody", "unknown model 'nobody'"),
    (
        "convert pets.pth out.pth --layout lukemelas",
        "its answers would be wrong; layout 'timm' or 'torchvision' would do, or force",
    ),
    ("convert pets.pth out.pth --layout timm --ema", "pets.pth holds no averaged weights"),
    ("demo --epochs 0", "'0' is no whole number >= 1"),
    ("demo --out photo.png", "photo.png"),
]


@pytest.mark.parametrize(("arguments", "piece"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_gets_one_line(arguments: str, piece: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"effnet-fast: error: [^\n]+\n", err), err
    assert piece in err
    assert not (folder / "out.pth").exists() and not (folder / "cam.png").exists()


def test_a_subprocess_has_the_same_manners(folder: Path) -> None:
    result = run("predict", "efficientnet_b0", "truncated.jpg")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"effnet-fast: error: truncated\.jpg cannot be read: [^\n]+\n", result.stderr)


def test_summary_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("summary", "efficientnet_b5")
    assert result.returncode == 0 and result.stderr == ""
    assert "30,389,784 parameters, 10.27 GMACs" in result.stdout and "efficientnet_b5 at 456x456" in result.stdout
    stage = next(line for line in result.stdout.splitlines() if line.startswith("blocks.4"))
    assert stage.split()[1:10] == ["MBConv6", "5x5", "1", "6", "0.25", "128", "176", "7", "29x29"]
    for name, resolution_of in (("efficientnetv2_s", 384), ("efficientnet_lite0", 100)):
        assert main(["summary", name, "--json", "--resolution", str(resolution_of)]) == 0
        found = json.loads(capsys.readouterr().out)
        cost = Cost.of(create_meta(name), resolution_of)
        for total in ("parameters", "macs", "activations"):
            assert found[total] == getattr(cost, total) == sum(row[total] for row in found["stages"])
        assert found["resolution"] == [resolution_of] * 2
    assert main(["summary", "efficientnetv2_s"]) == 0
    out = capsys.readouterr().out
    assert "FusedMBConv4" in out and "Conv3x3" in out and "MBConv6" in out


def create_meta(name: str):  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        return create_model(name).config


def scaled(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["scale", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_scale(capsys: pytest.CaptureFixture[str]) -> None:
    law = CompoundScaling()
    base = scaled(capsys, "--phi", "0")
    assert (base["parameters"], base["macs"], base["nearest"]) == (5_288_548, 385_814_752, "efficientnet_b0")
    assert base["constraint"] == pytest.approx(1.2 * 1.1**2 * 1.15**2)
    for option, target, key in (("--target-macs", "1.5G", "macs"), ("--target-memory", "2GiB", "training_memory")):
        training = ("--training", "--batch", "8", "--dtype", "bf16") if key == "training_memory" else ()
        found = scaled(capsys, option, target, *training)
        limit = {"macs": 1.5e9, "training_memory": 2 * 1024**3}[key]
        more = Cost.of(law.at(found["phi"] + 1e-6).config)
        value, beyond = found[key], more.macs
        if key == "training_memory":
            value, beyond = value["total"], more.training_memory("bf16", 8).total
        assert value <= limit < beyond
    small = scaled(capsys, "--depth", "0.5", "--width", "0.5", "--resolution", "128px")
    assert small["resolution"] == [128, 128] and small["phi"] is None
    assert scaled(capsys, "--resolution", "2")["resolution"] == [448, 448]
    assert scaled(capsys, "--phi", "1", "--gamma", "1")["resolution"] == [224, 224]
    for arguments in (["--phi", "3"], ["--depth", "0.5"], ["--target-macs", "1.5G"]):
        assert main(["scale", *arguments]) == 0
        out = capsys.readouterr().out
        assert "MBConv6" in out and "nearest" in out and "memory" in out
        assert ("alpha * beta^2 * gamma^2 = 1.92" in out) == (arguments[0] != "--depth")


def test_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "named.pth", "photo.png", "photo.jpg"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "cat" in out and "dog" in out and "photo.jpg" in out
    answers = []
    for arguments in (["named.pth"], ["efficientnet_b0", "--checkpoint", "plain.pth", "--classes", "names.txt"]):
        assert main(["predict", *arguments, "photo.png", "photo.jpg", "--json", "--top", "1", "--batch", "1"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["image"] for row in rows] == ["photo.png", "photo.jpg"] and all(len(row["labels"]) == 1 for row in rows)
        answers.append(rows)
    assert [row["labels"][0]["name"] for row in answers[0]] == [row["labels"][0]["name"] for row in answers[1]]
    assert main(["predict", "pets.pth", "photo.png"]) == 0
    assert "name" not in capsys.readouterr().out


def test_predict_goes_on_after_a_damaged_file_in_a_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "pets.pth", "mixed", "--json"]) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["mixed/1.png", "mixed/3.png"]
    assert re.fullmatch(r"effnet-fast: error: mixed/2\.jpg cannot be read: [^\n]+\n", err)


def test_cam_draws_and_owns_up_to_random_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["cam", "efficientnet_b0", "photo.png", "photo.jpg", "--class", "7", "--out", "cam.png"]) == 0
        out, err = capsys.readouterr()
        assert "class 7" in out and "random" in err
        with Image.open("cam.png") as picture:
            random = np.asarray(picture)
        assert main(["cam", "named.pth", "photo.png", "photo.jpg"]) == 0  # cam.png is the default
        assert capsys.readouterr().err == ""
        with Image.open("cam.png") as picture:
            trained = np.asarray(picture)
    finally:
        Path("cam.png").unlink(missing_ok=True)
    assert random.shape == trained.shape and random.shape[0] > 2 * 384 and random.shape[1] > 2 * 384
    red = (198, 40, 40)
    assert (random == red).all(-1).any() and not (trained[:84] == red).all(-1).any()


def test_convert_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "there.pth", tmp_path / "back.safetensors"
    assert main(["convert", "pets.pth", str(there), "--layout", "torchvision"]) == 0
    assert "in the layout of torchvision" in capsys.readouterr().out
    assert "features.0.0.weight" in read(there).state_dict
    assert main(["convert", str(there), str(back), "--layout", "timm"]) == 0
    assert "efficientnet_b0 (symmetric padding, batch norm eps 1e-05)" in capsys.readouterr().out
    before, after = read("pets.pth").state_dict, read(back).state_dict
    assert same(before, after)


def test_force_and_averaged_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "tf.pth", str(tmp_path / "tv.pth"), "--layout", "torchvision", "--force"]) == 0
    err = capsys.readouterr().err
    assert re.fullmatch(r"effnet-fast: warning: [^\n]*its answers would be wrong\n", err)
    stems = []
    for option in ([], ["--ema"]):
        target = tmp_path / f"b{len(option)}.safetensors"
        assert main(["convert", "training.pth", str(target), "--layout", "timm", "--model", "efficientnet_b0", *option]) == 0
        stems.append(read(target).state_dict["conv_stem.weight"])
    assert torch.equal(stems[0], 2 * stems[1])
    arguments = ["efficientnet_b0", "photo.png", "--checkpoint", "training.pth"]
    capsys.readouterr()
    answers = []
    for option in ([], ["--ema"]):
        assert main(["predict", *arguments, "--json", *option]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
    assert main(["cam", *arguments, "--ema", "--out", str(tmp_path / "map.png")]) == 0


@pytest.mark.parametrize(
    ("name", "file"), [("efficientnet_b4", "efficientnet_b4_rwightman-23ab8bcd.pth"), ("efficientnetv2_s", "x.pth")]
)
def test_a_plain_torchvision_file_is_predicted_with_torchvision_s_preprocessing(name: str, file: str, tmp_path: Path) -> None:
    theirs = torchvision.models.get_model(name.replace("v2", "_v2"), num_classes=2)
    torch.save(theirs.state_dict(), tmp_path / file)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    loaded = load_model(parser.parse_args([name, "--checkpoint", str(tmp_path / file), "--device", "cpu"]))
    published = torchvision.models.get_model_weights(name.replace("v2", "_v2")).DEFAULT.transforms()
    rule = loaded.preprocessing
    assert ([rule.crop], [rule.resize], rule.interpolation) == (
        published.crop_size,
        published.resize_size,
        published.interpolation.value,
    )


def test_closed_and_full_outputs() -> None:
    """One line, exit code 2, and no traceback when the interpreter flushes at its end."""
    command = " ".join(map(shlex.quote, COMMAND))
    cases = [
        (">&-", r"effnet-fast: error: standard output is closed[^\n]*\n"),
        (">/dev/full", r"effnet-fast: error: [^\n]*No space left[^\n]*\n"),
        ("bogus 2>&-", ""),
    ]
    for redirected, expected in cases:
        done = subprocess.run(
            ["sh", "-c", f"{command} --version {redirected}" if redirected[0] == ">" else f"{command} {redirected}"],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=300,
        )
        assert done.returncode == 2 and done.stdout == "" and re.fullmatch(expected, done.stderr), (redirected, done)


def test_the_set_up_ends_with_one_sentence_where_pip_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(Path(__file__).with_name("run"))
    spec = importlib.util.spec_from_loader("tests_run", importlib.machinery.SourceFileLoader("tests_run", path))
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "environment", lambda: Path(sys.executable))
    monkeypatch.setattr(
        script.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 23 if "pip" in command else 0)
    )
    with pytest.raises(SystemExit) as caught:
        script.main([])
    assert caught.value.code == 23
    assert re.fullmatch(r"tests/run: \S+ -m pip install [^\n]* failed with exit code 23\n", capsys.readouterr().err)


def test_doctor_names_every_op_and_backend() -> None:
    result = run("doctor")
    assert result.returncode == 0 and result.stderr == ""
    for word in ("effnet_fast", "torch", "numpy", "CUDA runtime", "compiled module", "threads", "Pillow"):
        assert word in result.stdout
    rows = re.findall(r"^(\w+) +(native|triton|reference) +(yes|no \[\d+\]) +(yes|no \[\d+\])$", result.stdout, re.MULTILINE)
    assert {row[0] for row in rows} >= {"depthwise_conv_bn_act", "squeeze_excite_gate", "pointwise_conv_bn_act"}
    assert all(cpu == "yes" for _, backend, cpu, _ in rows if backend == "reference")
    footnotes = set(re.findall(r"^\[(\d+)\] .+$", result.stdout, re.MULTILINE))
    assert {number for row in rows for cell in row[2:] for number in re.findall(r"\d+", cell)} == footnotes


def test_help_names_every_command_and_gives_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"  {command} " in out for command in COMMANDS)
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"usage: effnet-fast {command}" in out and re.search(rf"examples?: +effnet-fast {command}", out)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"effnet-fast \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_a_missing_package_breaks_only_what_needs_it(folder: Path) -> None:
    """A machine with torch and numpy alone."""
    script = (
        "import sys\n"
        "absent = 'PIL tqdm sklearn safetensors huggingface_hub torchvision timm'\n"
        "sys.modules.update(dict.fromkeys(absent.split()))\n"
        "from effnet_fast.cli import main\n"
        "for line in sys.stdin: print(main(line.split()), file=sys.stderr)\n"
    )
    lines = ["summary efficientnet_b0", "scale --phi 1", "doctor", "convert pets.pth nothing.pth --layout timm", "predict --help"]
    needy = ["predict pets.pth photo.png", "cam pets.pth photo.png --out cam.png", "demo --out nothing --epochs 1"]
    result = subprocess.run(
        [sys.executable, "-c", script], input="\n".join(lines + needy), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    (folder / "nothing.pth").unlink()
    *codes, rest = result.stderr.split("\n", len(lines))
    assert codes == ["0"] * len(lines), result.stderr
    assert re.fullmatch(r"(effnet-fast: error: this needs \S+: pip install 'effnet-fast\[cli\]' would do\n2\n){3}", rest), rest


def test_a_reader_that_goes_away_and_an_interrupt_are_quiet(folder: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "predict", "pets.pth", *["photo.png"] * 8, "--json", "--batch", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as gone:
        assert gone.stdout is not None and gone.stderr is not None
        gone.stdout.close()
        assert gone.stderr.read() == b"" and gone.wait() == 141
    script = (
        "import os, signal, sys\n"
        "from effnet_fast.cli import demo, main\n"
        "demo.run = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(['demo']))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize(
    "command", [["-m", "effnet_fast"], ["-c", "import sys; from effnet_fast.cli import main; sys.exit(main())"]]
)
def test_an_interrupt_while_torch_is_loading_is_quiet(command: list[str], tmp_path: Path) -> None:
    """As is one that comes before: neither the package nor the command's help needs torch."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))}
    for arguments, code in ((["doctor"], 130), (["predict", "a.pth", "a.png"], 130), (["--version"], 0), (["--help"], 0)):
        result = subprocess.run(
            [sys.executable, *command, *arguments], capture_output=True, text=True, env=environment, timeout=300
        )
        assert (result.returncode, result.stderr) == (code, "") and bool(result.stdout) == (code == 0)


def test_the_demo_keeps_its_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default run, to its end: about a minute on two cores."""
    assert main(["demo", "--out", str(tmp_path / "digits")]) == 0
    out = capsys.readouterr().out
    (accuracy,) = re.findall(r"^accuracy +([\d.]+) % ", out, re.MULTILINE)
    assert float(accuracy) >= 97
    assert re.search(r"^training +([1-9]|10) of 10 blocks fused", out, re.MULTILINE)
    for word in ("285,896", "MACs", "accuracy", "fused", "digits.pth", "digits.png"):
        assert word in out
    assert re.search(r"forward +fused [\d.]+ ms and reference [\d.]+ ms for 64 images", out)
    assert len(list((tmp_path / "digits" / "held_out").glob("*.png"))) == 360
    saved = read(tmp_path / "digits" / "digits.pth")
    assert saved.metadata["classes"] == list("0123456789") and saved.config is not None and saved.config.in_channels == 1
    with Image.open(tmp_path / "digits" / "digits.png") as picture:
        assert picture.size[0] > 1000 and picture.size[1] > 500
    one = sorted((tmp_path / "digits" / "held_out").iterdir())[0]
    assert main(["predict", str(tmp_path / "digits" / "digits.pth"), str(one), "--json"]) == 0
    labels = json.loads(capsys.readouterr().out)["labels"]
    assert len(labels) == 5 and {label["name"] for label in labels} <= set("0123456789")


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
def test_the_demo_trains_by_the_kernels() -> None:
    """All of its network, forward and backward, as it says."""
    x, y = torch.randn(digits.BATCH, 1, digits.SIDE, digits.SIDE), torch.arange(digits.BATCH) % 10
    with backends.tracing() as trace:
        model = digits.train_model(x, y, 1)
    assert not [entry for entry in trace if isinstance(entry, str)]  # why one ran as plain PyTorch
    assert {choice.backend for choice in trace} == {"native"}
    ops = [choice.op for choice in trace]
    for op, count in (("conv", 1), ("depthwise_conv", 8), ("pointwise_conv", 16)):
        assert ops.count(f"{op}_stats") == ops.count(f"{op}_backward") == count, op
    assert demo._trained_fused(model, x) == "10 of 10 blocks fused"


def test_a_demo_that_learns_too_little_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train_model", lambda x, y, epochs: EfficientNet(digits.CONFIG))
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert re.search(
        r"^effnet-fast: the demo failed: [\d.]+ % of the held-out digits are right, 97% must be\n\Z", capsys.readouterr().err, re.M
    )
    assert main(["demo", "--out", str(tmp_path), "--epochs", "1"]) == 0  # asked for, so no promise


def test_summary_of_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    for name in list_models():
        assert main(["summary", name]) == 0, name
        assert f"{name} at " in capsys.readouterr().out
