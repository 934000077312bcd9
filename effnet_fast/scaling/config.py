"""What a network is, as data: stages before scaling, and the concrete net that scaling gives.

Nothing here knows a tensor or a device. ``BaseNet`` is a table like Table 1 of the EfficientNet paper (arXiv 1905.11946);
``BaseNet.scaled(depth, width, resolution)`` applies the multipliers and the rounding rules and returns a ``NetConfig``, from
which the models, the cost model and the checkpoint layouts are all derived.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

OPERATORS = ("mbconv", "fused_mbconv", "separable", "basic", "bottleneck")
# Whose names the modules bear, and the operators that it has names for.
FAMILIES = {
    "efficientnet": ("mbconv", "fused_mbconv", "separable"),
    "mobilenet_v2": ("mbconv",),
    "mnasnet": ("mbconv",),
    "resnet": ("basic", "bottleneck"),
}
ACTIVATIONS = ("silu", "relu", "relu6", "identity")
PADDINGS = ("symmetric", "same")
# Beyond these no net is meant, and what a damaged file asks for would fill the memory.
_MOST = {"layers": 1 << 12, "resolution": 1 << 16, "kernel_size": 1 << 8, "stem_kernel": 1 << 8, "num_classes": 1 << 24}
_MOST_CHANNELS, _MOST_STAGES = 1 << 20, 1 << 8


def is_whole(value: object, least: int = 1) -> bool:
    """Whether ``value`` is an int >= ``least``; bool is no number here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_real(value: object) -> bool:
    """Whether ``value`` is a finite int or float; bool is no number here."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 63
    return isinstance(value, float) and math.isfinite(value)


def as_real(value: Any) -> float | None:
    """``value`` as a finite float, a scalar of NumPy or torch too; None where it is none, as bool and str are not."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's, of many elements
        return None
    return number if math.isfinite(number) else None


def _check_whole(owner: object, names: tuple[str, ...], least: int = 1) -> None:
    for name in names:
        value, most = getattr(owner, name), _MOST.get(name, _MOST_CHANNELS)
        if not is_whole(value, least) or value > most:
            raise ValueError(f"{type(owner).__name__}: {name} is {value!r}; a whole number from {least} to {most} would do")


def check_convention(owner: str, padding: Any, bn_eps: Any, bn_momentum: Any) -> None:
    """Raise ValueError where padding, eps or momentum (None: the cumulative average) are none that a net can have."""
    if padding not in PADDINGS:
        raise ValueError(f"{owner}: padding is {padding!r}; one of {', '.join(map(repr, PADDINGS))} would do")
    if not is_real(bn_eps) or not 0 <= bn_eps < 1:
        raise ValueError(f"{owner}: bn_eps is {bn_eps!r}; a number >= 0 and below 1 would do")
    if bn_momentum is not None and not (is_real(bn_momentum) and 0 <= bn_momentum <= 1):
        raise ValueError(f"{owner}: bn_momentum is {bn_momentum!r}; a number from 0 to 1, or None, would do")


def round_channels(channels: float, width: float = 1.0, divisor: int = 8, limit: float = 0.9) -> int:
    """Scale a channel count and round it to a multiple of ``divisor``.

    ``max(divisor, int(width * channels + divisor / 2) // divisor * divisor)``, one divisor more where that fell below ``limit``
    times the exact value (the rule of the EfficientNet V1 code; V2 has ``limit=0``).
    """
    exact = channels * width
    if not math.isfinite(exact):
        raise ValueError(f"round_channels: channels is {channels!r} and width {width!r}; finite numbers would do")
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * exact else rounded


def round_layers(layers: int, depth: float = 1.0) -> int:
    """Scale a stage's layer count: ``ceil(layers * depth)``."""
    exact = layers * depth
    if not math.isfinite(exact):
        raise ValueError(f"round_layers: layers is {layers!r} and depth {depth!r}; finite numbers would do")
    return math.ceil(exact)


