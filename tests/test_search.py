"""The search within a budget, the fitted law of accuracy, and the grid search with its file."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from PIL import Image

from effnet_fast import scaling
from effnet_fast.benchmark.latency import Latency
from effnet_fast.cli import grid, main
from effnet_fast.cli.digits import GRID_BASE, digits_trial
from effnet_fast.scaling import (
    B0,
    LITE0,
    MOBILENET_V2,
    POINTS,
    RESNET18_CIFAR,
    V2_B0,
    AccuracyPoint,
    CompoundScaling,
    Cost,
    NetConfig,
    ScaledNet,
    fit_accuracy,
    grid_search,
    published_fit,
    search,
)
from effnet_fast.scaling.grid import grid_laws
from effnet_fast.scaling.law import PHI_TOLERANCE
from effnet_fast.scaling.search import LADDER
from effnet_fast.training import Trainer

LAW = CompoundScaling()
RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "grid-digits.json"


def test_the_fit_says_how_good_it_is() -> None:
    fit = published_fit()
    assert len(fit.residuals) == len(POINTS) == 12
    assert max(map(abs, fit.residuals)) < 0.35 and fit.left_out < 0.25
    for point, residual in zip(POINTS, fit.residuals, strict=True):
        assert fit(LAW.scaled(*point[1:4])) + residual == pytest.approx(point.top1, abs=0.01)
    assert "a fit to 12 points" in str(fit)
    assert fit.beyond(LAW.at(1)) == () and fit.beyond(LAW.scaled(width=2.5)) == ("width",)
    assert fit.beyond(LAW.at(12)) == ("depth", "width", "resolution")
    # What the points say: together is better than alone, at the same MACs.
    assert (
        fit(LAW.scaled(1.4, 1.2, 1.3)) > max(fit(LAW.scaled(depth=4)), fit(LAW.scaled(width=2)), fit(LAW.scaled(resolution=2))) + 1
    )


def test_a_fit_finds_the_law_that_made_the_points() -> None:
    fit = published_fit()
    made = [point._replace(top1=fit(LAW.scaled(*point[1:4]))) for point in POINTS]
    again = fit_accuracy(made)
    assert again.exponent == fit.exponent and again.coefficients == pytest.approx(fit.coefficients)
    assert again.left_out < 1e-9


@pytest.mark.parametrize("over", ["phi", "free"])
@pytest.mark.parametrize("budget", [{"macs": 1e9}, {"parameters": "b2"}, {"memory": 60e6}, {"macs": "b2", "parameters": "b2"}])
def test_what_is_found_fits_and_the_next_net_does_not(over: str, budget: dict) -> None:
    found = search(over=over, **budget)
    assert found and [one.accuracy for one in found] == sorted((one.accuracy for one in found), reverse=True)
    for one in found:
        assert {limit.name for limit in one.limits} == set(budget)
        assert all(limit.slack >= 0 for limit in one.limits)
        assert one.cost == Cost.of(one.config) and one.accuracy == published_fit()(one.net)
        assert one.binding is None or one.binding in budget
    beyond = {limit.name: _used(limit.name, _next(found[0].net)) / limit.most for limit in found[0].limits}
    assert beyond[found[0].binding] == max(beyond.values()) > 1


def _next(net: ScaledNet) -> ScaledNet:
    """A little phi more, or the next larger image, or beyond the largest one the next wider net."""
    if net.phi is not None:
        return LAW.at(net.phi + PHI_TOLERANCE)
    if net.resolution < LADDER[-1]:
        return LAW.scaled(net.depth, net.width, net.resolution + 1 / 28)
    wider = (LAW.scaled(net.depth, rung, net.resolution) for rung in LADDER if rung > net.width)
    return next(one for one in wider if _used("parameters", one) > _used("parameters", net))


def _used(name: str, net: ScaledNet) -> int:
    cost = Cost.of(net.config)
    return {"macs": cost.macs, "parameters": cost.parameters, "memory": cost.inference_memory().total}[name]


def test_over_phi_is_phi_for_and_names_what_binds() -> None:
    best = search(macs=1.5e9)[0]
    assert best.net.phi == LAW.phi_for(target_macs=1.5e9)
    # Of two limits that one binds which alone allows the least.
    parameters, both = search(parameters=9e6)[0], search(macs=1.5e9, parameters=9e6)[0]
    assert both.net.phi == parameters.net.phi and both.binding == "parameters"
    assert search(CompoundScaling(1, 50, 1), macs=1e18)[0].binding is None
    memory = search(memory=2e9, training=True, batch=4)[0]
    assert memory.limits[0].used == memory.cost.training_memory("fp32", 4).total


def test_free_search_beats_every_net_it_could_have_tried() -> None:
    ladder = (1.0, 1.5, 2.0)
    (best,) = search(macs=2e9, over="free", ladder=ladder, keep=1)
    sides = [side / 224 for side in range(224, 449, 8)]
    tried = [LAW.scaled(d, w, r) for d in ladder for w in ladder for r in sides]
    fitting = [net for net in tried if Cost.of(net.config).macs <= 2e9]
    assert best.accuracy == max(map(published_fit(), fitting))


def test_any_base_and_any_callables() -> None:
    for base in (LITE0, V2_B0, GRID_BASE):
        budget = 3 * Cost.of(base.scaled()).macs
        (best, *_) = search(base, macs=budget)
        assert best.accuracy is None and best.binding == "macs" and best.net.phi == max(one.net.phi or 0 for one in (best, *_))
        (wide,) = search(base, macs=budget, over="free", accuracy=lambda net: net.width, keep=1, ladder=(0.5, 1, 1.4, 2))
        assert wide.net.width >= 1.4 and wide.cost.macs <= budget
    timed: list[ScaledNet] = []

    def latency(net: ScaledNet) -> float:
        timed.append(net)
        return Cost.of(net.config).macs / 1e8

    found = search(milliseconds=10, latency=latency, macs=5e9)[0]
    assert found.binding == "milliseconds" and found.limits[-1].used <= 10
    assert Cost.of(LAW.at((found.net.phi or 0) + 1 / 64).config).macs / 1e8 > 10
    assert len({replace(net.config, name="") for net in timed}) == len(timed) < 30  # each net once


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: search(), "nothing limits it"),
        (lambda: search("b0", macs=1e9), "law is 'b0'"),
        (lambda: search(macs=1e9, over="all"), "over is 'all'"),
        (lambda: search(macs=-1), "macs is -1; a number > 0 or one of b0"),
        (lambda: search(macs="b99"), "macs is 'b99'"),
        (lambda: search(memory=math.nan), "memory is nan"),
        (lambda: search(milliseconds=5), "go together"),
        (lambda: search(macs=1e9, ladder=()), "ladder is"),
        (lambda: search(macs=1e9, ladder=(0, 1)), "ladder is"),
        (lambda: search(macs=1e9, ladder=2.0), "ladder is 2.0; one or more multipliers above 0 and up to 100 would do"),
        (lambda: search(macs=1e9, ladder="12"), "ladder is '12'"),
        (lambda: search(macs=1e9, ladder=(1, None)), r"ladder is \(1, None\)"),
        (lambda: search(macs=1e9, ladder=(1, 101)), r"ladder is \(1, 101\)"),
        (lambda: search(macs=1e9, dtype="int8"), "search: dtype is 'int8'; one of fp32, bf16, fp16 would do"),
        (lambda: search(macs=1e9, dtype=None), "search: dtype is None"),
        (lambda: search(macs=1e9, batch=0), "search: batch is 0; a whole number >= 1 would do"),
        (lambda: search(macs=1e9, batch=1.5), "search: batch is 1.5"),
        (lambda: Latency(dtype="int8"), "Latency: dtype is 'int8'; one of fp32, bf16, fp16 would do"),
        (lambda: Latency(batch=0), "Latency: batch is 0; a whole number of images >= 1 would do"),
        (lambda: Latency(device="tpu"), "Latency: device is 'tpu'; 'cpu' or 'cuda' would do"),
        (lambda: Latency(seconds=0), "Latency: seconds is 0; a number > 0 would do"),
        (lambda: digits_trial(1, ()), r"Trial: seeds is \(\); a tuple of one or more whole numbers >= 0, each once, would do"),
        (lambda: digits_trial(1, (1, 1)), r"Trial: seeds is \(1, 1\)"),
        (lambda: digits_trial(1, (0.5,)), r"Trial: seeds is \(0.5,\)"),
        (lambda: search(LITE0, macs=1e9, over="free"), "the published points are of efficientnet_b0"),
        (lambda: search(macs=1e8), "already needs 385,814,752 MACs, 285,814,752 more"),
        (lambda: search(macs=1e8, parameters=5e6), "MACs, 285,814,752 more and parameters is 5,000,000; .* 288,548 more"),
        (lambda: search(parameters=5e6, over="free"), "5,288,548 parameters, 288,548 more"),
        (lambda: search(CompoundScaling(1, 1, 1), macs=1e9), "phi changes nothing"),
        (lambda: published_fit()(LAW.scaled(width=0.5)), "width is 0.5 times efficientnet_b0's; the points begin at 1"),
        (lambda: fit_accuracy(POINTS[:5]), "5 points do not tell"),
        (lambda: fit_accuracy([]), "0 points do not tell"),
        (lambda: fit_accuracy([AccuracyPoint("small", 0.5, 1, 1, 70.0)]), "point 'small'"),
        (lambda: grid_search(score, step=0.5, tolerance=0.01, base=B0) and grid_laws(B0, 0.4, 0.01), "nearest product is 1.96"),
        (lambda: grid_search(score, step=0), "step is 0"),
        (lambda: grid_search(score, tolerance=2.0), "tolerance is 2.0"),
        (lambda: grid_search(score, processes=0), "processes is 0"),
        (lambda: grid_search(lambda net: 1.0, step=0.5, tolerance=0.3), "accuracy is <function"),
        (lambda: search(macs=1e9, keep=0), "keep is 0"),
        (lambda: search(milliseconds=5, latency=lambda net: math.nan), "latency gave nan for efficientnet_b0"),
        (lambda: search(macs=1e9, accuracy=lambda net: math.nan), "accuracy gave nan for"),
        (lambda: grid_search(score, base="b0"), "base is 'b0'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_names_what_is_wrong_and_by_how_much(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("over", ["phi", "free"])
def test_what_an_infeasible_budget_is_advised_can_be_done(over: str) -> None:
    budget, slow = {"macs": 1e8, "parameters": 5e6}, Cost.of(B0.scaled()).macs / 1e8
    with pytest.raises(ValueError) as error:
        search(over=over, **budget)
    base = Cost.of(B0.scaled())
    told = str(error.value)
    assert f"needs {base.macs:,} MACs" in told and f"needs {base.parameters:,} parameters" in told and "multipliers" not in told
    assert told.endswith("that or more, or a smaller base, would do" if over == "phi" else "that or more would do")
    assert search(over=over, macs=base.macs, parameters=base.parameters)[0].config.resolution == 224
    assert search(MOBILENET_V2, macs=3.1e8, parameters=5e6)
    with pytest.raises(ValueError, match=f"milliseconds is 2; .* needs {slow:.4g} ms, {slow - 2:.4g} more; .* that or more"):
        search(over=over, milliseconds=2, latency=lambda net: Cost.of(net.config).macs / 1e8)


def test_a_free_search_times_only_what_may_be_among_the_best() -> None:
    """The same nets as if all were timed, each within the counts alone, and once."""

    def taken(net: ScaledNet) -> float:
        return Cost.of(net.config).macs / 1e8

    timed: list[ScaledNet] = []

    def latency(net: ScaledNet) -> float:
        timed.append(net)
        return taken(net)

    found = search(over="free", milliseconds=30, parameters=2e7, latency=latency)
    assert [one.net for one in found] == [one.net for one in search(over="free", macs=3e9, parameters=2e7)]
    assert {one.binding for one in found} <= {"milliseconds", "parameters"}
    assert len({replace(net.config, name="") for net in timed}) == len(timed) < 150  # of every depth and width, 262
    assert all(Cost.of(net.config).parameters <= 2e7 for net in timed)


def score(net: ScaledNet) -> float:
    """Best where the three grow alike."""
    return -abs(net.depth - 1.2) - abs(net.width - 1.2) - abs(net.resolution - 1.1)


def fails_when_wide(net: ScaledNet) -> float:
    if net.width > 1.25:
        raise ValueError(f"too wide: {net.width:g}")
    return score(net)


def test_the_grid(tmp_path: Path) -> None:
    laws = grid_laws(B0)
    assert all(min(law.alpha, law.beta, law.gamma) >= 1 and law.constraint.distance <= 0.1 + 1e-9 for law in laws)
    assert len(set(laws)) == len(laws) == 22 and CompoundScaling(1.2, 1.1, 1.2) in laws
    file = tmp_path / "grid.json"
    # An error leaves what was judged, and the search goes on from there, whatever the number of processes.
    named = r"accuracy failed at alpha 1, beta 1.3, gamma 1.1: ValueError: too wide: 1.3"
    with pytest.raises(ValueError, match=named):
        grid_search(fails_when_wide, processes=1, file=file)
    stopped = json.loads(file.read_text())
    before = stopped["points"]
    assert 0 < len(before) < len(laws) and stopped["seconds"] > sum(point["seconds"] for point in before)
    file.write_text(json.dumps(stopped | {"seconds": 1000.0}))  # to which the rest is added
    again, alone = grid_search(score, processes=2, file=file), [score(law.at(1)) for law in laws]
    assert [point.accuracy for point in again.points] == alone
    assert again.best == CompoundScaling(1.2, 1.2, 1.1)
    assert {point["seconds"] for point in before} <= {point.seconds for point in again.points}
    assert 1000 < json.loads(file.read_text())["seconds"] < 1600
    assert again.best.at(2).width == pytest.approx(1.44)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]
    with pytest.raises(ValueError, match=r"of another search \(step 0.1, not 0.2\);"):
        grid_search(score, step=0.2, file=file)


def fails_first(folder: Path, net: ScaledNet) -> float:
    """The first law fails once another one is begun, which goes on after that."""
    first = net.depth == net.width == 1
    (folder / ("failing" if first else "begun")).touch()
    while not first and not (folder / "failing").exists() or first and not (folder / "begun").exists():
        time.sleep(0.01)
    if first:
        raise RuntimeError("no memory")
    time.sleep(0.5)
    return score(net)


def dies(net: ScaledNet) -> float:
    os._exit(1)


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="a process that judged nets died, as where memory is out; fewer processes, or smaller nets"
    ):
        grid_search(dies, step=1.0, file=tmp_path / "grid.json")


def test_what_is_being_judged_when_a_point_fails_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "grid.json"
    with pytest.raises(ValueError, match="failed at alpha 1, beta 1, gamma 1.4: RuntimeError: no memory"):
        grid_search(partial(fails_first, tmp_path), processes=2, file=file)
    points = json.loads(file.read_text())["points"]
    assert 0 < len(points) < 5 and all(point["accuracy"] < 0 for point in points)  # and hardly another was begun


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a grid of one point."""
    file = tmp_path_factory.mktemp("searched") / "grid.json"
    grid_search(score, step=1.0, file=file)
    return file.read_text()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda whole: [], r"all of it is \[\]; an object with search, points and seconds"),
        (lambda whole: {}, "search is None; an object of settings"),
        (lambda whole: whole | {"search": []}, r"search is \[\]; an object of settings"),
        (lambda whole: whole | {"points": 3}, "points is 3; a list"),
        (lambda whole: whole | {"seconds": "5"}, "seconds is '5'; a number"),
        (lambda whole: whole | {"seconds": -5}, "seconds is -5; a number >= 0"),
        (lambda whole: whole | {"points": [7]}, "point 0 is 7; an object with alpha, beta, gamma, accuracy, seconds, macs, param"),
        (lambda whole: whole | {"points": [{"alpha": 1.0}]}, "point 0 is {'alpha': 1.0}; an object with alpha"),
        (lambda whole: whole | {"points": [whole["points"][0] | {"accuracy": None}]}, "accuracy of point 0 is None; a number"),
        (lambda whole: whole | {"points": [whole["points"][0] | {"macs": 1.5}]}, "macs of point 0 is 1.5; a number"),
        (
            lambda whole: whole | {"points": [whole["points"][0] | {"alpha": 9.0}]},
            r"a point is \(9.0, .*; alpha, beta and gamma of the",
        ),
    ],
)
def test_a_damaged_file_is_told_as_such(tmp_path: Path, searched: str, damage, told: str) -> None:
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(damage(json.loads(searched))))
    with pytest.raises(ValueError, match=rf"{file} is no file of a grid search: {told}.* or another file, would do"):
        grid_search(score, step=1.0, file=file)
    file.write_text("{")
    with pytest.raises(ValueError, match=rf"{file} is no file of a grid search: no JSON \(Expecting .*; another file would do"):
        grid_search(score, step=1.0, file=file)


