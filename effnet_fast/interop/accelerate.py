"""Accelerate a peer library's model in place: each block it understands runs the fused forward; everything else stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.interop.adapters import PeerBlock, adapter_of, fused_class, original_class
from effnet_fast.modes import evaluation
from effnet_fast.nn.fused import FusedBlock


@dataclass(frozen=True, repr=False)
class Acceleration:
    """What :func:`accelerate` did.

    taken       names of the blocks that are fused now, in the model's order
    skipped     name -> reason for each block that was left as it was
    difference  the largest absolute difference of the outputs before and after, where ``check`` was given
    """

    model: nn.Module
    taken: tuple[str, ...]
    skipped: dict[str, str]
    difference: float | None = None

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__}: {len(self.taken)} of {len(self.taken) + len(self.skipped)} blocks are fused"]
        lines += _by_reason(self.skipped)
        if self.difference is not None:
            lines.append(f"  largest difference of the outputs: {self.difference:.3g}")
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(model: nn.Module, check: Tensor | None = None) -> Acceleration:
    """Fuse, in place, the forward of each EfficientNet block of a timm, torchvision or efficientnet_pytorch model.

    check  an input of the model, [N, C, H, W], on the model's device: ``model(check)`` is run in evaluation mode without gradients
           before and after, and the report tells the largest difference

    A fused block returns channels_last, whatever it is given: code after the model that calls ``view`` may want ``reshape``.
    The model stays the same object of the same class, with the same parameters under the same keys; each block stays an instance of
    its class. :func:`restore` undoes it. Accelerate before ``torch.compile``. A model of effnet_fast is fused as it is.

    Training is fused too, forward and backward, where a kernel is and PyTorch is not faster: ``effnet_fast.explain(model, x,
    grad=True)`` tells, and inside ``effnet_fast.backend("native")`` all blocks that have kernels are. A gradient that is to be
    differentiated again (``create_graph=True``), or is asked for in a batch, is plain PyTorch's; the graphs that ``torch.compile``
    makes by default refuse it. Export, ``torch.func``'s transforms, forward-mode derivatives and a hook on a child see the block's
    own forward.

    Raises ValueError, with the reasons, where no block can be taken, and TypeError for what is not a plain module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}; a torch.nn.Module would do")
    _check_plain(model)
    own: dict[nn.Module, type] = {}
    fused: dict[nn.Module, type] = {}
    taken, skipped = [], {}
    for name, module in model.named_modules():
        adapter = type(module) if isinstance(module, FusedBlock) else adapter_of(type(module))
        if adapter is None:
            continue
        reason = adapter if isinstance(adapter, str) else _why_not(module, adapter)
        if reason is not None:
            skipped[name or type(module).__name__] = reason
            continue
        taken.append(name or type(module).__name__)
        if not isinstance(module, FusedBlock):
            own[module], fused[module] = type(module), fused_class(type(module), adapter)  # type: ignore[arg-type]
    if not taken:
        reasons = "\n".join(_by_reason(skipped)) or "  it has no block of timm, torchvision or efficientnet_pytorch"
        raise ValueError(f"accelerate: no block of {type(model).__name__} can be fused:\n{reasons}")

    before = [] if check is None else _evaluate(model, check)
    _set_classes(fused)
    try:
        difference = None if check is None else _difference(before, _evaluate(model, check))
    except BaseException:
        _set_classes(own)
        raise
    return Acceleration(model, tuple(taken), skipped, difference)


def restore(model: nn.Module) -> None:
    """Give every block that :func:`accelerate` took its own class back, in place. Blocks of effnet_fast's own models stay fused.

    Raises ValueError, and changes nothing, where another tool has changed a block's class since.
    """
    own: dict[nn.Module, type] = {}
    for name, module in model.named_modules():
        if not issubclass(type(module), PeerBlock):
            continue
        cls = original_class(type(module))
        if cls is None:
            raise ValueError(
                f"restore: another tool has made block {name!r} a {type(module).__name__} since it was accelerated;"
                " undoing that first would do"
            )
        own[module] = cls
    _set_classes(own)


def _set_classes(classes: dict[nn.Module, type]) -> None:
    for module, cls in classes.items():
        module.__class__ = cls


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"accelerate: {where} is a ScriptModule; the model that it was scripted or traced from would do")
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise TypeError(f"accelerate: {where} is compiled; accelerating before torch.compile would do")


def _why_not(block: nn.Module, adapter: type) -> str | None:
    if not isinstance(block, FusedBlock) and "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    parts = adapter.parts(block)  # type: ignore[attr-defined]
    return parts if isinstance(parts, str) else None


def _by_reason(skipped: dict[str, str]) -> list[str]:
    """A line for each reason, with the blocks it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    return [f"  {', '.join(blocks)}: {reason}" for reason, blocks in names.items()]


def _evaluate(model: nn.Module, x: Tensor) -> list[Tensor]:
    with evaluation(model), torch.no_grad():
        tensors = list(_tensors(model(x)))
    if not tensors:
        raise TypeError("accelerate: check needs a model that returns a tensor, or lists, tuples or dicts of tensors")
    return tensors


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    differences = [(old.double() - new.double()).abs().flatten().cpu() for old, new in zip(before, after, strict=True)]
    return torch.cat([torch.zeros(1, dtype=torch.float64), *differences]).max().item()