@dataclass(frozen=True)
class StageConfig:
    """A run of like blocks: one row of the paper's Table 1.

    operator      "mbconv" (expand 1x1, depthwise, squeeze-excite, project 1x1), "fused_mbconv" (expand kxk, project 1x1),
                  "separable" (depthwise, 1x1, an activation after each; arXiv 1704.04861), "basic" (two kxk) or "bottleneck"
                  (1x1, kxk, 1x1; arXiv 1512.03385, figure 5), the last two beside a shortcut that projects where shapes differ
    kernel_size   of the depthwise, fused or kxk convolution
    stride        of the stage's first block (in its kxk convolution, of "basic" in the first); the others have stride 1
    expand_ratio  expanded channels over the block's input channels, 1 means no expansion; of "bottleneck" the output channels
                  over the middle ones
    out_channels  of every block
    layers        blocks in the stage
    se_ratio      squeeze channels over the block's *input* channels; 0 means no squeeze-excite
    """

    operator: str
    kernel_size: int
    stride: int
    expand_ratio: int
    out_channels: int
    layers: int
    se_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(f"StageConfig: operator is {self.operator!r}; one of {', '.join(OPERATORS)} would do")
        _check_whole(self, ("kernel_size", "stride", "expand_ratio", "out_channels", "layers"))
        if self.kernel_size % 2 == 0 or self.stride > 2:
            raise ValueError(
                f"StageConfig: kernel_size {self.kernel_size}, stride {self.stride}; an odd kernel and stride 1 or 2 would do"
            )
        if not is_real(self.se_ratio) or not 0 <= self.se_ratio <= 1:
            raise ValueError(f"StageConfig: se_ratio is {self.se_ratio!r}; a number from 0 to 1 would do")
        if self.se_ratio and self.operator != "mbconv":
            raise ValueError(f"StageConfig: se_ratio is {self.se_ratio!r}; {self.operator} has no squeeze-excite, so 0 would do")
        if self.operator in ("separable", "basic") and self.expand_ratio != 1:
            raise ValueError(f"StageConfig: expand_ratio is {self.expand_ratio}; {self.operator} does not expand, so 1 would do")
        if self.operator == "bottleneck" and self.out_channels % self.expand_ratio:
            raise ValueError(
                f"StageConfig: out_channels is {self.out_channels}; a multiple of expand_ratio, {self.expand_ratio}, would do"
            )

    @property
    def expansion(self) -> int:
        """Output channels over those that are scaled and rounded: of a bottleneck the middle ones."""
        return self.expand_ratio if self.operator == "bottleneck" else 1


