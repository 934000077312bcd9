"""EfficientNet as fast as its FLOPs promise: fused kernels behind the ordinary PyTorch model."""

from effnet_fast.interop import accelerate, restore
from effnet_fast.models import (
    create_model,
    efficientnet,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
    list_models,
)
from effnet_fast.nn import explain
from effnet_fast.ops import backend

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "backend",
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
    "explain",
    "list_models",
    "restore",
]
