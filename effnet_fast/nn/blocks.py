"""The plain modules: ordinary children under timm's names, and a forward that is fused where that gives the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.nn.fused import FusedBlock
from effnet_fast.nn.padding import check_padding, pad
from effnet_fast.nn.parts import (
    BlockParts,
    ConvNormAct,
    SqueezeExciteParts,
    activation_name,
    has_hooks,
    squeeze_excite_parts,
    why_not_activation,
    why_not_fused,
)
from effnet_fast.scaling.config import BlockConfig

NormLayer = Callable[[int], nn.Module]
ActLayer = Callable[[], nn.Module]


def conv2d(in_channels: int, out_channels: int, kernel: int, stride: int, padding: str, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias; for "same" its zeros come from the run-time size, so it has none of its own."""
    own = kernel // 2 if padding == "symmetric" else 0
    return nn.Conv2d(in_channels, out_channels, kernel, stride, own, groups=groups, bias=False)


class StochasticDepth(nn.Module):
    """Drop the whole branch of an image with probability ``drop_prob`` and scale the kept ones (arXiv 1603.09382); x [N, ...]."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"StochasticDepth: drop_prob is {drop_prob!r}; a probability in [0, 1) would do")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channels' means (arXiv 1709.01507); x [N, C, H, W]."""

    def __init__(self, channels: int, squeezed: int, act_layer: ActLayer) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.act1 = act_layer()
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


class MBConv(FusedBlock, nn.Module):
    """Mobile inverted bottleneck (arXiv 1801.04381) with squeeze-excite: expand 1x1, depthwise kxk, gate, project 1x1.

    x [N, in, H, W] -> [N, out, H', W'], H' = ceil(H / stride). With no expansion (MBConv1) there is no expand convolution, and the
    children bear the names that timm gives that case.
    """

    def __init__(self, config: BlockConfig, norm_layer: NormLayer, act_layer: ActLayer, padding: str) -> None:
        super().__init__()
        check_padding("MBConv", padding)
        self.padding, self.residual, self.expands = padding, config.residual, config.expands
        self.kernel_size, self.stride = config.kernel_size, config.stride
        channels = config.expanded_channels
        depthwise = conv2d(channels, channels, config.kernel_size, config.stride, padding, groups=channels)
        project = conv2d(channels, config.out_channels, 1, 1, padding)
        gate = SqueezeExcite(channels, config.se_channels, act_layer) if config.se_channels else nn.Identity()
        if self.expands:
            self.conv_pw = conv2d(config.in_channels, channels, 1, 1, padding)
            self.bn1, self.act1 = norm_layer(channels), act_layer()
            self.conv_dw, self.bn2, self.act2 = depthwise, norm_layer(channels), act_layer()
            self.se, self.conv_pwl, self.bn3 = gate, project, norm_layer(config.out_channels)
        else:
            self.conv_dw, self.bn1, self.act1 = depthwise, norm_layer(channels), act_layer()
            self.se, self.conv_pw, self.bn2 = gate, project, norm_layer(config.out_channels)
        self.drop_path = StochasticDepth(config.drop_path)

    def forward_children(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.expands:
            x = self.act1(self.bn1(self.conv_pw(x)))
            x = pad(self.conv_dw, self.kernel_size, self.stride, self.padding, x)
            x = self.act2(self.bn2(self.conv_dw(x)))
            x = self.bn3(self.conv_pwl(self.se(x)))
        else:
            x = pad(self.conv_dw, self.kernel_size, self.stride, self.padding, x)
            x = self.act1(self.bn1(self.conv_dw(x)))
            x = self.bn2(self.conv_pw(self.se(x)))
        return self.drop_path(x) + shortcut if self.residual else x

    def parts(self, *args: Any, **kwargs: Any) -> BlockParts | str:
        child: Any = self._modules
        if self.expands:
            expand = child["conv_pw"], child["bn1"], child["act1"]
            depthwise = child["conv_dw"], child["bn2"], child["act2"]
            project = child["conv_pwl"], child["bn3"], None
        else:
            expand, depthwise = None, (child["conv_dw"], child["bn1"], child["act1"])
            project = child["conv_pw"], child["bn2"], None
        return depthwise_parts(expand, depthwise, project, self.padding, self.residual, child["drop_path"], child["se"])


class DepthwiseSeparable(FusedBlock, nn.Module):
    """MobileNetV1's block (arXiv 1704.04861): depthwise kxk and 1x1, each normalised and activated, and no shortcut.

    x [N, in, H, W] -> [N, out, H', W'], H' = ceil(H / stride).
    """

    def __init__(self, config: BlockConfig, norm_layer: NormLayer, act_layer: ActLayer, padding: str) -> None:
        super().__init__()
        check_padding("DepthwiseSeparable", padding)
        self.padding, self.kernel_size, self.stride = padding, config.kernel_size, config.stride
        channels = config.in_channels
        self.conv_dw = conv2d(channels, channels, config.kernel_size, config.stride, padding, groups=channels)
        self.bn1, self.act1 = norm_layer(channels), act_layer()
        self.conv_pw = conv2d(channels, config.out_channels, 1, 1, padding)
        self.bn2, self.act2 = norm_layer(config.out_channels), act_layer()

    def forward_children(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_dw(pad(self.conv_dw, self.kernel_size, self.stride, self.padding, x))))
        return self.act2(self.bn2(self.conv_pw(x)))

    def parts(self, *args: Any, **kwargs: Any) -> BlockParts | str:
        child: Any = self._modules
        depthwise = child["conv_dw"], child["bn1"], child["act1"]
        return depthwise_parts(None, depthwise, (child["conv_pw"], child["bn2"], child["act2"]), self.padding)