@dataclass(frozen=True)
class BlockConfig:
    """One block with every channel count settled. ``stage`` and ``layer`` count from 0; ``index`` counts over the whole net.

    ``expanded_channels`` are those of the kxk convolution's output; of "basic" and "bottleneck", the middle ones.
    """

    stage: int
    layer: int
    index: int
    operator: str
    kernel_size: int
    stride: int
    in_channels: int
    expanded_channels: int
    out_channels: int
    se_channels: int
    drop_path: float

    @property
    def expands(self) -> bool:
        return self.expanded_channels != self.in_channels

    @property
    def keeps_shape(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def residual(self) -> bool:
        return self.operator in ("basic", "bottleneck") or (self.operator != "separable" and self.keeps_shape)

    @property
    def projects_shortcut(self) -> bool:
        return self.residual and not self.keeps_shape


@dataclass(frozen=True)
class NetConfig:
    """A concrete network: what the builder builds and the cost model counts.

    resolution   the side of the square image the net is meant for, pixels (any size runs)
    dropout      probability before the classifier
    drop_path    stochastic depth: block i of N is dropped, per image, with probability ``drop_path * i / N``
    activation   one of ``ACTIVATIONS``
    head_channels   of the 1x1 convolution before the pool; 0: there is none
    padding      "symmetric" ((k-1)/2 on each side) or "same" (TensorFlow's, from the run-time size)
    bn_momentum  None: the running statistics are the average over all batches
    family       whose names the modules bear, one of ``FAMILIES``
    stem_pool    a 3x3 max pool with stride 2 follows the stem
    """

    name: str
    stages: tuple[StageConfig, ...]
    stem_channels: int
    head_channels: int
    resolution: int
    dropout: float = 0.2
    drop_path: float = 0.2
    activation: str = "silu"
    padding: str = "symmetric"
    bn_eps: float = 1e-5
    bn_momentum: float | None = 0.1
    in_channels: int = 3
    num_classes: int = 1000
    family: str = "efficientnet"
    stem_kernel: int = 3
    stem_stride: int = 2
    stem_pool: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"NetConfig: name is {self.name!r}; a string would do")
        stages = self.stages
        if not isinstance(stages, tuple) or not all(isinstance(stage, StageConfig) for stage in stages) or not stages:
            raise ValueError("NetConfig: stages is no tuple of StageConfig, or an empty one; one or more stages would do")
        if len(stages) > _MOST_STAGES:
            raise ValueError(f"NetConfig: stages has {len(stages)} rows; up to {_MOST_STAGES} would do")
        _check_whole(self, ("stem_channels", "resolution", "in_channels", "stem_kernel", "stem_stride"))
        _check_whole(self, ("head_channels", "num_classes"), least=0)
        for name in ("dropout", "drop_path"):
            value = getattr(self, name)
            if not is_real(value) or not 0 <= value <= 1:
                raise ValueError(f"NetConfig: {name} is {value!r}; a probability from 0 to 1 would do")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"NetConfig: activation is {self.activation!r}; one of {', '.join(map(repr, ACTIVATIONS))} would do")
        check_convention("NetConfig", self.padding, self.bn_eps, self.bn_momentum)
        self._check_family()

    def _check_family(self) -> None:
        family = self.family
        if family not in FAMILIES:
            raise ValueError(f"NetConfig: family is {family!r}; one of {', '.join(map(repr, FAMILIES))} would do")
        for stage in self.stages:
            if stage.operator not in FAMILIES[family] or (stage.se_ratio and family != "efficientnet"):
                raise ValueError(f"NetConfig: a stage of {family} is {stage}; {' or '.join(FAMILIES[family])} would do")
        if family == "mnasnet" and self.stages[0].expand_ratio != 1:  # its first block has no module of its own, and five places
            ratio = self.stages[0].expand_ratio
            raise ValueError(f"NetConfig: expand_ratio of the first stage is {ratio!r} in {family}; 1 would do")
        for name, good, would_do in (
            ("stem_kernel", self.stem_kernel % 2 == 1, "an odd number"),
            ("stem_stride", self.stem_stride <= 2, "1 or 2"),
            ("stem_pool", self.stem_pool in ((True, False) if family == "resnet" else (False,)), "False"),
            ("padding", family == "efficientnet" or self.padding == "symmetric", "'symmetric'"),
            ("head_channels", family == "efficientnet" or bool(self.head_channels) != (family == "resnet"), "the family's own"),
        ):
            if not good:
                raise ValueError(f"NetConfig: {name} is {getattr(self, name)!r} in {family}; {would_do} would do")

    @property
    def features(self) -> int:
        """Channels that the classifier is given."""
        return self.head_channels or self.stages[-1].out_channels

    @property
    def reduction(self) -> int:
        """Pixels of the image's side over those of the last feature map, but for rounding up."""
        return self.stem_stride * (2 if self.stem_pool else 1) * math.prod(stage.stride for stage in self.stages)

    def blocks(self) -> Iterator[BlockConfig]:
        """Every block in order, with the channels that flow through it."""
        total = sum(stage.layers for stage in self.stages)
        channels, index = self.stem_channels, 0
        for number, stage in enumerate(self.stages):
            for layer in range(stage.layers):
                yield BlockConfig(
                    stage=number,
                    layer=layer,
                    index=index,
                    operator=stage.operator,
                    kernel_size=stage.kernel_size,
                    stride=stage.stride if layer == 0 else 1,
                    in_channels=channels,
                    expanded_channels=_middle(stage, channels),
                    out_channels=stage.out_channels,
                    se_channels=max(1, int(channels * stage.se_ratio)) if stage.se_ratio else 0,
                    drop_path=self.drop_path * index / total,
                )
                channels, index = stage.out_channels, index + 1