def test_a_trial_follows_from_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one thread, however many there are, which are given back."""
    trial, net = digits_trial(1, (3,)), CompoundScaling(base=GRID_BASE).at(0)
    assert trial(net) > 0.15
    threads, before, run = [], torch.get_num_threads(), Trainer.run_epoch
    monkeypatch.setattr(Trainer, "run_epoch", lambda trainer: threads.append(torch.get_num_threads()) or run(trainer))
    first = trial(net)
    torch.set_num_threads(2)
    try:
        assert trial(net) == first
        with pytest.raises(ValueError, match="fill no batch"):
            replace(trial, recipe=replace(trial.recipe, batch_size=9999))(net)
        assert torch.get_num_threads() == 2 and threads == [1, 1]
    finally:
        torch.set_num_threads(before)


def test_the_grid_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The one law of this grid, trained for an epoch, and its picture; asked again, it trains nothing."""
    monkeypatch.setattr(grid, "GRID_BASE", replace(GRID_BASE, stages=GRID_BASE.stages[:1], resolution=6))
    pool, processes, asked = scaling.grid.ProcessPoolExecutor, [], []
    monkeypatch.setattr(scaling.grid, "ProcessPoolExecutor", lambda count, *rest: processes.append(count) or pool(count, *rest))
    monkeypatch.setattr(grid, "grid_search", lambda *of, **how: asked.append(how["processes"]) or grid_search(*of, **how))
    out, plot = tmp_path / "grid.json", tmp_path / "grid.png"
    arguments = ["--step", "1", "--tolerance", "0.1", "--epochs", "1", "--seeds", "1", "--out", str(out), "--plot", str(plot)]
    arguments += ["--processes", "1"]
    assert main(["grid", *arguments]) == 0
    assert asked == [1] and processes == [1, 1]  # for the laws, of which there is one, and for the nets that the best is scaled to
    told = capsys.readouterr().out
    assert "the best 1 of 1 laws" in told and "phi=2" in told
    result = json.loads(out.read_text())
    assert [point["accuracy"] for point in result["points"]] and result["scaled"]["seeds"] == [1000]
    written = out.read_bytes()
    assert main(["grid", *arguments]) == 0 and capsys.readouterr().out == told and out.read_bytes() == written
    # Resumed, the seconds are those of all its runs.
    out.write_text(json.dumps({name: result[name] for name in ("search", "points")} | {"seconds": 1000.0}))
    assert main(["grid", *arguments]) == 0 and 1000 < json.loads(out.read_text())["seconds"] < 1600
    capsys.readouterr()
    for scaled in (
        [],
        {"nets": 5},
        {"nets": result["scaled"]["nets"], "seeds": 3},
        {"nets": [{"label": "phi=9"}], "seeds": [1000]},
    ):
        out.write_text(json.dumps(result | {"scaled": scaled}))
        assert main(["grid", *arguments]) == 2
        assert f"{out} is damaged: scaled is {scaled!r:.80}" in capsys.readouterr().err
    out.write_text(json.dumps(result | {"seconds": -5}))
    assert main(["grid", *arguments]) == 2 and "seconds is -5; a number >= 0" in capsys.readouterr().err
    with Image.open(plot) as picture:
        assert picture.size[0] > 1000
    # Stopped as it scales on, it goes on with the nets that are missing, and ends as if it had not been.
    nets = result["scaled"]["nets"]
    out.write_text(json.dumps(result | {"scaled": {"seeds": [1000], "nets": nets[1:3]}, "seconds": 1000.0}))
    judged, begun = grid.judged, []

    def stopping(trial, todo, processes, known):
        begun.append([*todo])
        for number, one in enumerate(judged(trial, todo, processes, known)):
            yield one
            if number == 0 and len(begun) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(grid, "judged", stopping)
    assert main(["grid", *arguments]) == 128 + signal.SIGINT
    stored = json.loads(out.read_text())
    assert len(stored["scaled"]["nets"]) == 3 and stored["seconds"] > 1000
    assert main(["grid", *arguments]) == 0
    assert json.loads(out.read_text())["scaled"] == result["scaled"]
    assert begun[0] == ["phi=0", "d=4", "w=2", "r=2"] and len(begun[1]) == 3


