"""Augmentation of colours and shapes by name: torchvision's policies, and timm's strings for them, such as rand-m9-mstd0.5-inc1."""

from __future__ import annotations

import re
from typing import Any

import torch

NAMES = ("none", "autoaugment", "original", "randaugment", "trivialaugment")
# What torchvision can do of timm's strings: an option's value where it is not given, the least and the most; a whole one is whole.
_OPTIONS: dict[str, dict[str, tuple[float, float, float]]] = {
    "rand": {"m": (10, 0, 10), "n": (2, 1, 100), "p": (0.5, 0, 1), "mstd": (0.0, 0, 100), "inc": (0, 1, 1)},
    "augmix": {"m": (3, 1, 10), "w": (3, 1, 100), "d": (-1, 1, 100)},
}
_FINE = 100  # strengths from one of timm's ten to the next


def options_of(aa: str) -> dict[str, Any]:
    """The options of one of timm's strings, those that it leaves out too; none of a plain name.

    rand    m strength (0 to 10), n operations, each with probability p, mstd deviation of the strength of each; inc1 (stronger
            with m, every operation), which must be given: without it timm has some that are weaker
    augmix  m severity (1 to 10), w chains, d operations of each

    Raises ValueError for what torchvision has no policy for.
    """
    kind, *sections = aa.split("-")
    known = _OPTIONS.get(kind)
    if known is None:
        if aa not in NAMES:
            raise ValueError(
                f"aa is {aa!r}, which torchvision has not; {', '.join(NAMES)}, rand-m9-mstd0.5-inc1 or augmix-m3 would do"
            )
        return {}
    options: dict[str, Any] = {name: default for name, (default, _, _) in known.items()}
    for section in sections:
        found = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section)
        default, least, most = known.get(found[1] if found else "", (0, 1, 0))
        value = type(default)(float(found[2])) if found else 0
        if not found or not least <= value <= most or value != float(found[2]):
            ranges = ", ".join(f"{name}{low:g}" + (f" to {high:g}" if high > low else "") for name, (_, low, high) in known.items())
            raise ValueError(f"aa is {aa!r}, and torchvision's {kind} has no {section!r}; {ranges} would do")
        options[found[1]] = value
    if kind == "rand" and not options["inc"]:
        raise ValueError(
            f"aa is {aa!r}, in which some operations are weaker for a larger m, and torchvision's are not; {aa}-inc1 would do"
        )
    return options


def policy(aa: str, fill: list[int], interpolation: Any) -> list[Any]:
    """torchvision's transforms of an RGB image; all chance comes from torch's generator.

    fill           colour of what an image is moved away from, 0 to 255
    interpolation  torchvision's, of rotated and sheared images under timm's string for RandAugment

    The operations are torchvision's: timm's strings have Invert and SolarizeAdd besides, no Identity, and posterize more.
    """
    from torchvision.transforms import v2

    options, kind = options_of(aa), aa.split("-")[0]
    if kind == "rand":
        operation = _Operation(options["m"], options["mstd"], fill=fill, interpolation=interpolation)
        return [v2.RandomApply([operation], options["p"])] * options["n"]
    if kind == "augmix":
        return [v2.AugMix(options["m"], options["w"], options["d"], fill=fill)]
    makers = {
        "autoaugment": v2.AutoAugment,
        "original": v2.AutoAugment,
        "randaugment": v2.RandAugment,  # two operations of strength 9 of 30
        "trivialaugment": v2.TrivialAugmentWide,
    }
    return [makers[aa](fill=fill)] if aa in makers else []


class _Operation:
    """One operation of torchvision's RandAugment, of a strength (0 to 10) that is drawn each time from a normal distribution."""

    def __init__(self, strength: int, deviation: float, **settings: Any) -> None:
        from torchvision.transforms import v2

        self.strength, self.deviation = strength, deviation
        self.augment = v2.RandAugment(num_ops=1, num_magnitude_bins=10 * _FINE + 1, **settings)

    def __call__(self, image: Any) -> Any:
        drawn = self.strength + self.deviation * float(torch.randn(()))
        self.augment.magnitude = round(_FINE * min(max(drawn, 0.0), 10.0))
        return self.augment(image)
