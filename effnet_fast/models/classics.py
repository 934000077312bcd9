"""MobileNetV2, MnasNet and the ResNets from a config, under torchvision's names (MobileNetV1 is :class:`EfficientNet`'s)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.models.net import Classifier, check_images, layer_factories
from effnet_fast.nn.blocks import ActLayer, NormLayer, init_weights
from effnet_fast.nn.fused import conv_norm_act, is_traced
from effnet_fast.nn.parts import has_hooks
from effnet_fast.nn.residual import ResidualBlock
from effnet_fast.nn.sequence import ConvNormSequence, NestedMBConv, SequentialMBConv, mbconv_layers, run_sequence
from effnet_fast.scaling.config import NetConfig


class _Classic(Classifier):
    """A classifier that builds its parts in ``_build``.

    norm_layer, act_layer   factories ``(channels) -> module`` and ``() -> module`` in place of the config's
    """

    def __init__(
        self,
        config: NetConfig,
        drop_rate: float | None = None,
        global_pool: str = "avg",
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
    ) -> None:
        super().__init__(config, drop_rate)
        self._build(*layer_factories(config, norm_layer, act_layer))
        self._set_head(config.num_classes, global_pool)
        init_weights(self)
        self.init_classifier()

    def _build(self, norm: NormLayer, act: ActLayer) -> None:
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        if not is_traced(x):
            check_images(type(self).__name__, x, self.config.in_channels)


class _InSequence(_Classic):
    def place_classifier(self, linear: nn.Module) -> None:
        self.classifier = nn.Sequential(nn.Identity(), linear)  # first, in torchvision, is the dropout, which forward_head has


class MobileNetV2(_InSequence):
    """MobileNetV2 (arXiv 1801.04381): ``features``, all its blocks in one row, and ``classifier``."""

    def _build(self, norm: NormLayer, act: ActLayer) -> None:
        config = self.config
        stem = ConvNormSequence(config.in_channels, config.stem_channels, config.stem_kernel, config.stem_stride, norm, act)
        head = ConvNormSequence(config.stages[-1].out_channels, config.head_channels, 1, 1, norm, act)
        self.features = nn.Sequential(stem, *(NestedMBConv(block, norm, act) for block in config.blocks()), head)

    @torch.no_grad()
    def init_classifier(self) -> None:
        """As torchvision: N(0, 0.01^2), and no bias."""
        if isinstance(linear := self.get_classifier(), nn.Linear):
            nn.init.normal_(linear.weight, 0.0, 0.01)
            nn.init.zeros_(linear.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        self._check(x)
        return self.forward_stage(self.features, x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^features\.0\.", "blocks": r"^features\.(\d+)\."}


class MnasNet(_InSequence):
    """MnasNet-B1 (arXiv 1807.11626): ``layers``, in which stem, first block and head lie flat, and ``classifier``."""

    _version = 2  # of its state dict, which torchvision's loader asks for

    def _build(self, norm: NormLayer, act: ActLayer) -> None:
        config = self.config
        stages: list[list[nn.Module]] = [[] for _ in config.stages]
        first, *others = config.blocks()
        for block in others:
            stages[block.stage].append(SequentialMBConv(block, norm, act))
        flat = [module for group in mbconv_layers(first, norm, act) for module in group]
        self.layers = nn.Sequential(
            *ConvNormSequence(config.in_channels, config.stem_channels, config.stem_kernel, config.stem_stride, norm, act),
            *flat,
            *(nn.Sequential(*stage) for stage in stages if stage),
            *ConvNormSequence(config.stages[-1].out_channels, config.head_channels, 1, 1, norm, act),
        )

    @torch.no_grad()
    def init_classifier(self) -> None:
        """As torchvision: U(-1, 1) * sqrt(3 / out), and no bias."""
        if isinstance(linear := self.get_classifier(), nn.Linear):
            bound = (3 / linear.out_features) ** 0.5
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(linear.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        config = self.config
        self._check(x)
        if has_hooks(self.layers):
            return self.layers(x)
        layers = list(self.layers._modules.values())
        conv, norm, act = layers[:3]
        x = conv_norm_act(conv, norm, act, config.stem_kernel, config.stem_stride, "symmetric", x)  # type: ignore[arg-type]
        x = run_sequence(layers[3:8], x)
        for stage in layers[8:-3]:
            x = self.forward_stage(stage, x)
        conv, norm, act = layers[-3:]
        return conv_norm_act(conv, norm, act, 1, 1, "symmetric", x)  # type: ignore[arg-type]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        block = r"^layers\.(\d+)\.\d+\." if coarse else r"^layers\.(\d+)\.(\d+)\."
        return {"stem": r"^layers\.[0-7]\.", "blocks": [(block, None), (r"^layers\.(\d+)\.", (99999,))]}


class ResNet(_Classic):
    """ResNet (arXiv 1512.03385): stem, ``layer1`` to as many stages as there are, and ``fc``. Plain PyTorch throughout."""

    CLASSIFIER = "fc"

    def _build(self, norm: NormLayer, act: ActLayer) -> None:
        config = self.config
        stem = ConvNormSequence(config.in_channels, config.stem_channels, config.stem_kernel, config.stem_stride, norm, act)
        self.conv1, self.bn1, self.relu = stem
        self.maxpool = nn.MaxPool2d(3, 2, 1) if config.stem_pool else nn.Identity()
        stages: list[list[nn.Module]] = [[] for _ in config.stages]
        for block in config.blocks():
            stages[block.stage].append(ResidualBlock(block, norm, act))
        for number, stage in enumerate(stages, start=1):
            self.add_module(f"layer{number}", nn.Sequential(*stage))

    def init_classifier(self) -> None:
        """As torchvision: what PyTorch made it with, weight and bias U(-1, 1) / sqrt(in)."""

    def forward_features(self, x: Tensor) -> Tensor:
        self._check(x)
        if not is_traced(x):
            x = x.contiguous(memory_format=torch.channels_last)  # in which all convolutions are fast
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, len(self.config.stages) + 1):
            x = self.forward_stage(getattr(self, f"layer{number}"), x)
        return x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}
