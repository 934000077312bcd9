"""uint8 images as a network's input: which layout they have, and what normalises them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.nn.fused import FusedBlock
from effnet_fast.weights.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


def scale_and_shift(model: nn.Module, preprocessing: Preprocessing | None) -> Tensor:
    """[2, C] float32, so that ``x * scale + shift`` of a channel is ``(x / 255 - mean) / std``, for the C channels of the model's
    images.

    Mean and std are those of ``preprocessing``; without it those that the model or one within it carries, as ours and timm's do, or
    ImageNet's: torchvision's nets carry none, and its efficientnet_v2_l wants others.
    """
    if preprocessing is None:
        configs = (getattr(module, "default_cfg", None) for module in model.modules())
        carried = next((config for config in configs if isinstance(config, dict)), {})
        mean, std = carried.get("mean", IMAGENET_MEAN), carried.get("std", IMAGENET_STD)
        preprocessing = Preprocessing(1, 1, mean=tuple(mean), std=tuple(std))
    preprocessing = preprocessing.for_channels(_channels(model))
    mean, std = torch.tensor([preprocessing.mean, preprocessing.std], dtype=torch.float64)
    return torch.stack([1 / (255 * std), -mean / std]).float().to(next(model.parameters()).device)


def _channels(model: nn.Module) -> int:
    """Of the images: those of the first convolution. Where several that differ are defined before all fused blocks, as in a model
    whose decoder comes before its backbone, the first that the model takes."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    ahead = itertools.takewhile(lambda module: not isinstance(module, FusedBlock), model.modules())
    choices = list(dict.fromkeys(module.in_channels for module in ahead if isinstance(module, nn.Conv2d)))
    for channels in choices if len(choices) > 1 else []:
        try:
            with torch.no_grad():
                model(convolutions[0].weight.new_zeros(1, channels, 64, 64))
        except Exception:  # whatever it says to such images
            continue
        return channels
    return convolutions[0].in_channels


def mean_and_std(pixels: Tensor) -> str:
    """What :func:`scale_and_shift` came from."""
    scale, shift = pixels.double().cpu()
    std = 1 / (255 * scale)
    told = (" ".join(f"{value:.3g}" for value in values.tolist()) for values in (-shift * std, std))
    return "mean {}, deviation {}".format(*told)


def image_batch(x: Any, channels: int) -> Tensor:
    """``x``, a batch of images of a floating type or uint8, as [N, C, H, W]: a view of uint8 images that are [N, H, W, C].

    Raises ValueError for anything else.
    """
    if isinstance(x, Tensor) and x.dim() == 4:
        if x.is_floating_point() or (x.dtype == torch.uint8 and x.shape[1] == channels):
            return x
        if x.dtype == torch.uint8 and x.shape[3] == channels:
            return x.permute(0, 3, 1, 2)
    raise ValueError(wrong_images(x, channels))


def wrong_images(x: Any, channels: int) -> str:
    """What ``x`` is instead of images of so many channels."""
    what = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    return (
        f"InferenceModel: x is {what}; a batch of images [N, {channels}, H, W] of a floating type, or of uint8 and then also"
        f" [N, H, W, {channels}], would do"
    )
