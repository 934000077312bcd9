"""Older nets that the same law scales: MobileNetV1 and V2, MnasNet and the ResNets, as rows."""

from __future__ import annotations

from effnet_fast.scaling.config import BaseNet, stage_rows

# MobileNetV1 (arXiv 1704.04861, Table 1); the pool comes right after the last block.
MOBILENET_V1 = BaseNet(
    "mobilenet_v1",
    stage_rows(
        ("separable", 3, 1, 1, 64, 1, 0),
        ("separable", 3, 2, 1, 128, 2, 0),
        ("separable", 3, 2, 1, 256, 2, 0),
        ("separable", 3, 2, 1, 512, 6, 0),
        ("separable", 3, 2, 1, 1024, 2, 0),
    ),
    stem_channels=32,
    head_channels=0,
    resolution=224,
    activation="relu6",
    dropout=0.0,
)

# MobileNetV2 (arXiv 1801.04381, Table 2); section 6.1 keeps the head of narrower nets.
MOBILENET_V2 = BaseNet(
    "mobilenet_v2",
    stage_rows(
        ("mbconv", 3, 1, 1, 16, 1, 0),
        ("mbconv", 3, 2, 6, 24, 2, 0),
        ("mbconv", 3, 2, 6, 32, 3, 0),
        ("mbconv", 3, 2, 6, 64, 4, 0),
        ("mbconv", 3, 1, 6, 96, 3, 0),
        ("mbconv", 3, 2, 6, 160, 3, 0),
        ("mbconv", 3, 1, 6, 320, 1, 0),
    ),
    stem_channels=32,
    head_channels=1280,
    resolution=224,
    activation="relu6",
    head_rule="grows",
    dropout=0.2,
    family="mobilenet_v2",
)

# MnasNet-B1, the one without squeeze-excite (arXiv 1807.11626), as torchvision has it.
MNASNET = BaseNet(
    "mnasnet1_0",
    stage_rows(
        ("mbconv", 3, 1, 1, 16, 1, 0),
        ("mbconv", 3, 2, 3, 24, 3, 0),
        ("mbconv", 5, 2, 3, 40, 3, 0),
        ("mbconv", 5, 2, 6, 80, 3, 0),
        ("mbconv", 3, 1, 6, 96, 2, 0),
        ("mbconv", 5, 2, 6, 192, 4, 0),
        ("mbconv", 3, 1, 6, 320, 1, 0),
    ),
    stem_channels=32,
    head_channels=1280,
    resolution=224,
    activation="relu",
    head_rule="fixed",
    dropout=0.2,
    bn_momentum=1 - 0.9997,
    family="mnasnet",
)


def _resnet(name: str, operator: str, layers: tuple[int, int, int, int], cifar: bool = False) -> BaseNet:
    """A ResNet (arXiv 1512.03385, Table 1), striding as torchvision's: of a bottleneck the 3x3 convolution."""
    expansion = 4 if operator == "bottleneck" else 1
    widths = (64, 128, 256, 512)
    return BaseNet(
        name,
        stage_rows(
            *(
                (operator, 3, 2 if number else 1, expansion, expansion * width, count, 0)
                for number, (width, count) in enumerate(zip(widths, layers, strict=True))
            )
        ),
        stem_channels=64,
        head_channels=0,
        resolution=32 if cifar else 224,
        activation="relu",
        dropout=0.0,
        family="resnet",
        stem_kernel=3 if cifar else 7,
        stem_stride=1 if cifar else 2,
        stem_pool=not cifar,
    )


RESNET18 = _resnet("resnet18", "basic", (2, 2, 2, 2))
RESNET34 = _resnet("resnet34", "basic", (3, 4, 6, 3))
RESNET50 = _resnet("resnet50", "bottleneck", (3, 4, 6, 3))
RESNET101 = _resnet("resnet101", "bottleneck", (3, 4, 23, 3))
# For images of 32x32 pixels: a 3x3 stem that keeps them, and no pool.
RESNET18_CIFAR = _resnet("resnet18_cifar", "basic", (2, 2, 2, 2), cifar=True)
