"""Squeeze-excite between two convolutions of a block in training: all of it is of size N x C, and plain PyTorch makes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "identity": lambda u: u,
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "relu": lambda grad, u: torch.ops.aten.threshold_backward(grad, u, 0),
    "relu6": lambda grad, u: torch.ops.aten.hardtanh_backward(grad, u, 0, 6),
    "identity": lambda grad, u: grad,
}


def squeeze_excite(
    pooled: Tensor, activation: str, reduce: Tensor, reduce_bias: Tensor | None, expand: Tensor, expand_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gate [N, C] of means ``pooled`` [N, C], and what the reduction gives before its activation, [N, R]."""
    weights = [None if t is None else t.to(pooled.dtype) for t in (reduce, reduce_bias, expand, expand_bias)]
    hidden = F.linear(pooled, weights[0].flatten(1), weights[1])  # type: ignore[union-attr]
    active = _FORWARD[activation](hidden)
    return torch.sigmoid(F.linear(active, weights[2].flatten(1), weights[3])), hidden  # type: ignore[union-attr]


def squeeze_excite_backward(
    grad: Tensor, gate: Tensor, hidden: Tensor, pooled: Tensor, activation: str, reduce: Tensor, expand: Tensor, pixels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the gate's gradient [N, C]: that of one of the ``pixels`` that a mean is of, [N, C], and those of both weights and
    biases, [R, C], [R], [C, R], [C]."""
    run = _backward_op if torch.compiler.is_compiling() else _backward
    return run(grad, gate, hidden, pooled, activation, reduce, expand, pixels)


def _backward(
    grad: Tensor, gate: Tensor, hidden: Tensor, pooled: Tensor, activation: str, reduce: Tensor, expand: Tensor, pixels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    active, of_expanded = _FORWARD[activation](hidden), torch.ops.aten.sigmoid_backward(grad, gate)
    of_hidden = _BACKWARD[activation](of_expanded @ expand.flatten(1).to(grad.dtype), hidden)
    weights = of_hidden.T @ pooled, of_hidden.sum(0), of_expanded.T @ active, of_expanded.sum(0)
    of_pixel = torch.addmm(pooled, of_hidden, reduce.flatten(1).to(grad.dtype), beta=0, alpha=1 / pixels)
    return of_pixel, *weights


# A compiler traces a backward under the autocast of its forward, which would make halves of these products: an op it leaves alone.
_SCHEMA = (
    "(Tensor grad, Tensor gate, Tensor hidden, Tensor pooled, str activation, Tensor reduce, Tensor expand, SymInt pixels)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_backward_op = torch.library.custom_op("effnet_fast::squeeze_excite_backward", _backward, mutates_args=(), schema=_SCHEMA)


@_backward_op.register_fake
def _(grad, gate, hidden, pooled, activation, reduce, expand, pixels):
    (_, channels), (_, reduced) = gate.shape, hidden.shape
    shapes = gate.shape, (reduced, channels), (reduced,), (channels, reduced), (channels,)
    return tuple(grad.new_empty(shape) for shape in shapes)
