"""One of two processes that train on halves of a batch: RANK FOLDER HOW.

HOW is "norms", SyncBatchNorm's statistics over both (and gradients summed by hand: DistributedDataParallel refuses such norms on a
CPU), "penalty", the same for the gradients of a gradient, or "parallel", DistributedDataParallel with frozen norms. The first
process writes, to FOLDER/0.pt, gradients and statistics of one process on the whole batch in float64 and in float32 by the children
one by one, and those of the two, fused.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import effnet_fast

SPLIT = (3, 5)  # images of each process


def made(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()} | {
        name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()
    }


def learn(run: nn.Module, x: torch.Tensor, how: str) -> None:
    if how != "penalty":
        run(x).square().sum().backward()
        return
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()


def main() -> None:
    rank, folder, how = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = effnet_fast.efficientnet(depth=0.4, width=0.5, num_classes=4, drop_rate=0.0, drop_path_rate=0.0).train()
    x = torch.randn(sum(SPLIT), 3, 40, 40)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and how == "parallel":
            module.eval()
    whole = []
    for dtype in (torch.float64, torch.float32):
        plain = copy.deepcopy(model).to(dtype)
        for module in plain.modules():
            if isinstance(module, nn.Conv2d):  # a hook on a child: it is called
                module.register_forward_hook(lambda *_: None)
        learn(plain, x.to(dtype, copy=True), how)
        whole.append(made(plain))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SPLIT))
    if how != "parallel":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    run = DistributedDataParallel(model) if how == "parallel" else model
    with effnet_fast.backend("native"), effnet_fast.ops.backends.tracing() as trace:
        learn(run, x.split(SPLIT)[rank].clone(), how)
    plain_blocks = [entry for entry in trace if isinstance(entry, str)]
    assert not plain_blocks, plain_blocks
    for parameter in model.parameters():
        if how == "parallel":
            parameter.grad *= len(SPLIT)  # it was the mean over the processes
        else:
            dist.all_reduce(parameter.grad)
    if rank == 0:
        torch.save([*whole, made(model)], folder / "0.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