def _middle(stage: StageConfig, in_channels: int) -> int:
    residual_net = stage.operator in ("basic", "bottleneck")
    return stage.out_channels // stage.expansion if residual_net else in_channels * stage.expand_ratio


@dataclass(frozen=True)
class BaseNet:
    """A network before scaling, and the rounding rules that its authors scale it by.

    fixed_ends   the Lite rule: stem and head keep their width, the first and last stage their depth
    round_limit  see :func:`round_channels`
    head_rule    the head's width is "scaled" as any, "grows" (is scaled by no less than 1) or stays "fixed"
    dropout      before the classifier, at any size, and no stochastic depth; None: as EfficientNets of that size have them
    """

    name: str
    stages: tuple[StageConfig, ...]
    stem_channels: int
    head_channels: int
    resolution: int
    activation: str = "silu"
    fixed_ends: bool = False
    round_limit: float = 0.9
    head_rule: str = "scaled"
    dropout: float | None = None
    bn_momentum: float = 0.1
    family: str = "efficientnet"
    stem_kernel: int = 3
    stem_stride: int = 2
    stem_pool: bool = False

    def scaled(
        self,
        depth: float = 1.0,
        width: float = 1.0,
        resolution: int | None = None,
        name: str | None = None,
        **settings: float | str,
    ) -> NetConfig:
        """The net with depth and width multiplied, at ``resolution`` pixels (default: the base's own).

        ``settings`` are further ``NetConfig`` fields (dropout, padding, bn_eps, ...).
        """
        for label, value in (("depth", depth), ("width", width)):
            if not is_real(value) or value <= 0:
                raise ValueError(f"{self.name}.scaled: {label} is {value!r}; a finite multiplier > 0 would do")
        pixels = self.resolution if resolution is None else resolution
        if not is_whole(pixels):
            raise ValueError(f"{self.name}.scaled: resolution is {pixels!r}; a whole number of pixels >= 1 would do")

        def channels(count: int, factor: float = width) -> int:
            return round_channels(count, factor, limit=self.round_limit)

        def stage(number: int, row: StageConfig) -> StageConfig:
            keeps = self.fixed_ends and number in (0, len(self.stages) - 1)
            out = channels(row.out_channels // row.expansion) * row.expansion
            return replace(row, out_channels=out, layers=row.layers if keeps else round_layers(row.layers, depth))

        own: dict[str, Any] = {} if self.dropout is None else {"dropout": self.dropout, "drop_path": 0.0}
        return NetConfig(
            name=name or self.name,
            stages=tuple(stage(number, row) for number, row in enumerate(self.stages)),
            stem_channels=self.stem_channels if self.fixed_ends else channels(self.stem_channels),
            head_channels=self.head_channels and channels(self.head_channels, self.head_width(width)),
            resolution=pixels,
            activation=self.activation,
            family=self.family,
            stem_kernel=self.stem_kernel,
            stem_stride=self.stem_stride,
            stem_pool=self.stem_pool,
            **{"bn_momentum": self.bn_momentum, **own, **settings},
        )

    def head_width(self, width: float) -> float:
        """What the head's width is multiplied by where all else's is by ``width``."""
        if self.fixed_ends or self.head_rule == "fixed":
            return 1.0
        return max(1.0, width) if self.head_rule == "grows" else width


def stage_rows(*rows: tuple[str, int, int, int, int, int, float]) -> tuple[StageConfig, ...]:
    """Rows of (operator, kernel, stride, expand, out channels, layers, se_ratio)."""
    return tuple(StageConfig(*row) for row in rows)


# EfficientNet, Table 1.
B0 = BaseNet(
    "efficientnet_b0",
    stage_rows(
        ("mbconv", 3, 1, 1, 16, 1, 0.25),
        ("mbconv", 3, 2, 6, 24, 2, 0.25),
        ("mbconv", 5, 2, 6, 40, 2, 0.25),
        ("mbconv", 3, 2, 6, 80, 3, 0.25),
        ("mbconv", 5, 1, 6, 112, 3, 0.25),
        ("mbconv", 5, 2, 6, 192, 4, 0.25),
        ("mbconv", 3, 1, 6, 320, 1, 0.25),
    ),
    stem_channels=32,
    head_channels=1280,
    resolution=224,
)

# EfficientNet-Lite: no squeeze-excite, ReLU6, ends not scaled.
LITE0 = BaseNet(
    "efficientnet_lite0",
    tuple(StageConfig(s.operator, s.kernel_size, s.stride, s.expand_ratio, s.out_channels, s.layers) for s in B0.stages),
    stem_channels=32,
    head_channels=1280,
    resolution=224,
    activation="relu6",
    fixed_ends=True,
)

# EfficientNetV2 (arXiv 2104.00298), Table 4 for S; M, L, XL and the base nets from the authors' release.
V2_B0 = BaseNet(
    "efficientnetv2_b0",
    stage_rows(
        ("fused_mbconv", 3, 1, 1, 16, 1, 0),
        ("fused_mbconv", 3, 2, 4, 32, 2, 0),
        ("fused_mbconv", 3, 2, 4, 48, 2, 0),
        ("mbconv", 3, 2, 4, 96, 3, 0.25),
        ("mbconv", 3, 1, 6, 112, 5, 0.25),
        ("mbconv", 3, 2, 6, 192, 8, 0.25),
    ),
    stem_channels=32,
    head_channels=1280,
    resolution=224,
    round_limit=0.0,
)
V2_S = BaseNet(
    "efficientnetv2_s",
    stage_rows(
        ("fused_mbconv", 3, 1, 1, 24, 2, 0),
        ("fused_mbconv", 3, 2, 4, 48, 4, 0),
        ("fused_mbconv", 3, 2, 4, 64, 4, 0),
        ("mbconv", 3, 2, 4, 128, 6, 0.25),
        ("mbconv", 3, 1, 6, 160, 9, 0.25),
        ("mbconv", 3, 2, 6, 256, 15, 0.25),
    ),
    stem_channels=24,
    head_channels=1280,
    resolution=384,
    round_limit=0.0,
)
V2_M = BaseNet(
    "efficientnetv2_m",
    stage_rows(
        ("fused_mbconv", 3, 1, 1, 24, 3, 0),
        ("fused_mbconv", 3, 2, 4, 48, 5, 0),
        ("fused_mbconv", 3, 2, 4, 80, 5, 0),
        ("mbconv", 3, 2, 4, 160, 7, 0.25),
        ("mbconv", 3, 1, 6, 176, 14, 0.25),
        ("mbconv", 3, 2, 6, 304, 18, 0.25),
        ("mbconv", 3, 1, 6, 512, 5, 0.25),
    ),
    stem_channels=24,
    head_channels=1280,
    resolution=480,
    round_limit=0.0,
)
V2_L = BaseNet(
    "efficientnetv2_l",
    stage_rows(
        ("fused_mbconv", 3, 1, 1, 32, 4, 0),
        ("fused_mbconv", 3, 2, 4, 64, 7, 0),
        ("fused_mbconv", 3, 2, 4, 96, 7, 0),
        ("mbconv", 3, 2, 4, 192, 10, 0.25),
        ("mbconv", 3, 1, 6, 224, 19, 0.25),
        ("mbconv", 3, 2, 6, 384, 25, 0.25),
        ("mbconv", 3, 1, 6, 640, 7, 0.25),
    ),
    stem_channels=32,
    head_channels=1280,
    resolution=480,
    round_limit=0.0,
)
V2_XL = BaseNet(
    "efficientnetv2_xl",
    stage_rows(
        ("fused_mbconv", 3, 1, 1, 32, 4, 0),
        ("fused_mbconv", 3, 2, 4, 64, 8, 0),
        ("fused_mbconv", 3, 2, 4, 96, 8, 0),
        ("mbconv", 3, 2, 4, 192, 16, 0.25),
        ("mbconv", 3, 1, 6, 256, 24, 0.25),
        ("mbconv", 3, 2, 6, 512, 32, 0.25),
        ("mbconv", 3, 1, 6, 640, 8, 0.25),
    ),
    stem_channels=32,
    head_channels=1280,
    resolution=512,
    round_limit=0.0,
)
