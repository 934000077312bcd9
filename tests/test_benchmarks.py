"""The README's tables are what its sources say, and the comparison that they rest on is not vacuous."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_ops import OF_INFERENCE
from torch import nn

from benchmarks import findings, kernels, parity, registry, report, run, training
from effnet_fast import ops
from effnet_fast.benchmark import calibrate, images, nets, timing
from effnet_fast.benchmark.case import Entrant
from effnet_fast.benchmark.race import Clock, _groups, lanes_of, outcomes
from effnet_fast.benchmark.roofline import (
    EXPAND_DEPTHWISE,
    expand_depthwise_launches,
    op_launches,
)
from effnet_fast.benchmark.timing import EventTimer, Lane, Refused, Replayed, copies, summarize
from effnet_fast.models import FAMILY, create_model
from effnet_fast.ops import backends

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_and_the_plots_are_current(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_parity_measures_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "CASES", [("timm", "efficientnet_b0", (64, 64)), ("torchvision", "efficientnet_b0", (64, 64))])
    monkeypatch.setattr(sys, "argv", ["parity", "--out", str(tmp_path / "parity.json")])
    parity.main()
    results = json.loads((tmp_path / "parity.json").read_text())
    committed = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())
    assert results["cases"][0].keys() == committed["cases"][0].keys() and results["machine"].keys() == committed["machine"].keys()
    for case in results["cases"]:
        assert 0 < case["ours_from_float64"] < 1e-4 * case["largest_logit"]
    assert not list(tmp_path.glob(".*"))


def test_a_comparison_of_untouched_nets_would_be_vacuous():
    """What calibrate is for: fresh statistics give all images the same logits, and it refuses such a net."""
    torch.manual_seed(0)
    model = create_model("efficientnet_b0").eval()
    with torch.no_grad():
        a, b = model(images(2, (64, 64)))
        assert (a - b).abs().max() < 1e-3
        a, b = calibrate(model)(images(2, (64, 64)))
        assert (a - b).abs().max() > 1e-2
    constant = create_model("efficientnet_b0", norm_layer=torch.nn.Identity)
    for parameter in constant.parameters():
        torch.nn.init.zeros_(parameter)
    constant.classifier.bias.data.fill_(1.0)
    with pytest.raises(RuntimeError, match="vacuous"):
        calibrate(constant)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "fp32"), ("cuda", "bf16")])
@pytest.mark.parametrize("suite", registry.SUITES)
def test_registry(suite, device, dtype):
    cases, entrants = registry.cases(suite, device, dtype), registry.entrants(suite, device)
    for rows in (cases, entrants):
        assert len({row.name for row in rows}) == len(rows)
    assert registry.BASELINE[suite] in {entrant.name for entrant in registry.entrants(suite, device, quick=True)}
    assert pickle.loads(pickle.dumps(entrants)) == entrants
    assert {case.batch == 1 for case in cases} == ({False} if suite == "train" else {True, False})
    quick = registry.cases(suite, device, dtype, quick=True)
    assert all(case.nets[0] == "b0" for case in quick)
    if suite != "train":
        assert {case.name for case in quick} < {case.name for case in cases}
    if suite == "kernels":
        some = registry.cases(suite, device, dtype, nets=("b7", "b0"), most=3)
        assert {case.name for case in some} < {case.name for case in cases} and some[0].nets[0] == "b7"
        for net in ("b0", "b7"):  # three of each op that has as many, the first and the last among them
            groups = [case.group for case in some if net in case.nets and case.batch == 1]
            assert {op: groups.count(op) >= (1 if op == "conv_bn_act" else 3) for op in groups} == dict.fromkeys(groups, True)
            names = {case.name for case in some}
            depthwise = [row for row in op_launches(FAMILY[f"efficientnet_{net}"]) if row.op == "depthwise_conv_bn_act"]
            assert {f"{registry._name(row)} n1" for row in (depthwise[0], depthwise[-1])} <= names
        alone = {"global_average_pool"} | ({EXPAND_DEPTHWISE} if device == "cpu" else set())  # a plan calls it, CUDA has it
        assert {case.group for case in cases} == set(OF_INFERENCE) - alone
        for number in range(8):
            of_net = {case.launch.shape for case in cases if f"b{number}" in case.nets and case.batch == 1}
            config = FAMILY[f"efficientnet_b{number}"]
            wanted = {row.shape for row in op_launches(config)}
            wanted |= {row.shape for row in expand_depthwise_launches(config)} if device == "cuda" else set()
            assert {seen(shape) for shape in of_net} == {seen(shape) for shape in wanted}


def seen(shape):
    """The size of its images makes no other case of a gate."""
    return shape[:2] if "reduced" in dict(shape) else shape


def one_of(suite, name):
    (case,) = [case for case in registry.cases(suite, "cpu", "fp32", quick=True) if case.name == name]
    return case


def wrong(case):
    """An entrant that forgets the activation."""
    return kernels.checked(
        case, lambda arguments: kernels._eager_depthwise({**arguments, "activation": "identity"}), kernels.make(case)
    )


def crash(case):
    os._exit(3)


def test_kernel_suite(tmp_path):
    """The file has every fact; a wrong entrant is refused, a crash costs its entrant alone, and neither is timed."""
    out = tmp_path / "kernels.json"
    entrants = [*registry.entrants("kernels", "cpu", quick=True), Entrant("wrong", wrong), Entrant("crash", crash)]
    cases = [one_of("kernels", "depthwise c1152 7x7 k3s1 n1"), one_of("kernels", "pointwise c80-480 14x14 n1")]
    only = "depthwise.*(native|eager channels_last|wrong|crash)|pointwise.*eager channels_last"
    returned = run.run("kernels", cases, entrants, out, only=only, quick=True)
    results = json.loads(out.read_text())
    assert results == json.loads(json.dumps(returned)) and not list(tmp_path.glob(".*"))
    facts = results["machine"]
    assert facts["date"] and facts["commit"] and facts["cpu"] and facts["versions"]["torch"] == torch.__version__
    assert results["roofline"]["copy_bytes_s"] > 1e8 and results["roofline"]["dense_flop_s"] > 1e8
    first, second = results["cases"]
    assert first["bytes"] == 4 * (2 * 1152 * 49 + 9 * 1152 + 1152) and first["flops"] == 2 * 9 * 1152 * 49
    assert first["entrants"]["wrong"]["status"] == "refused" and "off by" in first["entrants"]["wrong"]["reason"]
    assert first["entrants"]["crash"]["status"] == "failed" and "ended with 3" in first["entrants"]["crash"]["reason"]
    for entrant in (first["entrants"]["eager channels_last"], second["entrants"]["eager channels_last"]):
        low, high = entrant["quartiles_us"]
        assert entrant["status"] == "timed" and 0 < low <= entrant["median_us"] <= high and min(entrant["passes_us"]) > 0
        assert entrant["calls"] >= 6 and entrant["sets"] >= 2 and entrant["peak_bytes"] >= 0
        assert entrant["gb_s"] > 0 and entrant["gflop_s"] > 0 and entrant["share_of_bound"] > 0
        assert entrant["caches_rotated"] == entrant["sets"] * entrant["set_bytes"] / results["roofline"]["cache_bytes"] > 3
    assert first["entrants"]["eager channels_last"]["set_bytes"] == 4 * 1152 * (49 + 9 + 4)  # images, weights, norm: no result
    assert results["roofline"]["lanes_s"] == results["roofline"]["dense_flop_s"] / 2 and results["model"].startswith("none")
    native = first["entrants"]["ours native"]
    if native["status"] == "timed":
        assert native["pieces"] == 1 and native["bytes"] == first["bytes"]
    assert native["status"] == "timed" or native["reason"] == backends.reasons()["native"]["depthwise_conv_bn_act"]
    text = findings.summary(results)
    assert "eager channels_last" in text and "wrong refused on 1 case: off by" in text
    with pytest.raises(ValueError, match="no case and entrant contains 'nothing'"):
        run.run("kernels", cases, entrants, out, only="nothing")


@pytest.mark.parametrize("case", ["conv c3-32 224x224 k3s2 n1", "gate c96 r4 n1", "pointwise c144-24 56x56 gate residual n1"])
def test_ours_is_what_eager_computes(case):
    """On the reference backend every op of the kernel suite passes the check that entrants face."""
    with torch.no_grad():
        try:
            assert kernels.ours(one_of("kernels", case), "reference").burst(0.0)
        finally:
            kernels._BACKEND.close()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_gate_gets_the_sums_of_the_depthwise_kernel(backend):
    case = one_of("kernels", "gate c96 r4 n1")
    pieces = kernels.pieces_of(case, backend)
    assert kernels.make(case, pieces=pieces)["partial"].shape == (1, pieces, 96) and pieces > 1
    assert pieces == kernels.pieces_of(one_of("kernels", "depthwise c96 112x112 k3s2 n1"), backend)
    if backends.reasons()[backend]["squeeze_excite_gate"] is None:
        with torch.no_grad():
            try:
                depthwise = kernels.make(one_of("kernels", "depthwise c96 112x112 k3s2 n1"))
                with ops.backend(backend, strict=True):
                    assert ops.depthwise_conv_bn_act(**depthwise)[1].shape[1] == pieces
                facts = kernels.ours(case, backend).facts
            finally:
                kernels._BACKEND.close()
        assert facts["pieces"] == pieces and facts["bytes"] == case.launch.bytes("fp32", 1) + 4 * 96 * (pieces - 1)


def wrong_step(case):
    """An entrant whose logits are off by a hundredth."""
    return training._checked(case, create_model("efficientnet_b0"), 2.0, lambda model: lambda x: 1.01 * model(x))


def test_training_suite(tmp_path):
    entrants = [*registry.entrants("train", "cpu", quick=True)[:1], Entrant("wrong", wrong_step)]
    cases = registry.cases("train", "cpu", "fp32", quick=True)
    results = run.run("train", cases, entrants, tmp_path / "train-cpu.json", quick=True)
    (case,) = results["cases"]
    ours, wrong = case["entrants"]["ours"], case["entrants"]["wrong"]
    assert ours["status"] == "timed" and "share_of_bound" not in ours and case["bound_us"] is None
    assert wrong["status"] == "refused" and "off by" in wrong["reason"]
    assert "ours" in findings.summary(results) and json.loads((tmp_path / "train-cpu.json").read_text()) == results


FAKE_PYTHON = """#!/usr/bin/env bash
# A CPU plays the GPU: no module can be built, two short tests, one of each suite's files.
case "$*" in
  *get_device_properties*) echo 9.0 ;;
  *setup.py*) echo "no compiler" >&2; exit 1 ;;
  *--collect-only*triton_kernels.py*) echo "tests/test_cost.py::test_a_launch_reads_a_tensor_once" ;;
  *--collect-only*) echo "tests/test_triton.py::test_reasons" ;;
  *"--suite model"*model-autotuned*) exit 3 ;;
  *benchmarks.run*) while [ $# -gt 0 ]; do [ "$1" != --out ] || cp "$RESULTS" "$2"; shift; done ;;
  *) exec "$PYTHON" "$@" ;;
