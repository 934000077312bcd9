"""The page on scaling: written whole by one command, its numbers those of the cost model and of what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import scaling, scaling_figures, scaling_page
from effnet_fast.benchmark.latency import Latency
from effnet_fast.scaling import B0, CompoundScaling, Cost, compound_growth, multiplier_growth, search, thresholds
from effnet_fast.scaling.published import B0_SCALED, FAMILY, SCALED_UP
from effnet_fast.scaling.rules import convention
from effnet_fast.training.laboratory import EXPERIMENTS

STORED = scaling.RESULTS
FIGURES = ("growth", "phi", "accuracy", "methods", "dimensions", "saving")


def grid() -> dict:
    return json.loads(scaling.GRID.read_text())


def timed() -> dict:
    """As :func:`benchmarks.scaling.measure` would tell of a machine that takes a nanosecond for a multiply-add."""
    rows = [{"net": net.name, "turns_ms": [convention(net).macs / 1e6, convention(net).macs / 0.9e6]} for net in scaling.NETS]
    machine = {"cpu": "a CPU", "threads": 2, "commit": "0123456", "date": "2026-11-27", "versions": {"torch": "2.13"}}
    found = {"most": 800.0, "used": 790.0, "phi": 1.0, "binding": "milliseconds"}
    return {"command": "python -m benchmarks.scaling", "machine": machine, "dtype": "fp32", "latencies": rows, "search": found}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return scaling.text(timed(), grid(), tmp_path_factory.mktemp("page"))


def rows_of(page: str, title: str) -> list[list[str]]:
    """The cells of all tables of a section."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, flags=re.M | re.S)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line.startswith("| ")]


def test_the_quick_command_writes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """B0 is really timed; asked to keep the times, it writes the same page."""
    assert scaling.main(["--quick", "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert "6 figures" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"scaling.md", "scaling.json", *(f"scaling-{name}.png" for name in FIGURES)}
    measured = json.loads((out / "scaling.json").read_text())
    assert [row["net"] for row in measured["latencies"]] == ["B0"] and min(measured["latencies"][0]["turns_ms"]) > 0
    assert measured["batch"] == 1 and measured["machine"]["cpu"] and measured["search"] is None
    for name in FIGURES:
        with Image.open(out / f"scaling-{name}.png") as figure:
            pixels = np.asarray(figure.convert("L"))
        assert pixels.shape[1] > 1000 and 0.003 < (pixels < 200).mean() < 0.3
    written = (out / "scaling.md").read_text()
    assert "benchmarks.scaling --quick" in written
    for target in re.findall(r"\]\(([^)]+)\)", written):
        assert (out / target).exists(), target
    monkeypatch.setattr(scaling, "figures", lambda measured: {})
    assert scaling.main(["--kept", "--out", str(out)]) == 0 and (out / "scaling.md").read_text() == written


@pytest.mark.parametrize("arguments", [["--kept", "--out", "nowhere"], ["--kept", "--quick"], ["--nets", "b0"]])
def test_bad_input_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        scaling.main(arguments)
    assert refused.value.code == 2 and "error: " in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["", "[]", "{}", {"machine": 1}, {"latencies": []}, {"latencies": [{}]}, {"search": {}}])
def test_damaged_times_are_refused(damage: str | dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scaling.json").write_text(damage if isinstance(damage, str) else json.dumps(timed() | damage))
    with pytest.raises(SystemExit):
        scaling.main(["--kept", "--out", str(tmp_path)])
    assert f"{tmp_path / 'scaling.json'} is damaged" in capsys.readouterr().err


def test_what_cannot_be_written_is_told_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "measure", None)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit):
        scaling.main(["--out", str(file)])
    assert "File exists" in capsys.readouterr().err
    monkeypatch.setattr(scaling, "GRID", tmp_path / "grid.json")
    with pytest.raises(SystemExit):
        scaling.main(["--out", str(tmp_path)])
    assert str(tmp_path / "grid.json") in capsys.readouterr().err
    scaling.GRID.write_text("{")
    with pytest.raises(SystemExit):
        scaling.main(["--out", str(tmp_path)])
    assert f"{tmp_path / 'grid.json'} is damaged" in capsys.readouterr().err


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every published net that is built here once, and the largest of the law in twice B0's time."""
    asked: list[str] = []

    def pretended(self: Latency, net) -> float:
        asked.append(net.config.name)
        return Cost.of(net.config).macs / 1e8

    monkeypatch.setattr(Latency, "__call__", pretended)
    measured = scaling.measure()
    names = [row["net"] for row in measured["latencies"]]
    assert names == [net.name for net in (*FAMILY, *B0_SCALED[1:], *SCALED_UP)] and len(set(names)) == len(names)
    for row, net in zip(measured["latencies"], scaling.NETS, strict=True):
        assert row["turns_ms"] == 2 * [convention(net).macs / 1e8]
    found = measured["search"]
    assert found["most"] == 2 * measured["latencies"][0]["turns_ms"][0] >= found["used"] and found["binding"] == "milliseconds"
    assert asked[: len(names)] == asked[len(names) : 2 * len(names)] and len(asked) > 2 * len(names)
    assert json.loads(json.dumps(measured)) == measured


