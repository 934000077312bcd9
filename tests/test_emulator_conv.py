"""The CUDA kernel of conv_bn_act, its own source run on the CPU under AddressSanitizer and UBSan: every kernel that is compiled,
both layouts, bytes, paddings and residuals against fp64 by the 2x rule, several thread orders, seeded bugs."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import plain
import pytest
import torch
from cases import Stem
from emulator import build as emulator
from emulator.arrays import ACTIVATIONS, DTYPES, from_raw, raw
from tolerance import assert_2x

from effnet_fast.ops import Norm
from effnet_fast.ops.common import output_size

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Run:
    """One call. ``by_channel``: x is NCHW in memory; ``multiprocessors``: of the GPU, so how many blocks share the tiles;
    ``misalign``: elements by which all but y and the residual is moved."""

    case: Stem
    dtype: torch.dtype
    activation: str = "silu"
    by_channel: bool = False
    uint8: bool = False
    residual: bool = False
    weight_dtype: torch.dtype = torch.float32
    norm_dtype: torch.dtype = torch.float32
    affine: bool = True
    multiprocessors: int = 1
    misalign: int = 0

    def size(self) -> tuple[int, int]:
        c = self.case
        top, bottom, left, right = c.padding
        return output_size(c.height, 3, 2, top, bottom), output_size(c.width, 3, 2, left, right)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, Norm, torch.Tensor | None]:
        """x, weight, norm and residual."""
        c = self.case
        g = torch.Generator().manual_seed(c.out + c.height)
        shape = c.images, c.channels, c.height, c.width
        x = plain.uint8_images(*shape, g) if self.uint8 else torch.randn(shape, generator=g).to(self.dtype)
        weight = (0.5 * torch.randn(c.out, c.channels, 3, 3, generator=g)).to(self.weight_dtype)
        norm = plain.norm(c.out, self.norm_dtype, g)
        norm = norm if self.affine else norm._replace(weight=None, bias=None)
        residual = torch.randn(c.images, c.out, *self.size(), generator=g).to(self.dtype) if self.residual else None
        return x, weight, norm, residual

    def expected(self, wide: bool) -> torch.Tensor:
        """What PyTorch's functions compute, in y's dtype or in fp64."""
        x, *others = self.tensors()
        if self.uint8:
            x = plain.normalised(x, torch.float64 if wide else self.dtype)
        x, weight, norm, residual = plain.wide((x, *others)) if wide else (x, *others)
        return plain.conv(x, weight, norm, 2, self.case.padding, 1, self.activation, residual)

    def call(self, seed: int = 0, x: torch.Tensor | None = None) -> tuple[str, tuple]:
        given, weight, norm, residual = self.tensors()
        c = self.case
        window = [2, c.padding[0], c.padding[2], *self.size()]
        tensors = raw((given if x is None else x).permute(0, 2, 3, 1)), self.by_channel, raw(weight)
        vectors = [None if v is None else raw(v) for v in norm[:4]]
        pixels = raw(plain.pixels(c.channels)) if self.uint8 else None
        added = None if residual is None else raw(residual.permute(0, 2, 3, 1))
        types = [DTYPES[self.dtype], DTYPES[self.weight_dtype], DTYPES[self.norm_dtype]]
        options = ACTIVATIONS[self.activation], pixels, added, types, self.multiprocessors, seed, self.misalign
        return "conv", (*tensors, vectors, window, *options)

    def result(self, out) -> torch.Tensor:
        return from_raw(out, self.dtype).permute(0, 3, 1, 2)


def width_of_block(channels: int) -> int:
    return min((64, 48, 32), key=lambda width: -(-channels // width) * width)


# Beside symmetric padding TensorFlow's of even sizes, none, and more than a tap.
PADDINGS = [(1, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0), (2, 0, 1, 3)]
CHANNELS = [8, 24, 32, 40, 48, 56, 64, 72, 136]


def stems() -> list[Run]:
    """Each K, in each type, with SiLU and without; the other options by lot. Tiles are 4 rows and, at most, 112 columns."""
    draw, runs = random.Random(0), []
    for out, dtype, silu in itertools.product(CHANNELS, HALF, (True, False)):
        case = Stem(draw.randint(1, 2), draw.choice((3, 3, 3, 1, 2, 4)), draw.randint(3, 12), draw.randint(3, 70), out)
        runs.append(
            Run(
                case._replace(padding=draw.choice(PADDINGS)),
                dtype,
                "silu" if silu else draw.choice([a for a in plain.ACTIVATIONS if a != "silu"]),
                by_channel=draw.random() < 0.5,
                uint8=draw.random() < 0.4,
                residual=draw.random() < 0.4,
                weight_dtype=draw.choice((torch.float32, dtype)),
                norm_dtype=draw.choice((torch.float32, dtype)),
                affine=draw.random() < 0.8,
                multiprocessors=draw.choice((1, 4)),
                misalign=draw.choice((0, 1)),
            )
        )
    return runs


def loads() -> list[Run]:
    """Each way in which the input is read: number of channels, layout, bytes."""
    options = itertools.product((1, 2, 3, 4), (False, True), (False, True))
    return [
        Run(Stem(1, channels, 9, 11, 16, PADDINGS[i % 4]), HALF[i % 2], by_channel=by_channel, uint8=uint8)
        for i, (channels, by_channel, uint8) in enumerate(options)
    ]


# One pixel, one row, one column; more than one strip of columns, the second narrower, one that is full and one that is not.
SHAPES = [(1, 1), (1, 40), (23, 1), (3, 226), (2, 224), (5, 300)]
SHAPE_RUNS = [Run(Stem(1, 3, *shape, 32), torch.bfloat16) for shape in SHAPES]
COVERING = [*stems(), *loads(), *SHAPE_RUNS]
SEEDS = range(2)  # orders of threads


@pytest.fixture(scope="module")
def modules(shared_directory) -> dict[str, Path]:
    """The kernels as they are, "sound", with each seeded bug, and with smaller launches."""
    with shared_directory("emulator") as directory:
        return emulator.build(directory, {**SEEDED, **SMALL_LAUNCHES})


def check(module: Path, runs: list[Run], seeds: range) -> None:
    results = iter(emulator.run(module, [run.call(seed) for run in runs for seed in seeds]))
    for run in runs:
        outs = [next(results) for _ in seeds]
        assert all(out.tobytes() == outs[0].tobytes() for out in outs), f"{run}: the order of threads changes the result"
        assert_2x(run.result(outs[0]), run.expected(False), run.expected(True), str(run))


def test_every_kernel_is_covered(modules):
    """By the module's own symbols: of each type, width of a block and SiLU or not."""
    symbols = subprocess.run(["nm", modules["sound"]], capture_output=True, text=True, check=True).stdout
    compiled = set(re.findall(r"stem_kernelI\w*?(bf16|fp16)ELi(\d)ELb([01])E", symbols))
    covered = {
        (
            "bf16" if run.dtype == torch.bfloat16 else "fp16",
            str(width_of_block(run.case.out) // 16),
            str(+(run.activation == "silu")),
        )
        for run in COVERING
    }
    assert covered == compiled


def test_covering_cases(modules):
    check(modules["sound"], COVERING, range(1))


@pytest.mark.parametrize("by_channel", [False, True])
def test_non_finite_input(by_channel, modules):
    """A value that is not finite makes NaN of the outputs that see it and (0 * inf) of the one to their left; NaN of one output is
    not NaN of the next."""
    run = Run(Stem(2, 3, 9, 40, 16), torch.bfloat16, by_channel=by_channel)
    x = run.tensors()[0]
    (clean,) = emulator.run(modules["sound"], [run.call()])
    x[1, 1, 4, 18] = float("nan")
    (out,) = emulator.run(modules["sound"], [run.call(x=x)])
    y, before = run.result(out), run.result(clean)
    spoils = torch.zeros_like(y, dtype=torch.bool)
    spoils[1, :, 2, 8:10] = True  # column 9 sees inputs 17 to 19, column 8 sees 15 to 17 and multiplies 18 by zero
    assert torch.equal(~y.isfinite(), spoils)
    assert torch.equal(y[~spoils], before[~spoils])


@pytest.mark.parametrize(("dtype", "of_minus_infinity"), [(torch.bfloat16, float("nan")), (torch.float16, 0.0)], ids=str)
def test_silu_of_values_without_bound(dtype, of_minus_infinity, modules):
    """Far down it is zero, also of what overflows, and far up the value; neither is NaN, nor is its neighbour. That of -infinity is
    NaN, as PyTorch has it, in bfloat16."""
    run = Run(Stem(1, 3, 9, 9, 8), dtype)
    name, arguments = run.call()
    shift = torch.tensor([-float("inf"), 1.0, -3e38, -1e4, 1e4, 3e38, float("nan"), -60.0])
    norm = [None, raw(shift), raw(torch.zeros(8)), raw(torch.ones(8))]
    weight = torch.zeros(8, 3, 3, 3)
    (out,) = emulator.run(modules["sound"], [(name, (*arguments[:2], raw(weight), norm, *arguments[4:]))])
    y = run.result(out)[0, :, 0, 0].float()
    expected = torch.tensor([of_minus_infinity, 0.73, 0, 0, 1e4, 3e38, float("nan"), 0]).to(dtype).float()
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-9, equal_nan=True)


