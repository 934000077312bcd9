"""The blocks of ResNets: plain modules, for they have no depthwise convolution."""

from __future__ import annotations

from torch import Tensor, nn

from effnet_fast.nn.blocks import ActLayer, NormLayer, StochasticDepth, conv2d
from effnet_fast.scaling.config import BlockConfig


class ResidualBlock(nn.Module):
    """Two kxk convolutions ("basic"), or 1x1, kxk, 1x1 ("bottleneck"), and a shortcut before the last activation
    (arXiv 1512.03385, figure 5), under torchvision's names. Where shapes differ the shortcut is a 1x1 convolution with a norm.

    x [N, in, H, W] -> [N, out, H', W'], H' = ceil(H / stride).
    """

    def __init__(self, config: BlockConfig, norm_layer: NormLayer, act_layer: ActLayer) -> None:
        super().__init__()
        inputs, middle, out, kernel = config.in_channels, config.expanded_channels, config.out_channels, config.kernel_size
        if config.operator == "bottleneck":
            rows = [(inputs, middle, 1, 1), (middle, middle, kernel, config.stride), (middle, out, 1, 1)]
        else:
            rows = [(inputs, middle, kernel, config.stride), (middle, out, kernel, 1)]
        self.convs = len(rows)
        for number, (before, after, size, stride) in enumerate(rows, start=1):
            self.add_module(f"conv{number}", conv2d(before, after, size, stride, "symmetric"))
            self.add_module(f"bn{number}", norm_layer(after))
        self.relu = act_layer()
        self.downsample: nn.Module | None = None
        if config.projects_shortcut:
            self.downsample = nn.Sequential(conv2d(inputs, out, 1, config.stride, "symmetric"), norm_layer(out))
        self.drop_path = StochasticDepth(config.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.convs + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.convs:
                y = self.relu(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.drop_path(y) + shortcut)
