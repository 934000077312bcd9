"""The fused ops, each with a plain PyTorch reference and faster backends of the same schema."""

from effnet_fast.ops.backends import backend, read_environment
from effnet_fast.ops.common import ACTIVATIONS, Norm
from effnet_fast.ops.conv import conv_bn_act
from effnet_fast.ops.depthwise import depthwise_conv_bn_act
from effnet_fast.ops.expand_depthwise import expand_depthwise_conv_bn_act
from effnet_fast.ops.pointwise import pointwise_conv_bn_act
from effnet_fast.ops.pool import global_average_pool
from effnet_fast.ops.squeeze_excite import squeeze_excite_gate

read_environment()

__all__ = [
    "ACTIVATIONS",
    "Norm",
    "backend",
    "conv_bn_act",
    "depthwise_conv_bn_act",
    "expand_depthwise_conv_bn_act",
    "global_average_pool",
    "pointwise_conv_bn_act",
    "squeeze_excite_gate",
]
