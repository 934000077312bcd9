"""How images are prepared for some weights: it travels with them, and the wrong one costs accuracy silently."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from effnet_fast.scaling.config import is_real, is_whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CROP_MODES = ("center", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
_MOST_PIXELS = 1 << 16


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

    def __post_init__(self) -> None:
        for name in ("crop", "resize"):
            value = getattr(self, name)
            if not is_whole(value) or value > _MOST_PIXELS:
                raise ValueError(f"Preprocessing: {name} is {value!r}; a whole number of pixels from 1 to {_MOST_PIXELS} would do")
        if self.crop > self.resize:
            raise ValueError(f"Preprocessing: a crop of {self.crop} pixels from {self.resize}; a crop within would do")
        for name, known in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Preprocessing: {name} is {getattr(self, name)!r}; {' or '.join(map(repr, known))} would do")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or not all(map(is_real, values)):
                raise ValueError(f"Preprocessing: {name} is {values!r}; a finite number for each channel would do")
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(
                f"Preprocessing: std is {self.std!r}; as many numbers as mean has, {len(self.mean)}, all > 0, would do"
            )

    @classmethod
    def of(cls, crop: int, crop_pct: float | None = None, **settings: Any) -> Preprocessing:
        """From the share of the resized image that the crop keeps; by default the TensorFlow code's, crop / (crop + 32)."""
        if crop_pct is not None and not (is_real(crop_pct) and 0 < crop_pct <= 1):
            raise ValueError(f"Preprocessing.of: crop_pct is {crop_pct!r}; a share above 0 and up to 1 would do")
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
    def from_dict(cls, values: Any) -> Preprocessing:
        """From what :meth:`to_dict` gave; ValueError or TypeError names what is wrong with it."""
        if not isinstance(values, dict) or not all(isinstance(values.get(name), (list, tuple)) for name in ("mean", "std")):
            raise ValueError("the preprocessing is no mapping with a list of numbers for mean and for std")
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