esac
"""


@pytest.mark.skipif(shutil.which("timeout") is None or shutil.which("bash") is None, reason="there is no bash or no timeout")
def test_gpu_script_goes_on(tmp_path):
    """What fails is told, the rest is run; what comes back are eight files at most."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python3"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    results = {"suite": "kernels", "device": "cuda", "baseline": "eager", "cases": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    path = f"{fake.parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "RESULTS": str(tmp_path / "results.json")}
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", out], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== build: rc 1" in done.stdout and "no compiler" in done.stdout and "== without the native kernels" in done.stdout
    assert "== model-autotuned: rc 3" in done.stdout and "== ceilings: rc 2" in done.stdout  # there is no CUDA device
    assert "2 tests in" in done.stdout and sum(map(int, re.findall(r"(\d+) passed", done.stdout))) == 2
    wanted = {"table.txt", "logs.tar.gz", "kernels-cuda.json", "model-cuda.json", "train-cuda.json"}
    assert {path.name for path in out.iterdir()} == wanted
    limits = [int(limit) for limit in re.findall(r"^part [\w-]+ (\d+)", (ROOT / "benchmarks" / "gpu.sh").read_text(), flags=re.M)]
    assert sum(limits[:-3]) == 525 < 530


def test_model_suite_and_its_report(tmp_path, monkeypatch):
    out = tmp_path / "model-cpu.json"
    arguments = ["--suite", "model", "--device", "cpu", "--quick", "--only", ": (ours|timm channels_last)$", "--out", str(out)]
    assert run.main(arguments) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert case["name"] == "b0 n1" and case["bound_us"] > case["bound_L3_us"] > 0
    assert {entrant["status"] for entrant in case["entrants"].values()} == {"timed"} and len(case["entrants"]) == 2

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    told = report.speed()
    assert "| b0 | 1 | ours | 1 |" in told and "Speed-ups are over timm channels_last" in told
    assert f"`{shlex.join(['python', '-m', 'benchmarks.run', *arguments])}`" in told
    assert "torch.compile was not timed" in told and "speed on a GPU" in report.headline()
    plots = pytest.importorskip("benchmarks.plots", reason="matplotlib is not installed", exc_type=ImportError)
    drawn = plots.draw(out)
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and f"({path.name})" in report.speed()
    assert report.stale_plots() == []
    out.write_text(out.read_text().replace('"quick": true', '"quick": false'))
    assert sorted(report.stale_plots()) == sorted(drawn)


def a_case(name, group, batch, **microseconds):
    entrants = {
        who: {"status": "timed", "median_us": us, "passes_us": [us, us], "quartiles_us": [us, us], "caches_rotated": 3.5}
        for who, us in microseconds.items()
    }
    return {"name": name, "group": group, "batch": batch, "bound_us": 1.0, "entrants": entrants}


def test_what_a_file_of_timings_says():
    """Peers that are faster, missed targets, drift and small rotations are told, whatever the file holds."""
    depthwise, gate = "depthwise_conv_bn_act", "squeeze_excite_gate"
    cases = [
        a_case("one", depthwise, 1, **{"ours native": 2.0, "eager channels_last": 4.0, "eager nchw": 1.0, "compile default": 5.0}),
        a_case("two", depthwise, 16, **{"ours native": 1.0, "eager channels_last": 4.0, "compile default": 0.5}),
        a_case("three", gate, 1, **{"ours native": 1.0, "eager channels_last": 4.0}),
    ]
    cases[2]["entrants"]["ours native"] |= {"passes_us": [1.0, 0.8], "caches_rotated": 0.25}
    cases[2]["entrants"]["compile default"] = {"status": "failed", "reason": "no compiler"}
    results = {"suite": "kernels", "device": "cpu", "baseline": "eager channels_last", "cases": cases}
    assert findings.sentences(results) == [
        "torch.compile was timed as compile default, on 2 of 3 cases.",
        "Slower than the fastest of eager on 1 of 3 cases: one (0.500 of its speed).",
        "Slower than the fastest of torch.compile on 1 of 2 cases: two (0.500 of its speed).",
        f"Target missed: {depthwise}, one image, 3 times the speed of eager channels_last: 2.00.",
        f"Target met: {depthwise}, a large batch, 2 times the speed of eager channels_last: 4.00.",
        "Inputs and weights rotate past 3 last-level caches on 2 of 3 cases; "
        f"on the others ({gate}) all copies together fill as little as 0.25 of one.",
        "The two passes differ by more than 10 % in 1 of 9 timings, at most by 20 % (three: ours native).",
        "compile default failed on 1 case: no compiler",
    ]
    (two,) = [row for row in findings.figures(results) if row[:3] == (depthwise, "large", "ours native")]
    assert two[3:8] == ("1", "1", "1 - 1", "4.00", "4.00")
    many = {**results, "cases": [{**cases[0], "name": str(i)} for i in range(14)]}
    assert any(told.endswith("; and 2 more.") for told in findings.sentences(many))


def test_kernels_alone_are_told_first(monkeypatch):
    """Where no net was timed on a device the headline tells its kernels, and that no net was."""
    cases = [
        a_case("one", "pointwise", 128, **{"ours": 2.0, "ours triton": 1.0, "eager channels_last": 4.0}),
        a_case("two", "pointwise", 128, **{"ours": 1.0, "eager channels_last": 1.0}),
        a_case("three", "pointwise", 128, **{"ours": 1.0}),
    ]
    results = json.loads((ROOT / "benchmarks" / "results" / "kernels-cuda.json").read_text()) | {"cases": cases}
    assert findings.over_baseline(results) == {"pointwise": pytest.approx(2.0)}
    monkeypatch.setattr(report, "timings", lambda: {"kernels-cuda": results})
    told = report.headline()
    assert "by the speed of eager channels_last: pointwise 2.00 times." in told
    assert "**Not raced:** whole nets on a GPU." in told and "**Not measured:** speed on a CPU." in told


def test_kept_memory_is_told_for_each_batch():
    cases = [
        {"net": "efficientnet_b0", "batch": batch, "entrant": entrant, "of_eager": share}
        for batch, entrant, share in (
            (1, "ours", 0.55),
            (1, "timm, torch.compile", 0.6),
            (8, "ours", 0.37),
            (8, "timm, torch.compile", 0.61),
        )
    ]
    told = report.kept_memory({"cases": cases})
    assert "b0 at batch 1: 55 %, where torch.compile keeps 60 %; b0 at batch 8: 37 %, where torch.compile keeps 61 %" in told


def test_memory_of_nets_is_against_eagers_least():
    case = a_case("b0 n16", "b0", 16, **{"ours optimized": 1.0, "timm channels_last": 2.0, "torchvision": 2.0, "OpenVINO": 2.0})
    case["entrants"]["timm channels_last, one by one"] = dict(case["entrants"]["torchvision"])
    sizes = {
        "ours optimized": 60,
        "timm channels_last": 200,
        "torchvision": 100,
        "OpenVINO": 10,
        "timm channels_last, one by one": 5,
    }
    for name, megabytes in sizes.items():
        case["entrants"][name]["memory_bytes"] = megabytes * 10**6
    results = json.loads((ROOT / "benchmarks" / "results" / "model-cpu.json").read_text())
    (told,) = findings._memory(results | {"cases": [case]})
    assert told.startswith("Target missed: b0 at batch 16, ours optimized, 0.5 of the memory") and told.endswith(": 0.60.")
    assert findings._memory(results | {"cases": [case | {"batch": 4}]}) == []
    assert [line.split(",")[0] for line in findings._memory(results)] == ["Target met: b0 at batch 16"]


def test_targets_of_nets_are_against_the_fastest_peer():
    """Of any kind, with a runtime's throughput; a net without one has none."""
    peers = {"timm channels_last": 9.0, "OpenVINO": 6.0, "OpenVINO throughput": 4.2, "compile default": 5.0}
    cases = [
        a_case("b0 n16", "b0", 16, **{"ours": 5.0, "ours optimized": 4.0, **peers}),
        a_case("b0 n1", "b0", 1, **{"ours optimized": 4.0, "ONNX Runtime": 4.4}),
        a_case("b5 n1", "b5", 1, **{"ours optimized": 4.0}),
    ]
    results = {"suite": "model", "device": "cpu", "baseline": "timm channels_last", "cases": cases}
    assert [told for told in findings.sentences(results) if told.startswith("Target")] == [
        "Target met: b0, one image, 1 times the speed of the fastest peer: 1.10.",
        "Target missed: b0, one image, 1.2 times the speed of the fastest peer: 1.10.",
        "Target missed: b0, a large batch, 1.1 times the speed of the fastest peer: 1.05.",
        "Target missed: b0, a large batch, 1.3 times the speed of the fastest peer: 1.05.",
    ]


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git on PATH")
def test_old_timings_are_noticed(tmp_path, monkeypatch):
    """Kernels that changed since the commit of the timings, or a commit that git does not know."""

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "kernel.cpp").write_text("int f();\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.changed_since(commit) == report.changed_since(f"{commit}-dirty") == []
    (tmp_path / "csrc" / "kernel.cpp").write_text("long f();\n")
    kernels = "csrc or effnet_fast/ops or effnet_fast/nn or effnet_fast/inference"
    assert report.changed_since(commit) == [f"{kernels} changed since"]
    (tmp_path / "errors-cpu.json").write_text(json.dumps({"machine": {"commit": commit}}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.notices() == [f"errors-cpu.json was measured at {commit}: {kernels} changed since"]
    assert report.changed_since("no known commit") == [f"git cannot tell whether {kernels} changed since"]


def test_a_net_that_is_wrong_is_refused(tmp_path):
    case = replace(one_of("model", "b0 n1"), weights=str(tmp_path / "b0.pt"))
    x, plain = torch.zeros(1, 3, 224, 224), torch.zeros(1, 1000)
    torch.save({"state": {}, "images": x, "plain": plain, "reference": plain.double()}, case.weights)
    for constant in (1e-3, math.nan):
        with pytest.raises(Refused, match="off by"):
            nets.checked(case, lambda state, constant=constant: lambda x: torch.full((1, 1000), constant), 2.0)


@pytest.mark.parametrize("batch", [16, 64])
def test_swapped_images_are_refused(tmp_path, batch):
    """Two of those in the middle of a batch, by a net and by an op."""
    case = replace(one_of("model", "b0 n1"), batch=batch, weights=str(tmp_path / "b0.pt"))
    assert len(case.checked) == 16 and case.checked[0] == 0 and case.checked[-1] == batch - 1

    def mean(x):
        return x.mean((2, 3))

    def swapped(x):
        a, b = case.checked[7:9]
        order = torch.arange(len(x))
        order[[a, b]] = order[[b, a]]
        return x[order]

    x = images(16, (224, 224))
    torch.save({"state": {}, "images": x, "plain": mean(x), "reference": mean(x.double())}, case.weights)
    with pytest.raises(Refused, match="off by"):
        nets.checked(case, lambda state: lambda x: mean(swapped(x)), 2.0)
    assert nets.checked(case, lambda state: mean, 2.0).sets >= 2

    halves = replace(case, dtype="bf16")
    torch.manual_seed(0)
    model = calibrate(create_model("efficientnet_b0"), (224, 224))
    with torch.no_grad():
        told = {"state": {}, "images": x.bfloat16(), "reference": model(x).double()}
        right = copy.deepcopy(model).bfloat16()
        torch.save(told | {"plain": right(x.bfloat16())}, case.weights)
        with pytest.raises(Refused, match="off by"):
            nets.checked(halves, lambda state: lambda x: right(swapped(x)), nets.peer_factor(halves))
        assert nets.checked(halves, lambda state: right, nets.peer_factor(halves)).sets >= 2

    case = replace(one_of("kernels", "pointwise c80-480 14x14 n1"), batch=batch)
    eager = kernels._EAGER[case.group]
    with pytest.raises(Refused, match="off by"):
        kernels.checked(case, lambda a: swapped(eager(a)), kernels.make(case))
    assert kernels.checked(case, eager, kernels.make(case)).sets >= 2


@pytest.mark.gpu
def test_a_graph_is_replayed_on_each_input():
    """And each replay is timed alone, as a call of a net that torch.compile made a graph of."""
    sets = [torch.full((4,), float(i), device="cuda") for i in range(3)]
    replayed = Replayed(lambda x: 2 * x, sets[0])
    assert [replayed(x).tolist() for x in sets] == [[2.0 * i] * 4 for i in range(3)]
    assert len(EventTimer(lambda i: replayed(sets[i]), 3).burst(0.0)) == 3


def test_a_graph_keeps_the_net_whose_weights_it_reads(monkeypatch):
    """Which a CUDA graph itself does not: without the net they were freed, and a replay met an illegal address."""
    monkeypatch.setattr(timing, "captured", lambda call: (None, call()))
    net = nn.Linear(4, 4)
    kept, replayed = weakref.ref(net), Replayed(net, torch.zeros(1, 4))
    del net
    gc.collect()
    assert kept() is not None and replayed.result.shape == (1, 4)


def test_a_lane_that_hangs_is_replaced(tmp_path):
    lane = Lane(tmp_path / "log")
    try:
        answer = lane.ask(0.2, "release")
        assert answer.status == "late" and "no answer within" in answer.value and lane.process is None
        assert lane.ask(120, "release").status == "ok"
    finally:
        lane.stop()


def hang(case):
    time.sleep(600)


def test_where_time_is_short_the_others_are_raced(tmp_path):
    """Who prepares for longer than there is time is given up in time, and who would come after is not begun."""
    case = one_of("kernels", "gate c96 r4 n1")
    chosen = [Entrant("eager", kernels.eager, ("channels_last",)), Entrant("hangs", hang), Entrant("last", crash)]
    with lanes_of([entrant.name for entrant in chosen], tmp_path / "out.json") as lanes:
        for lane in lanes.values():
            lane.ask(120, "release")
        clock = Clock(8.0)
        told = outcomes(case, chosen, lanes, clock, (1, 0.02), None)
        assert clock.left > -3
        none_left = outcomes(case, chosen, lanes, Clock(0.2), (1, 0.02), None)  # some, and too little for any race
    no_time = {"status": "skipped", "reason": "no time was left"}
    assert told["eager"]["status"] == "timed" and told["hangs"] == told["last"] == no_time
    assert none_left == dict.fromkeys(none_left, no_time)
    assert [[e.name for e in group] for group in _groups(registry.entrants("train", "cuda"), "cuda")][-4:] == [
        ["ours, graph"],
        ["timm channels_last, graph"],
        ["ours, compile reduce-overhead", "compile default", "compile reduce-overhead"],
        ["compile max-autotune"],
    ]


def test_copies_pass_the_cache():
    for held, cache in ((1000, 1 << 20), (1 << 20, 1 << 20), (1 << 30, 1 << 20)):
        assert copies(held, cache, most=10**6) * held > 3 * cache and copies(held, cache) >= 2
    times = summarize([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    assert (times.median, times.passes, times.calls) == (2.5, (2.0, 4.0), 6)
    assert copies(100, 1 << 30) == 1024
