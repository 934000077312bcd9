"""Compound scaling: base nets, the law and the published table that scale them, what the result costs and how that grows.

No nn.Module and no device in here: ``CompoundScaling().at(4)`` gives a ``NetConfig``, ``Cost.of(config)`` its exact parameters,
MACs, activations, memory and bytes moved; ``multiplier_growth``, ``compound_growth`` and ``thresholds`` tell how they change;
``search`` finds the most accurate net within a budget, and ``grid_search`` the law's coefficients.
"""

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
from effnet_fast.scaling.coefficients import DROP_PATH, PUBLISHED, Coefficients
from effnet_fast.scaling.config import (
    B0,
    LITE0,
    V2_B0,
    V2_L,
    V2_M,
    V2_S,
    V2_XL,
    BaseNet,
    BlockConfig,
    NetConfig,
    StageConfig,
    round_channels,
    round_layers,
)
from effnet_fast.scaling.cost import Cost, InferenceMemory, Layer, TrainingMemory, layers
from effnet_fast.scaling.fit import POINTS, AccuracyFit, AccuracyPoint, fit_accuracy, published_fit
from effnet_fast.scaling.grid import Grid, GridPoint, grid_search
from effnet_fast.scaling.growth import Growth, Threshold, compound_growth, multiplier_growth, thresholds
from effnet_fast.scaling.law import CompoundScaling, Constraint, NearestNet, ScaledNet
from effnet_fast.scaling.search import Found, Limit, search

__all__ = [
    "B0",
    "DROP_PATH",
    "LITE0",
    "MNASNET",
    "MOBILENET_V1",
    "MOBILENET_V2",
    "POINTS",
    "PUBLISHED",
    "RESNET101",
    "RESNET18",
    "RESNET18_CIFAR",
    "RESNET34",
    "RESNET50",
    "V2_B0",
    "V2_L",
    "V2_M",
    "V2_S",
    "V2_XL",
    "AccuracyFit",
    "AccuracyPoint",
    "BaseNet",
    "BlockConfig",
    "Coefficients",
    "CompoundScaling",
    "Constraint",
    "Cost",
    "Found",
    "Grid",
    "GridPoint",
    "Growth",
    "InferenceMemory",
    "Layer",
    "Limit",
    "NearestNet",
    "NetConfig",
    "ScaledNet",
    "StageConfig",
    "Threshold",
    "TrainingMemory",
    "compound_growth",
    "fit_accuracy",
    "grid_search",
    "layers",
    "multiplier_growth",
    "published_fit",
    "round_channels",
    "round_layers",
    "search",
    "thresholds",
]
