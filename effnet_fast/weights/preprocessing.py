"""How images are prepared for some weights: it travels with them, and the wrong one costs accuracy silently."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, scale to [0, 1], then ``(x - mean) / std`` per channel.

    crop           side of the square that the network is given, pixels
    resize         target of the resize before the crop: of the shorter side ("center"), or of both sides ("squash")
    interpolation  "bicubic" or "bilinear", antialiased
    """

    crop: int
    resize: int
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @classmethod
    def of(cls, crop: int, crop_pct: float | None = None, **settings: Any) -> Preprocessing:
        """From the share of the resized image that the crop keeps; by default the TensorFlow code's, crop / (crop + 32)."""
        return cls(crop, crop + 32 if crop_pct is None else math.floor(crop / crop_pct), **settings)

    def for_channels(self, channels: int) -> Preprocessing:
        """For images of other than three channels: one takes the means over the colours, more repeat the colours."""
        if channels == len(self.mean):
            return self
        if channels == 1:
            return replace(self, mean=(sum(self.mean) / len(self.mean),), std=(sum(self.std) / len(self.std),))
        mean, std = (tuple(values[i % len(values)] for i in range(channels)) for values in (self.mean, self.std))
        return replace(self, mean=mean, std=std)

    @property
    def crop_pct(self) -> float:
        """The share that the crop keeps, so that ``floor(crop / crop_pct)`` is the resize exactly."""
        share = self.crop / self.resize
        return share if math.floor(self.crop / share) == self.resize else math.nextafter(share, 0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
