"""The modules: ordinary ``nn.Module`` blocks whose forward is fused, and what says why a block is or is not."""

from effnet_fast.nn.blocks import FusedMBConv, MBConv, SqueezeExcite, StochasticDepth
from effnet_fast.nn.explain import explain

__all__ = ["FusedMBConv", "MBConv", "SqueezeExcite", "StochasticDepth", "explain"]