class FusedMBConv(FusedBlock, nn.Module):
    """EfficientNetV2's block (arXiv 2104.00298): a dense kxk convolution expands, a 1x1 projects; x [N, in, H, W].

    With no expansion the kxk convolution is all there is, and its activation comes before the residual.
    """

    def __init__(self, config: BlockConfig, norm_layer: NormLayer, act_layer: ActLayer, padding: str) -> None:
        super().__init__()
        check_padding("FusedMBConv", padding)
        self.padding, self.residual, self.expands = padding, config.residual, config.expands
        self.kernel_size, self.stride = config.kernel_size, config.stride
        if self.expands:
            self.conv_exp = conv2d(config.in_channels, config.expanded_channels, config.kernel_size, config.stride, padding)
            self.bn1, self.act1 = norm_layer(config.expanded_channels), act_layer()
            self.conv_pwl = conv2d(config.expanded_channels, config.out_channels, 1, 1, padding)
            self.bn2 = norm_layer(config.out_channels)
        else:
            self.conv = conv2d(config.in_channels, config.out_channels, config.kernel_size, config.stride, padding)
            self.bn1, self.act1 = norm_layer(config.out_channels), act_layer()
        self.drop_path = StochasticDepth(config.drop_path)

    def forward_children(self, x: Tensor) -> Tensor:
        shortcut, first = x, self.conv_exp if self.expands else self.conv
        x = self.act1(self.bn1(first(pad(first, self.kernel_size, self.stride, self.padding, x))))
        if self.expands:
            x = self.bn2(self.conv_pwl(x))
        return self.drop_path(x) + shortcut if self.residual else x

    def parts(self, *args: Any, **kwargs: Any) -> BlockParts | str:
        child: Any = self._modules
        act1, drop_path = child["act1"], child["drop_path"]
        first = child["conv_exp" if self.expands else "conv"]
        dense = ConvNormAct(first, child["bn1"], activation_name(act1) or "", self.padding)
        reason = why_not_activation(act1) or why_not_fused(dense)
        expand, project = None, dense
        if self.expands:
            expand, project = dense, ConvNormAct(child["conv_pwl"], child["bn2"])
            reason = reason or why_not_fused(project)
        reason = reason or _why_not_drop_path(drop_path)
        return reason or BlockParts(expand, None, None, project, self.residual, _drop(drop_path))


