"""What ``demo`` trains: a small EfficientNet from the scaling law, on scikit-learn's scanned digits."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from effnet_fast.models import EfficientNet
from effnet_fast.scaling import B0, CompoundScaling
from effnet_fast.training import Batches, Recipe, train

CLASSES = list("0123456789")
DEPTH, WIDTH, SIDE = 0.3, 0.35, 32
BATCH = 64
# B0 halves an image five times, which would leave one pixel of 32: this base keeps 8x8, as fine as the scans.
_STRIDES = (1, 2, 1, 1, 1, 1, 1)
_BASE = replace(
    B0,
    name="digits",
    resolution=SIDE,
    stages=tuple(replace(stage, stride=stride) for stage, stride in zip(B0.stages, _STRIDES, strict=True)),
)
CONFIG = replace(
    CompoundScaling(base=_BASE).scaled(depth=DEPTH, width=WIDTH).config, in_channels=1, num_classes=len(CLASSES), drop_path=0.05
)
RECIPE = Recipe(epochs=8, batch_size=BATCH, lr=4e-3, weight_decay=0.02, warmup_epochs=2, smoothing=0.1)


def train_model(x: Tensor, y: Tensor, epochs: int) -> EfficientNet:
    """Train the network of ``CONFIG`` on x [N, 1, H, W] and y [N] for some epochs of ``RECIPE``, on shifted images."""
    torch.manual_seed(RECIPE.seed)
    model = EfficientNet(CONFIG)
    recipe = replace(RECIPE, epochs=epochs, warmup_epochs=min(RECIPE.warmup_epochs, epochs / 4))
    train(model, Batches(TensorDataset(x, y), BATCH, training=True), recipe, augment=lambda x, y: (_shifted(x), y))
    return model


def _shifted(x: Tensor) -> Tensor:
    """Each image moved by up to half a pixel of its 8x8 scan, either way."""
    matrix = torch.eye(2, 3).repeat(len(x), 1, 1)
    matrix[:, :, 2] = (torch.rand(len(x), 2) - 0.5) * (2 / 8)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), padding_mode="border", align_corners=False)
