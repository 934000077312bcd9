"""The parts of efficientnet_pytorch's block, which pads to the same size: of the run-time image, or as fixed at construction."""

from __future__ import annotations

import functools
from typing import Any

from efficientnet_pytorch.utils import Conv2dDynamicSamePadding, Conv2dStaticSamePadding, MemoryEfficientSwish, drop_connect
from torch import Tensor, nn

from effnet_fast.interop.adapters.base import PeerBlock, block_parts, hooked
from effnet_fast.nn.parts import BlockParts, ConvNormAct, SqueezeExciteParts, squeeze_excite_parts, why_not_fused


def _fixed_zeros(conv: Conv2dStaticSamePadding) -> tuple[int, int, int, int] | str:
    """(top, bottom, left, right) that the convolution adds, or why that is not known."""
    pad = conv.static_padding
    if hooked(pad):
        return "a hook sits on a child"
    if type(pad) is nn.Identity:
        return 0, 0, 0, 0
    if type(pad) is not nn.ZeroPad2d:
        return f"a convolution pads by a {type(pad).__name__}"
    left, right, top, bottom = pad.padding
    return top, bottom, left, right


def _part(conv: Any, norm: Any, activation: str = "silu", role: str = "dense") -> ConvNormAct | str:
    padding: str | tuple[int, int, int, int] = "symmetric"
    conv_type: type[nn.Conv2d] = nn.Conv2d
    if type(conv) is Conv2dStaticSamePadding:
        zeros, conv_type = _fixed_zeros(conv), Conv2dStaticSamePadding
        if isinstance(zeros, str):
            return zeros
        padding = zeros
    elif type(conv) is Conv2dDynamicSamePadding:
        padding, conv_type = "same", Conv2dDynamicSamePadding
    part = ConvNormAct(conv, norm, activation, padding)
    return why_not_fused(part, role, conv_type=conv_type) or part


def _squeeze_excite(reduce: Any, expand: Any) -> SqueezeExciteParts | str:
    for conv in (reduce, expand):
        if type(conv) is Conv2dStaticSamePadding and _fixed_zeros(conv) != (0, 0, 0, 0):
            return "a convolution of the squeeze-excite pads"
    return squeeze_excite_parts(reduce, expand, "silu", Conv2dStaticSamePadding)


class MBConvBlock(PeerBlock):
    def forward(self, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        return super().forward(inputs, drop_connect_rate)

    def parts(self: Any, drop_connect_rate: float | None = None) -> BlockParts | str:
        args = self._block_args
        if type(self._swish) not in (MemoryEfficientSwish, nn.SiLU):
            return f"the activation is {self._swish}, not swish"
        expand = _part(self._expand_conv, self._bn0) if args.expand_ratio != 1 else None
        depthwise = _part(self._depthwise_conv, self._bn1, role="depthwise")
        excite = _squeeze_excite(self._se_reduce, self._se_expand) if self.has_se else None
        project = _part(self._project_conv, self._bn2, "identity", "pointwise")
        residual = self.id_skip and args.stride == 1 and args.input_filters == args.output_filters
        drop = None
        if self.training and drop_connect_rate:
            drop = functools.partial(drop_connect, p=drop_connect_rate, training=True)
        return hooked(self._swish) or block_parts(expand, depthwise, excite, project, residual, drop)
