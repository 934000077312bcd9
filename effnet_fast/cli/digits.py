"""What ``demo`` and ``grid`` train: small EfficientNets from the scaling law, on scikit-learn's scanned digits."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from effnet_fast.models import EfficientNet
from effnet_fast.scaling import B0, BaseNet, CompoundScaling, StageConfig
from effnet_fast.training import Batches, Recipe, Trial, train
from effnet_fast.training.pictures import load_digits

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
    train(model, Batches(TensorDataset(x, y), BATCH, training=True), recipe, augment=_shifted_batch)
    return model


def _shifted(x: Tensor) -> Tensor:
    """Each image moved by up to half a pixel of its 8x8 scan, either way."""
    matrix = torch.eye(2, 3).repeat(len(x), 1, 1)
    matrix[:, :, 2] = (torch.rand(len(x), 2) - 0.5) * (2 / 8)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), padding_mode="border", align_corners=False)


# What ``grid`` scales: a net whose stages are deep and wide enough for coefficients of 1 to 2 to survive rounding.
GRID_BASE = BaseNet(
    "digits_tiny",
    (StageConfig("mbconv", 3, 1, 3, 16, 1, 0.25), StageConfig("mbconv", 3, 2, 3, 40, 4, 0.25)),
    stem_channels=16,
    head_channels=64,
    resolution=12,
)


def digits_at(side: int) -> tuple[TensorDataset, TensorDataset]:
    """The digits to train on and those held out, as items (x [1, side, side], label)."""
    scans, digits, train, held_out = load_digits()
    x = F.interpolate(torch.from_numpy(scans)[:, None] / 255, (side, side), mode="bilinear", antialias=True, align_corners=False)
    x, y = (x - x[train].mean()) / x[train].std(), torch.from_numpy(digits)
    return TensorDataset(x[train], y[train]), TensorDataset(x[held_out], y[held_out])


def digits_trial(epochs: int, seeds: tuple[int, ...]) -> Trial:
    """Trains a net on the digits for some epochs with each seed; its accuracy is that on the held-out ones."""
    recipe = replace(RECIPE, epochs=epochs, warmup_epochs=min(RECIPE.warmup_epochs, epochs / 4))
    return Trial(digits_at, recipe, seeds, _shifted_batch, (("in_channels", 1), ("num_classes", len(CLASSES))))


def _shifted_batch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return _shifted(x), y
