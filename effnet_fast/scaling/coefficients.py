"""The coefficients that were published, as a table: they are not the law's own points (see :mod:`effnet_fast.scaling.law`)."""

from __future__ import annotations

import math
from typing import NamedTuple

from effnet_fast.scaling.config import B0


class Coefficients(NamedTuple):
    """Multipliers of B0's width and depth, the image side in pixels, and the dropout before the classifier."""

    width: float
    depth: float
    resolution: int
    dropout: float

    @property
    def size(self) -> float:
        """log2(depth * width^2 * resolution_ratio^2): the law's rule of thumb for MACs, in doublings of B0."""
        return math.log2(self.depth * self.width**2 * (self.resolution / B0.resolution) ** 2)


# B0..B7: the EfficientNet paper's released configurations; B8: arXiv 1911.09665; L2: arXiv 1911.04252.
PUBLISHED: dict[str, Coefficients] = {
    "b0": Coefficients(1.0, 1.0, 224, 0.2),
    "b1": Coefficients(1.0, 1.1, 240, 0.2),
    "b2": Coefficients(1.1, 1.2, 260, 0.3),
    "b3": Coefficients(1.2, 1.4, 300, 0.3),
    "b4": Coefficients(1.4, 1.8, 380, 0.4),
    "b5": Coefficients(1.6, 2.2, 456, 0.4),
    "b6": Coefficients(1.8, 2.6, 528, 0.5),
    "b7": Coefficients(2.0, 3.1, 600, 0.5),
    "b8": Coefficients(2.2, 3.6, 672, 0.5),
    "l2": Coefficients(4.3, 5.3, 800, 0.5),
}

# Stochastic depth of every published net: survival probability 0.8 at the last block.
DROP_PATH = 0.2