def test_the_stored_grid_search_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the recipe has got settings since: they had their defaults. One that is another is named, alone."""
    monkeypatch.setattr("effnet_fast.scaling.grid.ProcessPoolExecutor", None)  # so that nothing can be trained
    out = tmp_path / "grid.json"
    out.write_bytes(RESULT.read_bytes())
    assert main(["grid", "--out", str(out)]) == 0 and out.read_bytes() == RESULT.read_bytes()
    capsys.readouterr()
    result = json.loads(RESULT.read_text())
    del result["search"]["recipe"]["hflip"], result["search"]["base"]["stem_kernel"]
    out.write_text(json.dumps(result))
    assert main(["grid", "--out", str(out)]) == 0
    result["search"]["recipe"]["lr"] = 0.5
    out.write_text(json.dumps(result))
    assert main(["grid", "--out", str(out)]) == 2
    assert "is of another search (recipe.lr 0.5, not 0.004); its settings" in capsys.readouterr().err


def test_the_stored_grid_search_is_one_of_under_ten_minutes() -> None:
    result = json.loads(RESULT.read_text())
    assert len(result["points"]) == len(grid_laws(GRID_BASE))
    assert result["search"]["base"] == json.loads(json.dumps(asdict(GRID_BASE)))  # else its own command refuses it
    assert result["seconds"] < 600 and result["search"]["seeds"] == [0, 1] and result["machine"]["cpu"]
    best = max(result["points"], key=lambda point: (point["accuracy"], -point["macs"]))
    assert result["best"] == {name: best[name] for name in ("alpha", "beta", "gamma")}
    assert [row["label"] for row in result["scaled"]["nets"]] == ["phi=0", "phi=1", "phi=2", "d=4", "w=2", "r=2"]


def test_scale_answers_for_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--macs", "1.5G", "--parameters", "b2", "--plot", str(tmp_path / "b2.png")]) == 0
    told = capsys.readouterr().out
    assert "binding      parameters" in told and "a fit to 12 points" in told and "MBConv6" in told
    with Image.open(tmp_path / "b2.png") as picture:
        assert picture.size[0] > 1000
    assert main(["scale", "--parameters", "b2", "--free"]) == 0
    assert "extrapolated in resolution" in capsys.readouterr().out
    assert main(["scale", "--macs", "2G", "--base", "efficientnetv2_b0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["binding"] == "macs" and found["fit"] is None and found["found"][0]["limits"][0]["slack"] >= 0
    assert main(["scale", "--growth"]) == 0
    told = capsys.readouterr().out
    assert "efficientnet_lite0" in told and "2.03 (2)" in told and "1.44" in told
    assert main(["scale", "--ms", "0.001", "--batch", "1"]) == 2
    assert "milliseconds is 0.001; efficientnet_b0 already needs" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--free"]])
def test_scale_tells_of_its_timing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    """On a terminal, which this takes stderr for."""
    shown, timed = io.StringIO(), []

    def latency(_: Latency, net: ScaledNet) -> float:
        timed.append(net.config.name)
        return Cost.of(net.config).macs / 1e8

    monkeypatch.setattr(Latency, "__call__", latency)
    monkeypatch.setattr("tqdm.tqdm", partial(tqdm.tqdm, file=shown))
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.std.time", itertools.count(step=3).__next__)  # seconds, for a bar that waits for two
    assert main(["scale", "--ms", "5", "--macs", "1G", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["binding"] == "milliseconds"
    assert re.search(r"counted or timed: \d+net", shown.getvalue()) and timed[-1] in shown.getvalue()


@pytest.mark.parametrize("options", [["--macs", "1G"], ["--macs", "500M", "--free"], ["--parameters", "b1"]])
def test_scale_tells_of_its_counting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("tqdm.tqdm", partial(tqdm.tqdm, file=shown))
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.std.time", itertools.count(step=3).__next__)  # seconds, for a bar that waits for two
    assert main(["scale", *options]) == 0 and "binding" in capsys.readouterr().out
    assert re.search(r"counted or timed: \d+net.*efficientnet_b0_", shown.getvalue())
    monkeypatch.setitem(sys.modules, "tqdm", None)  # without it there is only no bar
    assert main(["scale", *options]) == 0


@pytest.mark.parametrize(("over", "macs"), [("phi", 2e10), ("free", 6e8)])
def test_a_search_counts_each_net_once(monkeypatch: pytest.MonkeyPatch, over: str, macs: float) -> None:
    counted, watched, count = [], [], Cost.of

    def counting(config: NetConfig) -> Cost:
        counted.append(replace(config, name="", dropout=float(config.dropout > 0)))
        return count(config)

    monkeypatch.setattr(Cost, "of", counting)
    found = search(macs=macs, over=over, watch=watched.append)
    assert len(counted) == len(set(counted)) + len(found)  # the last, whose costs are in the answer
    assert len(watched) == len(set(counted)) > len(found)


def test_a_net_that_memory_does_not_hold_is_told_with_its_batch(capsys: pytest.CaptureFixture[str]) -> None:
    for batch in (99999999, 10**17, 10**30):
        with pytest.raises(ValueError, match=rf"batch is {batch}; digits_tiny takes about [\d,]+ bytes of memory, .* smaller"):
            Latency(batch)(CompoundScaling(base=replace(GRID_BASE, resolution=224)).at(0))
    assert main(["scale", "--ms", "20", "--batch", "99999999"]) == 2
    assert "batch is 99999999; efficientnet_b0 takes" in capsys.readouterr().err


def test_numbers_of_numpy_and_torch_are_taken() -> None:
    (one,) = search(macs=np.float32(1e9), accuracy=lambda net: torch.tensor(net.depth), keep=1)
    assert one.net == search(macs=1e9, keep=1)[0].net and isinstance(one.accuracy, float)
    assert search(macs=torch.tensor(10**9))[0].net == search(parameters=np.int64(10**12), macs=1e9)[0].net
    for wrong in (True, "1e9", np.float64("nan"), torch.ones(2), None, 1j):
        with pytest.raises(ValueError, match="accuracy gave"):
            search(macs=1e9, accuracy=lambda net, wrong=wrong: wrong)
    for wrong in (True, np.float64("nan"), np.ones(2), 1j):
        with pytest.raises(ValueError, match="macs is"):
            search(macs=wrong)  # type: ignore[arg-type]


def test_what_a_free_search_of_another_base_is_advised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--macs", "1G", "--free", "--base", "efficientnet_lite0"]) == 2
    told = capsys.readouterr().err
    assert "no --free, or no --base, would do" in told and "callable" not in told
    assert main(["scale", "--macs", "1G", "--base", "efficientnet_lite0"]) == 0


def test_what_is_found_is_within_a_latency_that_does_not_rise() -> None:
    found = search(milliseconds=10, macs=25e9, latency=lambda net: 20.0 if net.phi in (3, 5) else 5.0)
    assert found and all(limit.slack >= 0 for one in found for limit in one.limits)
    assert not {3, 5} & {one.net.phi for one in found}


@pytest.mark.parametrize("base", [RESNET18_CIFAR, MOBILENET_V2], ids=lambda base: base.name)
def test_latency_is_of_every_family(base) -> None:
    """Each by its own modules; built as another they would have no such blocks, or others."""
    assert Latency(seconds=0.01)(CompoundScaling(base=replace(base, resolution=32)).at(0)) > 0


def test_a_measured_latency_is_of_the_net() -> None:
    small, large = (Latency(seconds=0.05)(CompoundScaling(base=GRID_BASE).at(phi)) for phi in (0, 4))
    assert 0 < small < large
