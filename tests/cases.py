"""The shapes that every backend of an op is held to: those of B0..B7, reduced, and the nasty ones."""

from __future__ import annotations

from typing import NamedTuple

from effnet_fast.models import FAMILY
from effnet_fast.nn.padding import same_sides


class Case(NamedTuple):
    """A depthwise convolution: images, channels, height, width, kernel, stride, padding (top, bottom, left, right)."""

    images: int
    channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: tuple[int, int, int, int]

    def __str__(self) -> str:
        same = "" if self.padding[0] == self.padding[1] == self.padding[2] == self.padding[3] else f"-pad{self.padding}"
        return f"n{self.images}-c{self.channels}-{self.height}x{self.width}-k{self.kernel}s{self.stride}{same}"


def symmetric(kernel: int) -> tuple[int, int, int, int]:
    return (kernel // 2,) * 4


def depthwise_shapes() -> list[Case]:
    """Every distinct depthwise shape of B0..B7 at its own resolution, one image."""
    found: dict[Case, None] = {}
    for name in (f"efficientnet_b{number}" for number in range(8)):
        config = FAMILY[name]
        size = (config.resolution + 1) // 2
        for block in config.blocks():
            found[Case(1, block.expanded_channels, size, size, block.kernel_size, block.stride, symmetric(block.kernel_size))] = (
                None
            )
            size = (size + block.stride - 1) // block.stride
    return list(found)


def reduced(case: Case) -> Case:
    """The case cut down for emulators and interpreters: residues of H and W modulo 16 and of C modulo 32 kept, C at most 64."""
    side = {size: size if size <= 20 else 16 + size % 16 for size in (case.height, case.width)}
    channels = case.channels if case.channels <= 64 else 32 + case.channels % 32
    return case._replace(channels=channels, height=side[case.height], width=side[case.width])


def nasty() -> list[Case]:
    """Edges that real nets meet rarely, and kernels get wrong."""
    same = [
        Case(2, 16, height, width, kernel, 2, (*same_sides(height, kernel, 2), *same_sides(width, kernel, 2)))
        for kernel in (3, 5)
        for height, width in ((8, 9), (7, 12))
    ]
    return [
        Case(2, 8, 1, 17, 3, 1, symmetric(3)),
        Case(1, 8, 17, 1, 5, 1, symmetric(5)),
        Case(1, 16, 1, 1, 5, 2, symmetric(5)),
        Case(3, 13, 9, 5, 3, 2, symmetric(3)),
        Case(2, 1, 6, 6, 3, 1, symmetric(3)),
        Case(2, 37, 7, 11, 5, 1, symmetric(5)),
        Case(0, 16, 8, 8, 3, 1, symmetric(3)),
        Case(1, 24, 6, 7, 3, 1, (0, 2, 1, 0)),
        Case(2, 8, 3, 3, 3, 1, (0, 0, 0, 0)),
        *same,
    ]


class Stem(NamedTuple):
    """A stem over uint8 images, 3x3 with stride 2: N, C, H, W and K, and its padding (top, bottom, left, right)."""

    images: int
    channels: int
    height: int
    width: int
    out: int
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)


STEMS = [
    Stem(2, 3, 33, 32, 32),
    Stem(2, 3, 14, 9, 40, (0, 1, 0, 1)),
    Stem(1, 3, 7, 47, 7, (2, 0, 1, 3)),
    Stem(3, 1, 12, 13, 16, (0, 1, 1, 1)),
    Stem(2, 4, 9, 6, 24),
    Stem(1, 3, 1, 1, 13),
    Stem(0, 3, 8, 8, 16),
]


class Pointwise(NamedTuple):
    """A pointwise convolution of a square image: C, K, its side, whether it has a gate (no activation follows then, else SiLU) and
    a residual."""

    channels: int
    out: int
    side: int
    gate: bool
    residual: bool

    def __str__(self) -> str:
        parts = "-gate" * self.gate + "-residual" * self.residual
        return f"c{self.channels}-k{self.out}-{self.side}x{self.side}{parts}"


def pointwise_shapes() -> list[Pointwise]:
    """Every distinct pointwise shape of B0..B7 at its own resolution: expand, project and head."""
    found: dict[Pointwise, None] = {}
    for name in (f"efficientnet_b{number}" for number in range(8)):
        config = FAMILY[name]
        size = (config.resolution + 1) // 2
        for block in config.blocks():
            if block.expanded_channels != block.in_channels:
                found[Pointwise(block.in_channels, block.expanded_channels, size, False, False)] = None
            size = (size + block.stride - 1) // block.stride
            residual = block.stride == 1 and block.in_channels == block.out_channels
            found[Pointwise(block.expanded_channels, block.out_channels, size, True, residual)] = None
        found[Pointwise(block.out_channels, config.head_channels, size, False, False)] = None
    return list(found)


def gate_shapes() -> list[tuple[int, int]]:
    """Every distinct squeeze-excite of B0..B7: C and R."""
    configs = (FAMILY[f"efficientnet_b{number}"] for number in range(8))
    return list(dict.fromkeys((block.expanded_channels, block.se_channels) for config in configs for block in config.blocks()))


def reduced_pointwise(case: Pointwise) -> Pointwise:
    """The case cut down for interpreters: the side's residue modulo 4 and those of C and K modulo 32 kept, C and K at most 160."""
    channels, out = (size if size <= 160 else 128 + size % 32 for size in (case.channels, case.out))
    return case._replace(channels=channels, out=out, side=min(case.side, 4 + case.side % 4))


REDUCED = list(dict.fromkeys([*nasty(), *map(reduced, depthwise_shapes())]))
