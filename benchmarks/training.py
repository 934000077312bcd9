"""The training suite's entrants: one step of a whole net (forward, cross entropy, backward, SGD with momentum), half types under
autocast. Ours, and timm's net accelerated, train fused where there are kernels for it; the others are what that must beat."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import effnet_fast
from effnet_fast.benchmark import images
from effnet_fast.benchmark.case import DTYPES, PEER_FACTOR, Case
from effnet_fast.benchmark.machine import last_level_cache
from effnet_fast.benchmark.timing import EventTimer, HostTimer, Refused, Replayed, Timer, copies
from effnet_fast.benchmark.tolerance import why_wrong


def write_weights(case: Case) -> None:
    """Write ``case.weights``: weights, images, labels, and the loss and the gradient of the stem that timm gets: in the dtype, and
    in float64 for float32, in float32 for half types."""
    torch.manual_seed(0)
    state = effnet_fast.create_model(case.net).state_dict()
    x, labels = images(case.batch, (case.size, case.size)), torch.arange(case.batch) % 1000
    told: dict[str, Any] = {"state": state, "images": x, "labels": labels}
    told["plain"] = _measured(_Step(case, _timm(case), told))
    exact = torch.float64 if case.dtype == "fp32" else torch.float32
    told["reference"] = _measured(_Step(case, _timm(case), told, exact))
    torch.save(told, case.weights)


_BACKEND = contextlib.ExitStack()  # what this process has asked for


def ours(case: Case, graph: bool = False) -> Timer:
    """effnet_fast's own model."""
    return _checked(case, _ours(case), 2.0, graph=graph)


def ours_compiled(case: Case, options: dict[str, Any]) -> Timer:
    """effnet_fast's own model by torch.compile."""
    return _checked(case, _ours(case), 2.0, _compile(options))


def timm_accelerated(case: Case) -> Timer:
    """timm's net after effnet_fast.accelerate."""
    _ask_for_kernels(case)
    model = _timm(case)
    effnet_fast.accelerate(model)
    return _checked(case, model, 2.0)


def _ours(case: Case) -> nn.Module:
    _ask_for_kernels(case)
    return effnet_fast.create_model(case.net, drop_rate=0.0, drop_path_rate=0.0)  # timm's defaults


def _ask_for_kernels(case: Case) -> None:
    """On a GPU plain PyTorch trains where nobody asks for ours."""
    if case.device == "cuda":
        _BACKEND.enter_context(effnet_fast.backend("native"))


def timm_eager(case: Case, graph: bool = False) -> Timer:
    return _checked(case, _timm(case), PEER_FACTOR, graph=graph)


def timm_compiled(case: Case, options: dict[str, Any]) -> Timer:
    return _checked(case, _timm(case), PEER_FACTOR, _compile(options))


Wrap = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def _as_it_is(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return model


def _compile(options: dict[str, Any]) -> Wrap:
    return lambda model: torch.compile(model, dynamic=False, **options)


class _Step:
    """One step on the case's device, channels_last. The learning rate is so small that no step changes the next one's check."""

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        told: dict[str, Any],
        exact: torch.dtype | None = None,
        wrap: Wrap = _as_it_is,
    ) -> None:
        model.load_state_dict(told["state"])
        form: dict[str, Any] = {"device": case.device, "dtype": exact or torch.float32, "memory_format": torch.channels_last}
        self.model = model.train().to(**form)
        self.x, self.labels = told["images"].to(**form), told["labels"].to(case.device)
        self.run = wrap(self.model)
        half = exact is None and case.dtype != "fp32"
        self.autocast = torch.autocast(case.device, DTYPES[case.dtype] if half else torch.bfloat16, enabled=half)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-12, momentum=0.9)

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.enable_grad():
            self.optimizer.zero_grad(set_to_none=True)
            with self.autocast:
                loss = nn.functional.cross_entropy(self.run(x).to(torch.promote_types(x.dtype, torch.float32)), self.labels)
            loss.backward()
            self.optimizer.step()
        return loss.detach()


def _measured(step: _Step) -> list[Tensor]:
    loss = step(step.x).clone()
    gradient = next(p.grad for p in step.model.parameters() if p.dim() == 4)
    assert gradient is not None
    return [loss.cpu(), gradient.cpu()]


def _checked(case: Case, model: nn.Module, factor: float, wrap: Wrap = _as_it_is, graph: bool = False) -> Timer:
    """A timer for the step, all of it one CUDA graph where asked; Refused where its loss or the stem's gradient is wrong."""
    torch.backends.cudnn.benchmark = True
    told = torch.load(case.weights)
    step = _Step(case, model, told, wrap=wrap)
    for out, plain, exact in zip(_measured(step), told["plain"], told["reference"], strict=True):
        wrong = why_wrong(out, plain, exact.double(), factor)
        if wrong is not None:
            raise Refused(wrong)
    count = copies(step.x.nbytes, last_level_cache(case.device), most=4)
    sets = [step.x, *(step.x.clone(memory_format=torch.preserve_format) for _ in range(count - 1))]
    run = Replayed(step, step.x) if graph else step
    return (HostTimer if case.device == "cpu" else EventTimer)(lambda i: run(sets[i]), count)


def _timm(case: Case) -> nn.Module:
    import timm

    return timm.create_model(case.net)