def test_stages_and_composition(page: str) -> None:
    _, *rows = rows_of(page, "A stage is a function")
    rows = rows[1:]
    assert len(rows) == len(B0.stages) + 2 and sum(int(row[5].replace(",", "")) for row in rows) == 5_288_548
    for before, after in zip(rows, rows[1:], strict=False):
        assert before[4] == after[3]  # the codomain of each is the domain of the next
    assert rows[0][3] == "R^(3x224x224)" and rows[-1][4] == "R^(1000)"
    assert "N = head o F7^1 o F6^4 o F5^3 o F4^3 o F3^2 o F2^2 o F1^1 o stem" in page
    assert "N = head o F7^2 o F6^5 o F5^4 o F4^4 o F3^3 o F2^3 o F1^2 o stem" in page


def test_batches(page: str) -> None:
    rows = rows_of(page, "The shape of a batch")
    assert [row[0] for row in rows[2:]] == ["[1, 3, 224, 224]", "[32, 3, 224, 224]", "[256, 3, 224, 224]"]
    assert rows[3][1:4] == ["19.27 MB", "9.634 MB", "[32, 1280, 7, 7]"]
    assert "(150528, 50176, 224, 1)" in page and "(150528, 1, 672, 3)" in page


def test_the_constrained_problem(page: str) -> None:
    best = search(macs=1.5e9, parameters="b2")[0]
    taken = f"macs {best.cost.macs:,}, parameters {best.cost.parameters:,}"
    assert f"solution    phi = {best.net.phi:.6g}: top-1 {best.accuracy:.2f} by the fit, {taken}" in page
    rows = rows_of(page, "The constrained problem, filled in")[2:]
    assert len(rows) == len(scaling_page.BUDGETS) + 1 and rows[-1][0] == "time here <= 800 ms"
    assert [row[7] for row in rows] == ["parameters", "macs", "macs", "macs", "memory", "milliseconds"]
    assert all(float(row[8].removesuffix(" %")) <= 100 for row in rows)
    assert "already needs 385,814,752 MACs" in page


def test_growth_of_every_family(page: str) -> None:
    rows = {(row[0], row[1]): row[2:] for row in rows_of(page, "What doubling each dimension does")}
    assert len(scaling_page.BASES) >= 15
    for name, base in scaling_page.BASES.items():
        for grown in (*multiplier_growth(base), compound_growth(base)[-1]):
            told = rows[name, grown.label]
            assert told[0] == f"{grown.macs:.2f} ({grown.macs_rule:.3g})" and told[4] == f"{grown.peak:.2f} ({grown.peak_rule:.3g})"


