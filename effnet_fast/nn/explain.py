"""Which backend runs each block of a model on an input, and why the others do not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from effnet_fast.nn.fused import FusedBlock
from effnet_fast.ops.backends import Choice, note, tracing


class BlockExplanation(NamedTuple):
    """One block (or the stem and head, named after the model): the ops that ran, in order, or the reason why none did."""

    name: str
    ops: tuple[Choice, ...]
    plain: str | None

    def __str__(self) -> str:
        if self.plain is not None:
            return f"{self.name:<14} {self.plain}"
        lines = []
        for number, choice in enumerate(self.ops):
            others = "; ".join(f"{backend}: {reason}" for backend, reason in choice.refused.items())
            lines.append(f"{self.name if number == 0 else '':<14} {choice.op:<22} {choice.backend:<10} ({others})")
        return "\n".join(lines)


class Explanation(tuple[BlockExplanation, ...]):
    """Rows of :class:`BlockExplanation`; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self)

    __repr__ = __str__


def explain(model: nn.Module, x: torch.Tensor, grad: bool = False) -> Explanation:
    """Run ``model(x)`` once, as it stands (train or eval), and tell for each block what ran.

    x     [N, C, H, W]
    grad  run with autograd on, as a training step would; by default without, as inference does

    Running statistics move if the model is in training mode. A hook added to a child after ``torch.compile`` does not fire, and
    what a compiled model does inside its graph was chosen when it was compiled: explain the model before compiling it.
    """
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, FusedBlock)]
    if not blocks:
        raise ValueError(f"explain: {type(model).__name__} has no block of effnet_fast; accelerate(model) first would do")

    def start(name: str) -> Any:
        return lambda module, args: note(f"block {name}")

    def end(module: nn.Module, args: Any, output: Any) -> None:
        note("block ")

    handles = []
    try:
        for name, block in blocks:
            handles.append(block.register_forward_pre_hook(start(name)))  # type: ignore[attr-defined]
            handles.append(block.register_forward_hook(end))  # type: ignore[attr-defined]
        with torch.set_grad_enabled(grad), tracing() as trace:
            model(x)
    finally:
        for handle in handles:
            handle.remove()

    rows: list[BlockExplanation] = []
    current, ops, plain = "", [], None  # type: str, list[Choice], str | None
    for entry in [*trace, "block "]:
        if isinstance(entry, Choice):
            ops.append(entry)
        elif entry.startswith("block "):
            if ops or plain:
                rows.append(BlockExplanation(current or ("stem" if not rows else "head"), tuple(ops), plain))
            current, ops, plain = entry.removeprefix("block "), [], None
        else:
            plain = entry
    return Explanation(rows)
