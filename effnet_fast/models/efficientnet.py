"""EfficientNet from a config: stem, stages of blocks, head, classifier. State dict keys are timm's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effnet_fast.models.features import FeatureInfo, take_indices
from effnet_fast.nn.blocks import (
    ActLayer,
    FusedMBConv,
    MBConv,
    NormLayer,
    conv2d,
    init_weights,
    set_conv_padding,
    set_padding,
)
from effnet_fast.nn.fused import conv_norm_act, is_traced
from effnet_fast.nn.padding import check_padding
from effnet_fast.nn.parts import has_hooks
from effnet_fast.scaling.config import NetConfig
from effnet_fast.weights import default_cfg

_BLOCKS: dict[str, type[nn.Module]] = {"mbconv": MBConv, "fused_mbconv": FusedMBConv}
_ACTIVATIONS: dict[str, ActLayer] = {"silu": nn.SiLU, "relu": nn.ReLU, "relu6": nn.ReLU6, "identity": nn.Identity}
POOLS = ("avg", "max", "avgmax", "")


def _layers(config: NetConfig, norm_layer: NormLayer | None, act_layer: ActLayer | None) -> tuple[NormLayer, ActLayer]:
    """The factories of a net's layers. A model keeps none: a user's lambda would not pickle."""
    batch_norm = partial(nn.BatchNorm2d, eps=config.bn_eps, momentum=config.bn_momentum)
    return norm_layer or batch_norm, act_layer or _ACTIVATIONS[config.activation]


class Trunk(nn.Module):
    """The convolutional part: stem and stages. ``config`` says what was built."""

    def __init__(
        self,
        config: NetConfig,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        norm, act = _layers(config, norm_layer, act_layer)
        self.conv_stem = conv2d(config.in_channels, config.stem_channels, 3, 2, config.padding)
        self.bn1, self.act1 = norm(config.stem_channels), act()
        stages: list[list[nn.Module]] = [[] for _ in config.stages]
        for block in config.blocks():
            stages[block.stage].append(_BLOCKS[block.operator](block, norm, act, config.padding))
        self.blocks = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        self.feature_info = FeatureInfo(config)

    def forward_stem(self, x: Tensor) -> Tensor:
        if not is_traced(x):
            # Another convolution may have been put in the stem's place; what is not known is not checked.
            _check_images(type(self).__name__, x, getattr(self.conv_stem, "in_channels", None))
        return conv_norm_act(self.conv_stem, self.bn1, self.act1, 3, 2, self.config.padding, x)

    def forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and self.training):
            return stage(x)
        blocks = stage.children() if type(stage) is nn.Sequential and not has_hooks(stage) else (stage,)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def set_weights_convention(
        self, padding: str | None = None, bn_eps: float | None = None, bn_momentum: float | None = None
    ) -> None:
        """Adopt the padding, eps or momentum that some weights were trained under; what is None stays as it is."""
        if padding is not None:
            check_padding("set_weights_convention", padding)
            set_padding(self, padding)
            set_conv_padding(self.conv_stem, padding)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = module.eps if bn_eps is None else bn_eps
                module.momentum = module.momentum if bn_momentum is None else bn_momentum
        given = {"padding": padding, "bn_eps": bn_eps, "bn_momentum": bn_momentum}
        self.config = replace(self.config, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^conv_stem|^bn1",
            "blocks": [(r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)", None), (r"^conv_head|^bn2", (99999,))],
        }


class EfficientNet(Trunk):
    """The classifier: x [N, in_channels, H, W] float, either layout -> logits [N, num_classes].

    config        what to build, from the family's table or from the scaling law
    drop_rate     dropout before the classifier; the config's where None
    global_pool   "avg", "max", "avgmax" (their mean), or "" for none
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
        super().__init__(config, norm_layer, act_layer)
        self.drop_rate = config.dropout if drop_rate is None else drop_rate
        self.num_classes, self.num_features = config.num_classes, config.head_channels
        self.head_hidden_size = self.num_features
        self.conv_head = conv2d(config.stages[-1].out_channels, config.head_channels, 1, 1, config.padding)
        norm, act = _layers(config, norm_layer, act_layer)
        self.bn2, self.act2 = norm(config.head_channels), act()
        self.default_cfg = default_cfg(config)
        self._set_head(config.num_classes, global_pool)
        init_weights(self)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The preprocessing and provenance of the weights; timm's other name for ``default_cfg``."""
        return self.default_cfg

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"EfficientNet: global_pool is {global_pool!r}; one of {', '.join(map(repr, POOLS))} would do")
        if not global_pool and num_classes:
            raise ValueError("EfficientNet: global_pool is '' with a classifier; num_classes=0 would do, or a pool")
        self.global_pool, self.num_classes = global_pool, num_classes
        self.classifier: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes`` (0: none), freshly initialised, where the old one stood."""
        like = self.conv_head.weight
        self._set_head(num_classes, self.global_pool if global_pool is None else global_pool)
        self.config = replace(self.config, num_classes=num_classes)
        init_weights(self.classifier)
        self.classifier.to(device=like.device, dtype=like.dtype).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, num_features, H/32, W/32] (rounded up): everything before the pool."""
        x = self.forward_stem(x)
        if self.grad_checkpointing:
            for stage in self.blocks:
                x = self.forward_stage(stage, x)
        else:
            x = self.blocks(x)
        return conv_norm_act(self.conv_head, self.bn2, self.act2, 1, 1, "symmetric", x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, dropout, classifier; with ``pre_logits`` what the classifier would be given."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        elif self.global_pool == "max":
            x = x.amax((2, 3))
        elif self.global_pool == "avgmax":
            x = 0.5 * (x.mean((2, 3)) + x.amax((2, 3)))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of ``feature_info`` at ``indices`` (last n, a list, or all), and the final features unless told not to.

        ``norm`` changes nothing here (every feature map is already normalised); ``output_fmt`` is NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates: output_fmt is {output_fmt!r}; 'NCHW' would do")
        wanted = take_indices("forward_intermediates", indices, len(self.feature_info))
        stages = {self.feature_info[i]["stage"]: i for i in wanted}
        maps = {}
        x = self.forward_stem(x)
        if 0 in stages:
            maps[stages[0]] = x
        for number, stage in enumerate(self.blocks, start=1):
            if stop_early and number > max(stages, default=0):
                break
            x = self.forward_stage(stage, x)
            if number in stages:
                maps[stages[number]] = x
        taken = [maps[i] for i in wanted]
        if intermediates_only:
            return taken
        if not stop_early or max(stages, default=0) == len(self.blocks):
            x = conv_norm_act(self.conv_head, self.bn2, self.act2, 1, 1, "symmetric", x)
        return x, taken


class EfficientNetFeatures(Trunk):
    """The backbone of detectors and segmenters: x -> the feature maps at ``out_indices``, one for each reduction 2, 4, ... 32."""

    def __init__(
        self,
        config: NetConfig,
        out_indices: int | Sequence[int] | None = None,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
    ) -> None:
        super().__init__(config, norm_layer, act_layer)
        self.out_indices = take_indices("features_only: out_indices", out_indices, len(self.feature_info))
        self.feature_info = FeatureInfo(config, self.out_indices)
        self.default_cfg = default_cfg(config)
        init_weights(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        stages = [info["stage"] for info in self.feature_info]
        x = self.forward_stem(x)
        maps = [x] if 0 in stages else []
        for number, stage in enumerate(self.blocks, start=1):
            if number > max(stages):
                break
            x = self.forward_stage(stage, x)
            if number in stages:
                maps.append(x)
        return maps


def _check_images(who: str, x: Any, channels: int | None) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{who}: the input is {shape}; a batch of images [N, {channels or 'C'}, H, W] would do")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{who}: the input has {x.shape[1]} channels; {channels} would do (in_chans sets it)")
    if not x.is_floating_point():
        raise TypeError(f"{who}: the input is {x.dtype}; a float image, normalised as the weights' preprocessing says, would do")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{who}: the input is {tuple(x.shape)}; at least one pixel would do")
