"""The proofs of benchmarks/errors.py and benchmarks/soak.py at toy size: what they measure, and that they see what is wrong."""

from __future__ import annotations

import json
import math
import mmap
import threading
import time
from pathlib import Path

import pytest
import torch
from test_inference import planned

import effnet_fast
from benchmarks import errors, findings, soak
from effnet_fast.benchmark import calibrate
from effnet_fast.benchmark.case import DTYPES
from effnet_fast.benchmark.timing import resident
from effnet_fast.inference import optimize

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
SIZES = ((32, 32), (33, 40), (24, 56), (1, 64), (40, 33))  # in each of the forms
PLANS = 4  # kept: so few that a slow machine needs more in the time of a test
FORMS = ("plain", "ours", "accelerated timm", "ours optimized")


def told(path: Path) -> dict:
    return json.loads(path.read_text())


@planned
def test_errors_are_those_of_fused_forms():
    state, x = effnet_fast.create_model("efficientnet_b0").state_dict(), torch.zeros(1, 3, 32, 32)
    made = errors.forms("efficientnet_b0", state, "cpu", torch.float32)
    assert tuple(made) == FORMS
    for form in ("ours", "accelerated timm"):
        assert all(row.plain is None for row in effnet_fast.explain(made[form], x))
    made["ours optimized"](x)
    assert "one native call" in str(made["ours optimized"])


def test_errors_are_written_and_told(tmp_path, capsys):
    assert errors.main(["--out", str(tmp_path / "errors.json"), "--images", "3"]) == 0
    results, printed = told(tmp_path / "errors.json"), capsys.readouterr().out
    assert results.keys() == told(RESULTS / "errors-cpu.json").keys() and results["images"] == 3
    assert [(case["dtype"], case["form"]) for case in results["cases"]] == [(name, form) for name in DTYPES for form in FORMS]
    for case in results["cases"]:
        assert 0 < case["error"] < 0.1 * case["largest_logit"] and case["passed"]
        assert f"{case['error']:.2e}" in printed
    assert all(case["of_plain"] == 1 for case in results["cases"] if case["form"] == "plain")
    assert "NO" not in printed and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("by", [1e-3, math.nan])
def test_an_error_of_one_image_is_seen(by, monkeypatch):
    """Of the last batch alone."""

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        def forward(x: torch.Tensor) -> torch.Tensor:
            y = model(x)
            y[1, 2] += by if len(x) < errors.BATCH else 0
            return y

        return forward

    monkeypatch.setattr(errors, "BATCH", 3)
    monkeypatch.setattr(effnet_fast, "optimize_for_inference", wrong)
    monkeypatch.setattr(errors, "DTYPES", {"fp32": torch.float32})
    cases = errors.measure("efficientnet_b0", "cpu", 5, size=32)
    assert {case["form"]: case["passed"] for case in cases} == {**dict.fromkeys(FORMS, True), "ours optimized": False}
    told = errors.summary({"net": "", "device": "cpu", "images": 5, "size": 32, "rule": "", "cases": cases})
    assert [line.endswith("NO") for line in told.splitlines()[-4:]] == [False, False, False, True]


@pytest.mark.parametrize(
    ("series", "grown"),
    [
        ([1, 900, 100, 100, 105, 500, 500, 90, 101, 103], 103 / 100 - 1),
        ([1, 1, 100, 80, 80, 80, 80, 80, 80, 90], 90 / 100 - 1),
        ([7, 100, 500, 110], 110 / 100 - 1),
    ],
)
def test_growth_is_that_of_the_thirds_after_the_warm_up(series, grown):
    assert soak.growth(series) == grown


def test_growth_of_too_little_is_refused():
    with pytest.raises(ValueError, match="there are 3 samples of the memory; 4 or more would do"):
        soak.growth([1, 2, 3])


@pytest.fixture(scope="module")
def model() -> optimize.InferenceModel:
    torch.manual_seed(0)
    return effnet_fast.optimize_for_inference(calibrate(effnet_fast.create_model(soak.NET)))


@pytest.fixture(scope="module")
def batches(model) -> list[soak.Case]:
    made, wrong = soak.cases(model, SIZES, (1, 3))
    assert wrong is None
    return made


def soaked(model: optimize.InferenceModel, batches: list[soak.Case], threads: int = 3) -> dict:
    return soak.soak(model, batches, threads, 2, 0.1)


@pytest.fixture
def spoilt(monkeypatch):
    """Has every answer of a frozen copy pass through a function."""
    forward = optimize.InferenceModel.forward

    def install(spoil) -> None:
        monkeypatch.setattr(optimize.InferenceModel, "forward", lambda self, x: spoil(forward(self, x)))

    return install


@pytest.fixture
def few_plans(monkeypatch):
    monkeypatch.setattr(soak, "PLANS", PLANS)


@planned
def test_mixed_batches_from_threads(model, batches, few_plans):
    """Right, and more plans made than are kept; how the memory of so short a run grows is of no meaning."""
    assert len(batches) == 40 and len({case.name for case in batches}) == 40
    results = soaked(model, batches)
    assert results["wrong"] == 0 and results["calls"] > 20 and results["images"] > results["calls"]
    assert results["plans"]["kept"] == results["plans"]["alive"] == PLANS and results["plans"]["evicted"] > 0
    assert len(results["memory_bytes"]["resident"]) == 20 and min(results["memory_bytes"]["resident"]) > 1e8


