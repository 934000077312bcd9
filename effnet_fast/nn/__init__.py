"""The modules: ordinary ``nn.Module`` blocks whose forward is fused, and what says why a block is or is not."""

from effnet_fast.nn.blocks import DepthwiseSeparable, FusedMBConv, MBConv, SqueezeExcite, StochasticDepth
from effnet_fast.nn.explain import explain
from effnet_fast.nn.residual import ResidualBlock
from effnet_fast.nn.sequence import NestedMBConv, SequentialMBConv

__all__ = [
    "DepthwiseSeparable",
    "FusedMBConv",
    "MBConv",
    "NestedMBConv",
    "ResidualBlock",
    "SequentialMBConv",
    "SqueezeExcite",
    "StochasticDepth",
    "explain",
]
