"""What training asks of torch.distributed, with answers for one process too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from effnet_fast.training.transfer import moving_norms


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The group that torchrun's environment describes, over NCCL on CUDA and gloo on a CPU; without one nothing."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _grouped() else 0


def processes() -> int:
    return dist.get_world_size() if _grouped() else 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


def barrier() -> None:
    if processes() > 1:
        dist.barrier()


def share_buffers(model: nn.Module) -> None:
    """Give all processes the running statistics of the first."""
    if processes() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DistributedDataParallel where there are processes to share gradients with: of the parameters that train now."""
    if processes() == 1:
        return model
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def synchronise_norms(model: nn.Module) -> None:
    """Make batch norms, in place, take statistics over all processes; a frozen one has none to take, and stays as it is.

    After :func:`parallel`: that refuses such norms on a CPU, where PyTorch's own forward cannot run them and the fused one can. The
    parameters that it has seen stay the same. Raises ValueError for a norm of a peer that does more, such as activate.
    """
    if processes() == 1:
        return
    moving = {norm for norm in moving_norms(model) if not isinstance(norm, nn.SyncBatchNorm)}
    for norm in moving:
        if type(norm).forward is not _BatchNorm.forward:
            raise ValueError(
                f"sync_bn: a {type(norm).__name__} does more than a SyncBatchNorm; False, or its library's own, would do"
            )
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child in moving:
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
