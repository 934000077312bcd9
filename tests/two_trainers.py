"""Run by torchrun as two processes: FOLDER. One is told to stop, both do, and what they resume ends as if nothing had been.

The first process writes FOLDER/whole.pt and FOLDER/resumed.pt: the history and the weights of both runs.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from test_trainer import PLAIN, images, net

from effnet_fast.training import Batches, Stopped, distributed, train
from effnet_fast.training.run import _AGREE_EVERY


def judge(held_out):
    """Both processes together gave the loss that the first one's model has on all the images."""
    x, y = held_out

    def after_epoch(model, history):
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model.eval()(x), y).item()
        assert abs(history[-1]["loss"] - loss) < 1e-5 * loss, (history[-1], loss)

    return after_epoch


def main() -> None:
    folder, calls = Path(sys.argv[1]), 0
    torch.set_num_threads(1)
    recipe = replace(PLAIN, freeze_epochs=1, model_ema=True, grad_accum_steps=2)  # parameters that begin to train later

    def told_to_stop(x, y):
        nonlocal calls
        calls += 1
        if calls == 3 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return x, y

    def run(name: str, **settings):
        model = net(drop=0.3)
        seen = Batches(images(8 * (_AGREE_EVERY + 2)), 2, training=True)
        held_out = images(7)
        settings |= {"validation": Batches(held_out, 2, training=False), "after_epoch": judge(held_out[:])}
        history = train(model, seen, recipe, out=folder / name, **settings)
        if distributed.rank() == 0:
            torch.save((history, model.state_dict()), folder / f"{name}.pt")

    with distributed.process_group(torch.device("cpu")):
        run("whole")
        try:
            run("resumed", augment=told_to_stop)
            raise AssertionError("it did not stop")
        except Stopped as stopped:
            assert stopped.signal == signal.SIGTERM
        state = torch.load(folder / "resumed" / "last.pth", weights_only=True)
        assert (state["epoch"], state["step"]) == (0, _AGREE_EVERY)
        dist.barrier()
        run("resumed", resume=folder / "resumed" / "last.pth")


if __name__ == "__main__":
    main()
