"""Which blocks of which peer libraries can be fused. A library's adapter is imported when a block of that library is met."""

from __future__ import annotations

import re
from importlib import import_module

from effnet_fast.interop.adapters.base import PeerBlock, fused_class, original_class

_ADAPTERS = {
    ("timm.models._efficientnet_blocks", "InvertedResidual"): "timm",
    ("timm.models._efficientnet_blocks", "DepthwiseSeparableConv"): "timm",
    ("timm.models._efficientnet_blocks", "EdgeResidual"): "timm",
    ("timm.models._efficientnet_blocks", "ConvBnAct"): "timm",
    ("torchvision.models.efficientnet", "MBConv"): "torchvision",
    ("torchvision.models.efficientnet", "FusedMBConv"): "torchvision",
    ("efficientnet_pytorch.model", "MBConvBlock"): "lukemelas",
}
_LOOKS_LIKE_A_BLOCK = re.compile(r"inverted_?residual|mb_?conv|depthwise_?separable", re.IGNORECASE)


def adapter_of(cls: type) -> type[PeerBlock] | str | None:
    """The adapter of a block's class; why there is none, for what looks like such a block; or None for any other module."""
    for base in cls.__mro__:
        library = _ADAPTERS.get((base.__module__, base.__qualname__))
        if library is not None:
            if cls.forward is not base.forward:  # type: ignore[attr-defined]
                return f"{cls.__name__} has a forward of its own, not {base.__name__}'s"
            return getattr(import_module(f"{__name__}.{library}"), base.__name__)
    if _LOOKS_LIKE_A_BLOCK.search(cls.__name__):
        return f"no adapter for {cls.__module__}.{cls.__qualname__}"
    return None


__all__ = ["PeerBlock", "adapter_of", "fused_class", "original_class"]
