"""All nets as data: one row a network. Adding a variant adds a row."""

from __future__ import annotations

from effnet_fast.scaling.classics import (
    MNASNET,
    MOBILENET_V1,
    MOBILENET_V2,
    RESNET18,
    RESNET18_CIFAR,
    RESNET34,
    RESNET50,
    RESNET101,
)
from effnet_fast.scaling.coefficients import DROP_PATH, PUBLISHED
from effnet_fast.scaling.config import B0, LITE0, V2_B0, V2_L, V2_M, V2_S, V2_XL, BaseNet, NetConfig

# name: (base, width, depth, resolution, dropout). V1: the paper's coefficients.
_ROWS: dict[str, tuple[BaseNet, float, float, int, float]] = {
    **{f"efficientnet_{name}": (B0, c.width, c.depth, c.resolution, c.dropout) for name, c in PUBLISHED.items()},
    # EfficientNet-Lite, as its authors released it.
    "efficientnet_lite0": (LITE0, 1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": (LITE0, 1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": (LITE0, 1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": (LITE0, 1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": (LITE0, 1.4, 1.8, 300, 0.3),
    # EfficientNetV2 (arXiv 2104.00298); the resolution is the one they are evaluated at.
    "efficientnetv2_b0": (V2_B0, 1.0, 1.0, 224, 0.2),
    "efficientnetv2_b1": (V2_B0, 1.0, 1.1, 240, 0.2),
    "efficientnetv2_b2": (V2_B0, 1.1, 1.2, 260, 0.3),
    "efficientnetv2_b3": (V2_B0, 1.2, 1.4, 300, 0.3),
    "efficientnetv2_s": (V2_S, 1.0, 1.0, 384, 0.2),
    "efficientnetv2_m": (V2_M, 1.0, 1.0, 480, 0.3),
    "efficientnetv2_l": (V2_L, 1.0, 1.0, 480, 0.4),
    "efficientnetv2_xl": (V2_XL, 1.0, 1.0, 512, 0.4),
}


def _config(name: str) -> NetConfig:
    base, width, depth, resolution, dropout = _ROWS[name]
    return base.scaled(depth, width, resolution, name, dropout=dropout, drop_path=DROP_PATH)


def _tf_config(name: str) -> NetConfig:
    """The form whose weights were trained in TensorFlow: SAME padding and a batch norm eps of 1e-3."""
    base, width, depth, resolution, dropout = _ROWS[name]
    return base.scaled(depth, width, resolution, f"tf_{name}", dropout=dropout, drop_path=DROP_PATH, padding="same", bn_eps=1e-3)


FAMILY: dict[str, NetConfig] = {
    **{name: _config(name) for name in _ROWS},
    **{f"tf_{name}": _tf_config(name) for name in _ROWS},
}

# Older nets, as their papers have them; of MnasNet torchvision's sizes too, and CIFAR-10 has ten classes.
CLASSICS: dict[str, NetConfig] = {
    config.name: config
    for config in (
        MOBILENET_V1.scaled(),
        MOBILENET_V2.scaled(),
        *(MNASNET.scaled(width=width, name=f"mnasnet{width:.2g}".replace(".", "_")) for width in (0.5, 0.75, 1.3)),
        MNASNET.scaled(),
        *(base.scaled() for base in (RESNET18, RESNET34, RESNET50, RESNET101)),
        RESNET18_CIFAR.scaled(num_classes=10),
    )
}