def test_a_wrong_answer_is_seen(model, batches, spoilt):
    """By one ulp."""
    spoilt(lambda y: torch.nextafter(y, y + 1))
    results = soaked(model, batches, threads=1)
    assert results["wrong"] == results["calls"] > 0 and not results["passed"]
    assert any("the answer is not what it was alone" in what for what in results["wrong_in_words"])


def test_an_answer_that_is_written_over_is_seen(model, batches, spoilt):
    kept: dict[torch.Size, torch.Tensor] = {}
    spoilt(lambda y: kept.setdefault(y.shape, y).copy_(y))
    results = soaked(model, batches, threads=1)
    assert results["wrong"] > 0 and not results["passed"]


def test_a_call_that_raises_is_counted_and_the_others_go_on(model, batches, spoilt):
    calls = []

    def fails_once(y: torch.Tensor) -> torch.Tensor:
        calls.append(y)
        if len(calls) == 2:
            raise RuntimeError("no luck")
        return y

    spoilt(fails_once)
    results = soaked(model, batches)
    assert results["wrong"] == 1 and results["calls"] > 10 and not results["passed"]
    (what,) = results["wrong_in_words"]
    assert what.endswith("RuntimeError: no luck")


def test_a_leak_is_seen(model, batches, spoilt):
    """Of a thousandth of the process at a time: it may be large by now. In pages of its own, not in what malloc has left over."""
    leaked: list[mmap.mmap] = []
    piece, last = resident("VmRSS") // 1000, [0.0]

    def leaks(y: torch.Tensor) -> torch.Tensor:
        if time.monotonic() - last[0] > 0.02:  # at most 100 times in all
            last[0] = time.monotonic()
            leaked.append(mmap.mmap(-1, piece))
            leaked[-1].write(bytes(piece))
        return y

    spoilt(leaks)
    results = soaked(model, batches, threads=1)
    assert results["growth"]["resident"] > soak.GROWTH and not results["passed"]


@planned
def test_plans_that_outlive_their_eviction_are_seen(model, batches, few_plans, monkeypatch):
    leaked = []
    plan = optimize.NativePlan.__init__
    monkeypatch.setattr(optimize.NativePlan, "__init__", lambda self, *args: (leaked.append(self), plan(self, *args))[1])
    results = soaked(model, batches)
    assert results["plans"]["alive"] == results["plans"]["made"] > PLANS and not results["passed"]


@planned
def test_a_soak_is_written_told_and_drawn(tmp_path, monkeypatch, capsys, spoilt):
    callers = set()
    spoilt(lambda y: (callers.add(threading.get_ident()), y)[1])
    monkeypatch.setattr(soak, "SIZES", SIZES)
    monkeypatch.setattr(soak, "BATCHES", (1, 2))
    monkeypatch.setattr(soak, "INTERVAL", 0.1)
    out = tmp_path / "soak.json"
    code = soak.main(["--out", str(out), "--seconds", "1.5", "--threads", "2", "--plot"])
    results, printed = told(out), capsys.readouterr().out
    assert code == (0 if results["passed"] else 1) and ("passed" in printed) == results["passed"]
    assert results["wrong"] == 0 and f"{results['calls']:,} calls" in printed
    assert len(callers - {threading.get_ident()}) == results["threads"] == 2
    assert findings.digest(out).encode() in (tmp_path / "soak-memory.png").read_bytes()


def test_an_answer_that_is_wrong_alone_ends_it(tmp_path, monkeypatch, capsys, spoilt):
    monkeypatch.setattr(soak, "SIZES", SIZES[:1])
    spoilt(lambda y: y + 1e-4)
    assert soak.main(["--out", str(tmp_path / "soak.json")]) == 1
    assert "an answer is wrong even alone: off by 1.0" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_graphs_are_followed():
    model = effnet_fast.optimize_for_inference(calibrate(effnet_fast.create_model(soak.NET)).cuda())
    made, wrong = soak.cases(model, SIZES, (1, 3))
    results = soaked(model, made)
    assert wrong is None and results["wrong"] == 0
    assert results["plans"]["kept"] == results["plans"]["alive"] == 16 and results["plans"]["evicted"] > 0
    assert results["memory_bytes"].keys() == {"resident", "CUDA"}


def test_the_committed_proofs_hold():
    """Of README's words on them."""
    proven, soaked = told(RESULTS / "errors-cpu.json"), told(RESULTS / "soak-cpu.json")
    assert proven["passed"] and proven["images"] >= 1000 and {case["dtype"] for case in proven["cases"]} == {"fp32", "bf16", "fp16"}
    assert soaked["passed"] and soaked["wrong"] == 0 and soaked["seconds"] >= 600 and soaked["threads"] == 4
    compared = told(RESULTS / "bench-b0-bf16-cpu.json")["cases"]
    assert {case["batch"] for case in compared} == {1, 16}
    for case in compared:
        assert case["dtype"] == "bf16" and case["entrants"]["OpenVINO"]["status"] == "timed"