def test_phi_and_layers(page: str) -> None:
    law = CompoundScaling()
    rows = rows_of(page, "FLOPs as a function of phi")[2:]
    for phi, row in enumerate(rows[: len(scaling_page.PHIS)]):
        cost = Cost.of(law.at(phi).config)
        assert row[2] == f"{cost.parameters:,}" and row[4] == f"{cost.macs / 385_814_752:.2f}" and row[5] == str(2**phi)
    alone = {(row[0], row[1]): row[2:] for row in rows_of(page, "FLOPs as a function of phi") if row[0] in ("0.1", "1")}
    assert alone["1", "d=1.2"] == ["1.476", "1.200", "1.438", "1.000", "1.000"] and alone["1", "w=1.1"][:2] == ["1.148", "1.210"]
    assert alone["1", "r=1.15"][:2] == ["1.492", "1.322"] and alone["0.1", "r=1.01407"][0] == "1.167"
    assert "225 a side, alone makes 1.165 times" in page
    told = [row[2] for row in rows_of(page, "When new layers appear")[2:]]
    for number, phis in enumerate(told):
        changes = [change for change in thresholds(law, 7) if (change.part, change.quantity) == (f"blocks.{number}", "layers")]
        assert phis == ", ".join(f"{change.phi:.2f}" for change in changes)


def test_published_beside_computed(page: str) -> None:
    rows = rows_of(page, "The family side by side")[2:]
    versions = rows[len(FAMILY) + 2 :]
    assert versions[0] == ["B0", "77.3", "76.3", "77.1"] and len(versions) == len(FAMILY)
    rows = rows[: len(FAMILY)]
    assert [(row[0], row[4], row[5]) for row in rows] == [(net.name, f"{net.top1:.1f}", f"{net.top5:.1f}") for net in FAMILY]
    assert [row[10] for row in rows[:2]] == ["385.8", "686.8"] and "took over 10 % longer with 26 of 26 nets, at most 11 %" in page
    assert rows[1][8:] == [".70B", "686.8 M (-1.9 %)", "686.8"] and rows[0][7] == "5.289 M"
    scaled = rows_of(page, "One dimension at a time, and all three")
    assert {net.name for net in (*B0_SCALED, *SCALED_UP)} <= {row[0] for row in scaled}
    assert "The best dimension alone brings 1.8 points, all three 3.8" in page


def test_savings_are_the_closed_forms() -> None:
    separable, inverted, against_one = scaling_figures.SAVINGS.values()
    for channels in (8, 64, 1024):
        for k in scaling_figures.KERNELS:
            assert separable(channels, k) == pytest.approx(1 - 1 / channels - 1 / k**2)
            assert inverted(channels, k) == pytest.approx(1 - (2 + k**2 / channels) / (1 + k**2))
            assert against_one(channels, k) == pytest.approx(1 - 12 / k**2 - 6 / channels)


def test_stored_results_are_told(page: str) -> None:
    best = grid()["best"]
    assert rows_of(page, "The grid search, really run")[2][:3] == [f"{best[name]:g}" for name in ("alpha", "beta", "gamma")]
    assert "more is scored than by the law's phi=2: w=2 by 0.14 %" in page and "1.88 to 3.30 times the base's MACs" in page
    for name, experiment in EXPERIMENTS.items():
        result = json.loads((STORED / "lab" / f"{name}.json").read_text())
        commits = [row["machine"]["commit"] for row in result["rows"]]
        assert commits and all(commit and not commit.endswith("-dirty") for commit in commits)
        rows = rows_of(page, f"The laboratory: {experiment.title}")
        told = {(row[0], row[4]) for row in rows}
        for row in result["rows"]:
            assert (row["label"], "no finite loss" if row["top1"] is None else f"{row['top1']:.2f}") in told
        assert {(value["net"], value["source"]) for value in result["published"]} <= told


def test_the_committed_page_is_current() -> None:
    """What the command would write of the committed times; `python -m benchmarks.scaling --kept` writes it."""
    measured = json.loads((STORED / "scaling.json").read_text())
    assert (STORED / "scaling.md").read_text() == scaling.text(measured, grid(), STORED)
    assert [row["net"] for row in measured["latencies"]] == [net.name for net in scaling.NETS] and measured["search"]
    for name in FIGURES:
        assert (STORED / f"scaling-{name}.png").exists()


def test_the_readme_s_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Its options exist; what they do, the quick form shows above."""
    lines = re.findall(r"^python -m benchmarks\.scaling.*", (STORED.parents[1] / "README.md").read_text(), flags=re.M)
    with pytest.raises(SystemExit):
        scaling.main(["--help"])
    told = capsys.readouterr().out
    assert lines and all(option in told for line in lines for option in re.findall(r"--[a-z]+", line))
