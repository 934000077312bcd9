"""squeeze_excite_gate in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.ops.common import activate_


def squeeze_excite_gate(
    partial: Tensor,
    count: int,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
) -> Tensor:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype))

    squeezed = partial.sum(1) / count
    hidden = activate_(linear(squeezed, reduce_weight, reduce_bias), activation)
    return torch.sigmoid(linear(hidden, expand_weight, expand_bias))
