"""The family: data rows, one builder, the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from effnet_fast.models.classics import MnasNet, MobileNetV2, ResNet
from effnet_fast.models.efficientnet import EfficientNet, EfficientNetFeatures
from effnet_fast.models.family import CLASSICS, FAMILY
from effnet_fast.models.net import Classifier
from effnet_fast.models.registry import build, config_of, create_model, efficientnet, list_models


def _named(name: str) -> Callable[..., Classifier | EfficientNetFeatures]:
    def create(pretrained: bool | str = False, **arguments: Any) -> Classifier | EfficientNetFeatures:
        return create_model(name, pretrained, **arguments)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"``create_model({name!r}, pretrained, **arguments)``; see :func:`effnet_fast.create_model`."
    return create


efficientnet_b0 = _named("efficientnet_b0")
efficientnet_b1 = _named("efficientnet_b1")
efficientnet_b2 = _named("efficientnet_b2")
efficientnet_b3 = _named("efficientnet_b3")
efficientnet_b4 = _named("efficientnet_b4")
efficientnet_b5 = _named("efficientnet_b5")
efficientnet_b6 = _named("efficientnet_b6")
efficientnet_b7 = _named("efficientnet_b7")

__all__ = [
    "CLASSICS",
    "FAMILY",
    "Classifier",
    "EfficientNet",
    "EfficientNetFeatures",
    "MnasNet",
    "MobileNetV2",
    "ResNet",
    "build",
    "config_of",
    "create_model",
    "efficientnet",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "list_models",
]
