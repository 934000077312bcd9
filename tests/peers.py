"""Peers' nets and blocks with running statistics like a trained net's, for the tests of accelerate."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from effnet_fast.benchmark import calibrate, images
from effnet_fast.ops.backends import Choice, tracing

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def lukemelas(name: str, **arguments) -> nn.Module:
    efficientnet_pytorch = pytest.importorskip("efficientnet_pytorch")
    arguments = {"drop_connect_rate": 0.0, "dropout_rate": 0.0} | arguments
    return efficientnet_pytorch.EfficientNet.from_name(name, **arguments)


# name -> (how it is made, how many blocks it has)
NETS = {
    "timm b0": (lambda: timm.create_model("efficientnet_b0"), 16),
    "timm tf_b3": (lambda: timm.create_model("tf_efficientnet_b3"), 26),
    "timm v2_s": (lambda: timm.create_model("efficientnetv2_s"), 40),
    "timm lite0": (lambda: timm.create_model("efficientnet_lite0"), 16),
    "timm mobilenetv2": (lambda: timm.create_model("mobilenetv2_100"), 17),
    "timm es": (lambda: timm.create_model("efficientnet_es"), 18),
    "torchvision b0": (lambda: torchvision.models.efficientnet_b0(stochastic_depth_prob=0.0, dropout=0.0), 16),
    "torchvision v2_s": (lambda: torchvision.models.efficientnet_v2_s(stochastic_depth_prob=0.0, dropout=0.0), 40),
    "lukemelas b0": (lambda: lukemelas("efficientnet-b0"), 16),
    "lukemelas b0 dynamic": (lambda: lukemelas("efficientnet-b0", image_size=None), 16),
}
ONE_EACH = ("timm b0", "torchvision b0", "lukemelas b0")

# One block of each kind -> the net it is in, and its name there.
BLOCKS = {
    "timm InvertedResidual": ("timm b0", "blocks.1.1"),
    "timm InvertedResidual same": ("timm tf_b3", "blocks.1.0"),
    "timm DepthwiseSeparableConv": ("timm b0", "blocks.0.0"),
    "timm EdgeResidual": ("timm v2_s", "blocks.1.1"),
    "timm ConvBnAct": ("timm v2_s", "blocks.0.0"),
    "torchvision MBConv": ("torchvision b0", "features.2.1"),
    "torchvision MBConv1": ("torchvision b0", "features.1.0"),
    "torchvision FusedMBConv": ("torchvision v2_s", "features.2.1"),
    "torchvision FusedMBConv1": ("torchvision v2_s", "features.1.0"),
    "lukemelas MBConvBlock": ("lukemelas b0", "_blocks.2"),
    "lukemelas MBConvBlock dynamic": ("lukemelas b0 dynamic", "_blocks.1"),
}


@functools.cache
def _calibrated(name: str) -> nn.Module:
    torch.manual_seed(0)
    return calibrate(NETS[name][0](), (128, 128))  # at 64 pixels the last stages see too few for their statistics


def net(name: str) -> nn.Module:
    return copy.deepcopy(_calibrated(name))


def block_and_input(kind: str) -> tuple[nn.Module, torch.Tensor]:
    name, path = BLOCKS[kind]
    block = copy.deepcopy(_calibrated(name).get_submodule(path))
    conv = next(module for module in block.modules() if isinstance(module, nn.Conv2d))
    return block, images(2, (13, 16), conv.in_channels)


def outcome(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[str], list[str]]:
    """The output without gradients, the ops called, and the reasons given where none was."""
    with torch.no_grad(), tracing() as trace:
        out = model(x)
    return out, [e.op for e in trace if isinstance(e, Choice)], [e for e in trace if isinstance(e, str)]
