"""Run by torchrun as two processes: FOLDER. One is told to stop, both do, and what they resume ends as if nothing had been.

The first process writes FOLDER/whole.pt and FOLDER/resumed.pt: the history and the weights of both runs.
"""

from __future__ import annotations

import copy
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_trainer import PLAIN, images, net

from effnet_fast.ops import backend, native
from effnet_fast.ops.backends import tracing
from effnet_fast.training import Batches, Stopped, Trainer, distributed, freeze_batch_norm, train
from effnet_fast.training.run import _ASK_EVERY


def judge(held_out):
    """Both processes together gave the loss that the first one's model has on all the images."""
    x, y = held_out

    def after_epoch(model, history):
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model.eval()(x), y).item()
        assert abs(history[-1]["loss"] - loss) < 1e-5 * loss, (history[-1], loss)

    return after_epoch


def compare_gradients(recipe) -> None:
    """After one step both processes have the gradients of one process on the whole batch."""
    model = net(width=0.5).train()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = None
    with torch.no_grad():
        model(images()[:][0])  # statistics that let the images through
    whole = copy.deepcopy(model)
    if recipe.freeze_bn:
        freeze_batch_norm(whole)
    seen = Batches(images(16), recipe.batch_size, training=True)
    mine = next(seen.of_epoch(0))
    next(Trainer(model, recipe, seen).run_epoch())
    everyones = [[torch.empty_like(part) for _ in range(2)] for part in mine]
    for parts, part in zip(everyones, mine, strict=True):
        dist.all_gather(parts, part)
    x, y = map(torch.cat, everyones)
    torch.nn.functional.cross_entropy(whole(x), y).backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() and len(got) > 10
    noise = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())  # of biases that the next norm takes away
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()) + noise, msg=name)


def keep_frozen_norms() -> None:
    """Of a model with frozen norms only the others take statistics, over both processes."""
    model = net(width=0.5)
    freeze_batch_norm(model.blocks[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    next(Trainer(model, replace(PLAIN, sync_bn=True), Batches(images(), PLAIN.batch_size, training=True)).run_epoch())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            moved = not torch.equal(module.running_mean, before[f"{name}.running_mean"])
            assert moved == isinstance(module, torch.nn.SyncBatchNorm) == (not name.startswith("blocks.0.")), name
            assert torch.equal(module.weight, before[f"{name}.weight"]) != moved, name


def refuse_norms_that_do_more() -> None:
    """A SyncBatchNorm would not activate, as timm's norms do."""

    class NormAct(torch.nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = net()
    model.bn1 = NormAct(model.bn1.num_features)
    with pytest.raises(ValueError, match="sync_bn: a NormAct does more than a SyncBatchNorm; False, or its library's own,"):
        Trainer(model, replace(PLAIN, sync_bn=True), Batches(images(), PLAIN.batch_size, training=True))
    assert type(model.bn1) is NormAct and type(model.bn2) is torch.nn.BatchNorm2d


def main() -> None:
    folder, calls = Path(sys.argv[1]), 0
    torch.set_num_threads(1)
    recipe = replace(
        PLAIN, batch_size=2, freeze_epochs=1, model_ema=True, grad_accum_steps=2
    )  # parameters that begin to train later

    def told_to_stop(x, y):
        nonlocal calls
        calls += 1
        if calls == 3 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return x, y

    def run(name: str, **settings):
        model = net(drop=0.3)
        seen = Batches(images(8 * (_ASK_EVERY + 2)), 2, training=True)
        held_out = images(7)
        settings |= {"validation": Batches(held_out, 2, training=False), "after_epoch": judge(held_out[:])}
        history = train(model, seen, recipe, out=folder / name, **settings)
        if distributed.rank() == 0:
            torch.save((history, model.state_dict()), folder / f"{name}.pt")

    with distributed.process_group(torch.device("cpu")):
        compare_gradients(replace(PLAIN, freeze_bn=True))
        if native.REASON is None:
            with backend("native"), tracing() as trace:
                compare_gradients(replace(PLAIN, freeze_bn=True, grad_checkpointing=True))
            assert not [entry for entry in trace if isinstance(entry, str)]  # of a block that trains plain, or is recomputed so
            # PyTorch has no SyncBatchNorm on a CPU
            compare_gradients(replace(PLAIN, sync_bn=True))
            keep_frozen_norms()
        refuse_norms_that_do_more()
        run("whole", log_interval=4)
        try:
            run("resumed", augment=told_to_stop)
            raise AssertionError("it did not stop")
        except Stopped as stopped:
            assert stopped.signal == signal.SIGTERM
        state = torch.load(folder / "resumed" / "last.pth", weights_only=True)
        assert (state["epoch"], state["step"]) == (0, 2)  # the step that it came in
        dist.barrier()
        run("resumed", resume=folder / "resumed" / "last.pth")


if __name__ == "__main__":
    main()
