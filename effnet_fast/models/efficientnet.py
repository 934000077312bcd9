"""EfficientNet from a config: stem, stages of blocks, head, classifier. State dict keys are timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from effnet_fast.models.features import FeatureInfo, take_indices
from effnet_fast.models.net import Classifier, Net, check_images, layer_factories
from effnet_fast.nn.blocks import ActLayer, DepthwiseSeparable, FusedMBConv, MBConv, NormLayer, conv2d, init_weights
from effnet_fast.nn.fused import conv_norm_act, is_traced
from effnet_fast.scaling.config import NetConfig
from effnet_fast.weights import default_cfg

_BLOCKS: dict[str, type[nn.Module]] = {"mbconv": MBConv, "fused_mbconv": FusedMBConv, "separable": DepthwiseSeparable}


class Trunk(Net):
    """Stem and stages under timm's names."""

    def _build(self, norm_layer: NormLayer | None, act_layer: ActLayer | None) -> None:
        config = self.config
        norm, act = layer_factories(config, norm_layer, act_layer)
        self.conv_stem = conv2d(config.in_channels, config.stem_channels, config.stem_kernel, config.stem_stride, config.padding)
        self.bn1, self.act1 = norm(config.stem_channels), act()
        stages: list[list[nn.Module]] = [[] for _ in config.stages]
        for block in config.blocks():
            stages[block.stage].append(_BLOCKS[block.operator](block, norm, act, config.padding))
        self.blocks = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        self.feature_info = FeatureInfo(config)

    def forward_stem(self, x: Tensor) -> Tensor:
        if not is_traced(x):
            # Another convolution may have been put in the stem's place; what is not known is not checked.
            check_images(type(self).__name__, x, getattr(self.conv_stem, "in_channels", None))
        config = self.config
        return conv_norm_act(self.conv_stem, self.bn1, self.act1, config.stem_kernel, config.stem_stride, config.padding, x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^conv_stem|^bn1",
            "blocks": [(r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)", None), (r"^conv_head|^bn2", (99999,))],
        }


class EfficientNet(Trunk, Classifier):
    """EfficientNet V1, V2 and Lite, and MobileNetV1, which timm gives the same names: a classifier as :class:`Classifier` tells.

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
        self._build(norm_layer, act_layer)
        self.conv_head: nn.Module = nn.Identity()
        self.bn2: nn.Module = nn.Identity()
        self.act2: nn.Module = nn.Identity()
        if config.head_channels:
            norm, act = layer_factories(config, norm_layer, act_layer)
            self.conv_head = conv2d(config.stages[-1].out_channels, config.head_channels, 1, 1, config.padding)
            self.bn2, self.act2 = norm(config.head_channels), act()
        self._set_head(config.num_classes, global_pool)
        init_weights(self)
        self.init_classifier()

    def _head_convolution(self, x: Tensor) -> Tensor:
        if not self.config.head_channels:
            return x
        return conv_norm_act(self.conv_head, self.bn2, self.act2, 1, 1, "symmetric", x)  # type: ignore[arg-type]

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.forward_stem(x)
        if self.grad_checkpointing:
            for stage in self.blocks:
                x = self.forward_stage(stage, x)
        else:
            x = self.blocks(x)
        return self._head_convolution(x)

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
            x = self._head_convolution(x)
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
        super().__init__(config)
        self._build(norm_layer, act_layer)
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
