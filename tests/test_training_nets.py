"""Whole networks in training: what they keep, what they learn beside timm's, and large activations in half precision."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from plain import channels_last, without_kinks
from test_training import TRAINED
from tolerance import assert_2x_of_all, largest
from torch import nn

import effnet_fast
from benchmarks import memory
from effnet_fast.benchmark import calibrate, images
from effnet_fast.models import create_model
from effnet_fast.ops import backends
from effnet_fast.scaling import PUBLISHED

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


@TRAINED
@pytest.mark.parametrize("name", memory.NETS)
def test_activations_kept_are_at_most_40_percent_of_eagers(name):
    _, *rows = memory.measure(name, ["ours", "accelerated timm"])
    assert [row["entrant"] for row in rows] == ["ours", "accelerated timm"]
    assert all(0.25 < row["of_eager"] <= 0.40 for row in rows), rows


@TRAINED
@pytest.mark.parametrize(("name", "batch"), [("efficientnet_b0", 1), ("efficientnet_b0", 4), ("efficientnet_b5", 1)])
def test_asked_for_the_fused_blocks_keep_at_most_36_percent(name, batch, monkeypatch):
    """Also of few images, of which wide blocks train plain where nobody asks."""
    monkeypatch.setitem(memory.NETS, name, batch)
    with effnet_fast.backend("native"):
        _, asked = memory.measure(name, ["ours"])
    _, row = memory.measure(name, ["ours"])
    assert asked["batch"] == row["batch"] == batch
    assert 0.25 < asked["of_eager"] <= 0.36 and 0.40 < row["of_eager"] <= 0.55, (asked, row)


def test_a_table_of_what_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "NETS", {"efficientnet_b0": 1})
    measure = memory.measure
    monkeypatch.setattr(memory, "measure", lambda name, device: measure(name, ["ours"], device))
    assert memory.main(["--out", str(tmp_path / "memory.json")]) == 0
    told = json.loads((tmp_path / "memory.json").read_text())
    assert told.keys() == json.loads((RESULTS / "memory-cpu.json").read_text()).keys() and told["device"] == "cpu"
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines()[-2:]] == [["efficientnet_b0", "timm"], ["efficientnet_b0", "ours"]]
    assert f"{100 * told['cases'][1]['of_eager']:.0f} %" in printed
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            memory.main(["--out", str(tmp_path / "other.json"), "--device", "cuda"])
        assert "there is no CUDA device here; cpu would do" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", memory.NETS)
def test_memory_of_a_step_on_a_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    _, row = memory.measure(name, ["ours"], "cuda")
    assert row["entrant"] == "ours" and 0.2 < row["of_eager"] <= 0.40 and row["peak_of_eager"] < 0.75, row
    assert row["peak_an_image"] > row["bytes_an_image"]


def learned(model, x, labels, steps):
    """Loss and gradients of the first and the last of so many steps, running statistics and weights after each of the two."""
    model.train()
    optimizer, made = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), labels)
        loss.backward()
        optimizer.step()
        if step in (1, steps):
            gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
            statistics = {key: b.clone() for key, b in model.named_buffers() if b.is_floating_point()}
            weights = {key: p.detach().clone() for key, p in model.named_parameters()}
            made += [{"loss": loss.detach()[None]} | gradients, statistics, weights]
    return made


@TRAINED
@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0", "efficientnetv2_s", "efficientnet_lite0"])
def test_whole_nets_learn_as_timms(name):
    """Loss, every gradient, the running statistics and every weight, of one step and of ten."""
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "drop_rate": 0.0, "drop_path_rate": 0.0} | without_kinks(name)
    ours, theirs = calibrate(create_model(name, **arguments), (64, 64)), timm.create_model(name, **arguments)
    theirs.load_state_dict(ours.state_dict())
    x, labels, made = channels_last(images(8, (64, 64))), torch.arange(8), []
    with backends.backend("native"):
        assert all(row.plain is None for row in effnet_fast.explain(ours, x, grad=True))
        made.append(learned(ours, x, labels, 10))
    made += [learned(model, x, labels, 10) for model in (theirs, copy.deepcopy(theirs).double())]
    whats = [f"{what} of step {step}" for step in (1, 10) for what in ("loss and gradients", "statistics", "weights")]
    for what, of_models in zip(whats, zip(*made, strict=True), strict=True):
        assert_2x_of_all(*of_models, what)


def test_a_net_with_relu6_learns_as_timms():
    """In float64, where rounding takes no value across a kink."""
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "drop_rate": 0.0, "drop_path_rate": 0.0}
    ours = calibrate(create_model("efficientnet_lite0", **arguments), (64, 64)).double().train()
    theirs = timm.create_model("efficientnet_lite0", **arguments).double().train()
    theirs.load_state_dict(ours.state_dict())
    x = images(8, (64, 64)).double()
    with backends.backend("reference"), backends.tracing() as trace:
        loss = nn.functional.cross_entropy(ours(x), torch.arange(8))
        loss.backward()
    assert sum(choice.op == "depthwise_conv_backward" for choice in trace) == 16  # fused, every block
    expected = nn.functional.cross_entropy(theirs(x), torch.arange(8))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10 * largest(q.grad) + 1e-12, msg=name)
    for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def fifty_steps(name: str, dtype: torch.dtype | None) -> list[float]:
    """Losses of a shallow net of the family's widths, fused throughout, on images that are a hundred times too bright; its logits
    and weights stay finite. ``dtype``: of autocast, or none."""
    torch.manual_seed(0)
    published = PUBLISHED[name]
    model = effnet_fast.efficientnet(depth=0.2 * published.depth, width=published.width, num_classes=4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)  # at 0.01 losses of wide nets swing, in float32 too
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is not None)
    x, labels = 100 * images(8, (40, 40)), torch.arange(8) % 4
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        half = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
        with backends.backend("native"), backends.tracing() as trace, half:
            logits = model(x)
            loss = nn.functional.cross_entropy(logits.float(), labels)
        assert {entry if isinstance(entry, str) else entry.backend for entry in trace} == {"native"}, name
        assert torch.isfinite(logits).all(), name
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in model.parameters()), name
    return losses


in_fp32 = functools.cache(functools.partial(fifty_steps, dtype=None))


@pytest.mark.parametrize(("name", "dtype"), [*((f"b{i}", torch.float16) for i in range(8)), ("b0", torch.bfloat16)], ids=str)
@TRAINED
def test_large_activations_stay_finite(name, dtype):
    """As in float32, which begins at the same loss and learns as well."""
    half, single = fifty_steps(name, dtype), in_fp32(name)
    assert half[0] == pytest.approx(single[0], rel=0.1)
    for losses in (half, single):
        assert min(losses[-10:]) < (0.5 if name == "b0" else math.log(4) / 2)  # half of chance