def depthwise_parts(
    expand: Sequence[Any] | None,
    depthwise: Sequence[Any],
    project: Sequence[Any],
    padding: str,
    residual: bool = False,
    drop_path: nn.Module | None = None,
    se: nn.Module | None = None,
) -> BlockParts | str:
    """The parts of a block with a depthwise convolution, or why they are not what the ops compute.

    expand, depthwise, project  (convolution, norm, activation) each; None where there is none
    """
    activation = activation_name(depthwise[2]) or ""
    last = "identity" if project[2] is None else activation_name(project[2]) or ""
    expand_part, reason = None, None
    if expand is not None:
        expand_part = ConvNormAct(expand[0], expand[1], activation_name(expand[2]) or "")
        reason = why_not_fused(expand_part) or why_not_activation(depthwise[2])
        if expand_part.activation != activation:
            reason = reason or "the block's two activations differ"
        reason = reason or why_not_activation(expand[2])
    depthwise_part = ConvNormAct(depthwise[0], depthwise[1], activation, padding)
    project_part = ConvNormAct(project[0], project[1], last)
    reason = reason or why_not_activation(depthwise[2]) or why_not_fused(depthwise_part, "depthwise")
    reason = reason or why_not_fused(project_part, "pointwise")
    reason = reason or (None if project[2] is None else why_not_activation(project[2]))
    squeeze_excite = None if type(se) is nn.Identity or se is None else _squeeze_excite_parts(se)
    if isinstance(squeeze_excite, str):
        return reason or squeeze_excite
    if se is not None and has_hooks(se):
        reason = reason or "a hook sits on a child"
    drop = None
    if drop_path is not None:
        reason, drop = reason or _why_not_drop_path(drop_path), _drop(drop_path)
    return reason or BlockParts(expand_part, depthwise_part, squeeze_excite, project_part, residual, drop)


def _why_not_drop_path(module: nn.Module) -> str | None:
    if type(module) not in (StochasticDepth, nn.Identity):
        return f"the drop path is a {type(module).__name__}"
    return "a hook sits on a child" if has_hooks(module) else None


def _drop(module: nn.Module) -> nn.Module | None:
    return module if module.training and getattr(module, "drop_prob", 0) != 0 else None


def _squeeze_excite_parts(module: nn.Module) -> SqueezeExciteParts | str:
    if type(module) is not SqueezeExcite:
        return f"the squeeze-excite was replaced by {type(module).__name__}"
    child: Any = module._modules
    if type(child["gate"]) is not nn.Sigmoid or has_hooks(child["gate"]):
        return "the gate of the squeeze-excite was replaced or has a hook"
    reason = why_not_activation(child["act1"])
    return reason or squeeze_excite_parts(child["conv_reduce"], child["conv_expand"], activation_name(child["act1"]))


def set_padding(module: nn.Module, padding: str) -> None:
    """Change how every block of ours inside ``module`` pads: weights trained under one padding want that one."""
    check_padding("set_padding", padding)
    for block in module.modules():
        if isinstance(block, (MBConv, FusedMBConv, DepthwiseSeparable)):
            block.padding = padding
            for child in block.modules():  # deeper too: another tool may have wrapped a convolution
                if isinstance(child, nn.Conv2d) and child.kernel_size != (1, 1):
                    set_conv_padding(child, padding)


def set_conv_padding(conv: nn.Conv2d, padding: str) -> None:
    """Give one convolution the zeros of its own that ``padding`` leaves to it."""
    own = conv.kernel_size[0] // 2 if padding == "symmetric" else 0
    conv.padding = (own, own)
    conv._reversed_padding_repeated_twice = [own] * 4


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Initialise in place as the paper's code: convolutions N(0, 2 / fan_out), fan_out = k * k * out / groups; norms one and zero.

    Linear layers are left: they begin as their family has it (:meth:`effnet_fast.models.net.Classifier.init_classifier`)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            continue
        if isinstance(child, nn.Conv2d):
            fan_out = child.kernel_size[0] * child.kernel_size[1] * child.out_channels // child.groups
            nn.init.normal_(child.weight, 0.0, (2.0 / fan_out) ** 0.5)
        elif isinstance(child, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)) and child.weight is not None:
            nn.init.ones_(child.weight)
        if isinstance(getattr(child, "bias", None), nn.Parameter):
            nn.init.zeros_(child.bias)  # type: ignore[arg-type]
