"""expand_depthwise_conv_bn_act in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from effnet_fast.ops.common import Norm, conv_norm_act
from effnet_fast.ops.depthwise.reference import depthwise_conv_bn_act


def expand_depthwise_conv_bn_act(
    x: Tensor,
    expand_weight: Tensor,
    expand_norm_weight: Tensor | None,
    expand_norm_bias: Tensor | None,
    expand_norm_mean: Tensor,
    expand_norm_var: Tensor,
    expand_norm_eps: float,
    *depthwise_and_the_rest,
) -> tuple[Tensor, Tensor]:
    norm = Norm(expand_norm_weight, expand_norm_bias, expand_norm_mean, expand_norm_var, expand_norm_eps)
    activation = depthwise_and_the_rest[-2]
    h = conv_norm_act(x, expand_weight, norm, 1, (0, 0, 0, 0), 1, activation, None)
    return depthwise_conv_bn_act(h, *depthwise_and_the_rest)