def bug(text: str, replacement: str, says: str) -> emulator.Bug:
    return emulator.Bug("conv/forward.cuh", text, replacement, says, "conv", "-DONE_STEM")


CHANGES = "changes the result|off by|not finite"
SEEDED = {
    "conv-overwritten-input": bug("    __syncthreads();  // all have read", "    // all have read", CHANGES),
    "conv-missing-syncwarp": bug("      __syncwarp();  // the pixels are there\n", "", CHANGES),
    "conv-columns-past-the-image": bug("< unsigned(p.width)", "<= unsigned(p.width)", "heap-buffer-overflow|off by"),
    "conv-off-by-one-store": bug("if (i * 32 + lane < chunks)", "if (i * 32 + lane <= chunks)", "heap-buffer-overflow|off by"),
}
SEEDED_RUNS = [
    Run(Stem(1, 3, 19, 66, 32), torch.bfloat16),
    Run(Stem(2, 3, 7, 39, 24), torch.bfloat16, by_channel=True),
    Run(Stem(7, 3, 5, 212, 16), torch.bfloat16),  # two tiles of one block, with a row too few for a warp that loads
]


def test_seeded_runs_are_sound(modules):
    """What catches the bugs passes without them."""
    check(modules["sound"], SEEDED_RUNS, range(3))


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check(modules[name], SEEDED_RUNS, range(3))


# A launch takes two images, at most; a real one's limit is out of an emulator's reach.
SMALL_LAUNCHES = {"conv-small-launch": bug("kMaxTiles = 1 << 30", "kMaxTiles = 5", "")}


@pytest.mark.parametrize("name", SMALL_LAUNCHES)
def test_more_images_than_a_launch_takes(name, modules):
    run = Run(Stem(5, 3, 13, 20, 32), torch.bfloat16, residual=True)
    check(modules[name], [run, replace(run, uint8=True), replace(run, by_channel=True)], range(1))
