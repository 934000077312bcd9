"""The CUDA kernels of depthwise_conv_bn_act, their own source run on the CPU under AddressSanitizer and UBSan: every kernel that is
compiled and the nasty cases against fp64 by the 2x rule, the partial sums against the stored output, several thread orders, seeded
bugs."""

from __future__ import annotations

import itertools
import random
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import cases
import numpy as np
import plain
import pytest
import torch
from cases import Case
from emulator import build as emulator
from emulator.arrays import ACTIVATIONS, DTYPES, from_raw, raw
from sass import depthwise_instance
from tolerance import assert_2x

from effnet_fast.ops import Norm
from effnet_fast.ops.common import output_size
from effnet_fast.ops.depthwise import launch

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

HALF = (torch.bfloat16, torch.float16)
Instance = tuple[str, tuple[int, ...], str, bool]


@dataclass(frozen=True)
class Run:
    """One launch. ``multiprocessors``: of the GPU, so how many segments; ``extra``: channels of x that the kernel must step over;
    ``misalign``: elements by which every tensor but the weight is moved."""

    case: Case
    dtype: torch.dtype
    activation: str = "silu"
    weight_dtype: torch.dtype = torch.float32
    norm_dtype: torch.dtype = torch.float32
    affine: bool = True
    squeeze: bool = True
    multiprocessors: int = 1
    extra: int = 0
    misalign: int = 0

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, Norm]:
        """x [N, C, H, W], weight [C, 1, k, k], and the norm."""
        c = self.case
        g = torch.Generator().manual_seed(c.channels + c.height)
        x = torch.randn(c.images, c.channels, c.height, c.width, generator=g).to(self.dtype)
        weight = (0.5 * torch.randn(c.channels, 1, c.kernel, c.kernel, generator=g)).to(self.weight_dtype)
        norm = plain.norm(c.channels, self.norm_dtype, g)
        return x, weight, norm if self.affine else norm._replace(weight=None, bias=None)

    def size(self) -> tuple[int, int]:
        c = self.case
        top, bottom, left, right = c.padding
        return output_size(c.height, c.kernel, c.stride, top, bottom), output_size(c.width, c.kernel, c.stride, left, right)

    def instance(self) -> Instance:
        """Which kernel runs: direct_kernel of k, s and channels a thread, or tensor_kernel of k, s, columns and groups of 16
        channels, which has SiLU compiled in or not."""
        c, tile = self.case, launch.tile(self.dtype, self.case.channels, self.size()[1])
        dtype = str(self.dtype).replace("torch.float32", "fp32").replace("torch.bfloat16", "bf16").replace("torch.float16", "fp16")
        if not tile.threads:
            return "tensor", (c.kernel, c.stride, tile.columns, tile.channels // 16), dtype, self.activation == "silu"
        return "direct", (c.kernel, c.stride, 1 if self.misalign or self.extra % 2 else tile.channels), dtype, False

    def expected(self, wide: bool) -> torch.Tensor:
        """What PyTorch's functions compute, in x's dtype or in fp64."""
        x, weight, norm = plain.wide(self.tensors()) if wide else self.tensors()
        return plain.conv(x, weight, norm, self.case.stride, self.case.padding, self.case.channels, self.activation)

    def call(self, seed: int = 0, x: torch.Tensor | None = None) -> tuple[str, tuple]:
        given, weight, norm = self.tensors()
        x = (given if x is None else x).permute(0, 2, 3, 1)
        x = torch.cat([x, x.new_full((*x.shape[:3], self.extra), float("nan"))], 3)
        c, (height, width) = self.case, self.size()
        pieces = 0
        if self.squeeze:
            pieces = launch.rows_and_pieces(self.dtype, c.images, c.channels, height, width, self.multiprocessors)[1]
        window = [c.stride, c.padding[0], c.padding[2], height, width]
        types = [DTYPES[self.dtype], DTYPES[self.weight_dtype], DTYPES[self.norm_dtype]]
        arrays = raw(x), raw(weight[:, 0]), [None if v is None else raw(v) for v in norm[:4]]
        options = (ACTIVATIONS[self.activation], pieces, types, self.multiprocessors, seed, self.misalign)
        return "depthwise", (*arrays, norm.eps, window, *options, [], 0)

    def result(self, out: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        return from_raw(out[0], self.dtype).permute(0, 3, 1, 2), torch.from_numpy(out[1])


def drawn(draw: random.Random, case: Case, dtype: torch.dtype, activation: str) -> Run:
    """The case with each of the other options by lot."""
    on_tensor_cores = dtype in HALF and case.channels % 8 == 0
    return Run(
        case,
        dtype,
        activation,
        weight_dtype=draw.choice((torch.float32, dtype)),
        norm_dtype=draw.choice((torch.float32, dtype)),
        affine=draw.random() < 0.8,
        squeeze=draw.random() < 0.9,
        multiprocessors=draw.choice((1, 4, 16)),
        extra=draw.choice((0, 8 if on_tensor_cores else 3)),
        misalign=0 if on_tensor_cores else draw.choice((0, 1)),
    )


WINDOWS = list(itertools.product((3, 5), (1, 2)))
REST = [activation for activation in plain.ACTIVATIONS if activation != "silu"]
# Of each strip's columns, output widths: a strip that is partly used, and one that is full or two of them.
WIDTHS = {8: (5, 8), 16: (9, 16), 32: (18, 35)}
# Of each tile, columns and groups of 16 channels, a C that takes it and does not fill it; the first two for 3x3 and stride 1 alone.
TILES = {(32, 2): 24, (32, 4): 56, (8, 3): 72, (16, 3): 72, (32, 3): 40}


def every_kernel() -> list[Run]:
    """Each instance of each kernel, those on the tensor cores at both widths in either type, with few rows."""
    draw, runs = random.Random(0), []
    for (kernel, stride), silu in itertools.product(WINDOWS, (True, False)):
        tiles = list(TILES.items())[0 if (kernel, stride) == (3, 1) else 2 :]
        some = [
            (32 // columns, WIDTHS[columns][silu == (dtype == torch.bfloat16)], channels, dtype)
            for ((columns, _), channels), dtype in itertools.product(tiles, HALF)
        ]
        direct = (14, torch.float32), (13, torch.float32), (11, torch.bfloat16), (13, torch.float16)
        some += [(2, draw.randint(3, 10), channels, dtype) for channels, dtype in direct]
        for images, width, channels, dtype in some:
            height, width = (stride * size - draw.randrange(stride) for size in (draw.randint(3, 7), width))
            case = Case(draw.randint(1, images), channels, height, width, kernel, stride, cases.symmetric(kernel))
            run = drawn(draw, case, dtype, "silu" if silu else draw.choice(REST))
            runs.append(replace(run, extra=2, misalign=0) if channels == 14 else run)  # where pairs of channels are aligned
    return runs


def nasty() -> list[Run]:
    """The nasty cases in bfloat16 and in one other type."""
    draw, runs = random.Random(1), []
    for i, case in enumerate(case for case in cases.nasty() if case.images):
        for dtype in (torch.bfloat16, (torch.float32, torch.float16)[i % 2]):
            runs.append(drawn(draw, case, dtype, draw.choice(list(plain.ACTIVATIONS))))
    return runs


def segments() -> list[Run]:
    """Images cut into 1 to H segments, and two to four images a tile that do not come out even."""
    rows = [Run(Case(1, 16, 15, 18, 5, 1, cases.symmetric(5)), torch.bfloat16, multiprocessors=m) for m in (4, 10, 132)]
    images = [
        Run(Case(n, 24, 5, width, 3, 1, cases.symmetric(3)), torch.float16) for n, width in itertools.product((3, 5), (4, 8, 13))
    ]
    # Each width of the channel tile: 32, 48, 64.
    tiles = [
        Run(Case(1, c, 4, 37, 3, 1, cases.symmetric(3)), torch.bfloat16, activation="relu6") for c in (32, 40, 64, 56, 72, 104)
    ]
    other = [Run(Case(2, 14, 9, 10, 3, 2, cases.symmetric(3)), torch.float32, weight_dtype=d) for d in HALF]
    return [*rows, *images, *tiles, *other]


@pytest.fixture(scope="module")
def modules(shared_directory) -> dict[str, Path]:
    """The kernels as they are, "sound", with each seeded bug, and with smaller grids."""
    with shared_directory("emulator") as directory:
        return emulator.build(directory, {**SEEDED, **SMALL_GRIDS})


def check(module: Path, runs: list[Run], seeds: range) -> None:
    results = iter(emulator.run(module, [run.call(seed) for run in runs for seed in seeds]))
    for run in runs:
        outs = [next(results) for _ in seeds]
        assert all(a.tobytes() == b.tobytes() for out in outs for a, b in zip(out, outs[0], strict=True)), (
            f"{run}: the order of threads changes the result"
        )
        y, partial = run.result(outs[0])
        assert_2x(y, run.expected(False), run.expected(True), str(run))
        if run.squeeze:
            assert partial.shape[1] >= 1
            total = y.double().sum((2, 3))  # the squeeze is of the stored y
            assert_2x(partial.sum(1), y.float().sum((2, 3)), total, f"{run}: the partial sums")


COVERING = [*every_kernel(), *nasty()]
SEEDS = range(2)  # orders of threads


def test_every_kernel_is_covered(modules):
    """By the module's own symbols."""
    symbols = subprocess.run(["nm", modules["sound"]], capture_output=True, text=True, check=True).stdout.split()
    kernels = [name for name in symbols if "9depthwise" in name and name.endswith("ParamsE") and "_kernelI" in name]
    compiled = set()
    for name in kernels:
        kind, numbers, dtype, silu = depthwise_instance(name)
        if "Expander" not in name:
            compiled.add((kind, tuple(numbers), dtype, silu))
    assert {run.instance() for run in COVERING} == compiled


@pytest.mark.parametrize("dtype", plain.DTYPES, ids=str)
def test_covering_cases(dtype, modules):
    """In several orders of threads for one type: they share their barriers."""
    runs = [run for run in COVERING if run.dtype == dtype]
    check(modules["sound"], runs, SEEDS if dtype == torch.bfloat16 else range(1))


def test_segments_and_tiles(modules):
    check(modules["sound"], segments(), SEEDS)


@pytest.mark.parametrize(
    ("dtype", "channels", "spoilt"), [(torch.bfloat16, 16, 8), (torch.float32, 16, 1), (torch.bfloat16, 13, 1)]
)
def test_non_finite_input(dtype, channels, spoilt, modules):
    """A value that is not finite makes NaN of the outputs that see it: in its own channel, and on the tensor cores (0 * inf) in the
    8 channels of its group."""
    run = Run(Case(2, channels, 9, 20, 3, 1, cases.symmetric(3)), dtype, activation="identity")
    x = run.tensors()[0]
    (clean,) = emulator.run(modules["sound"], [run.call()])
    x[1, 9, 4, 18] = float("inf")
    (out,) = emulator.run(modules["sound"], [run.call(x=x)])
    y, before = run.result(out)[0], run.result(clean)[0]
    spoils = torch.zeros_like(y, dtype=torch.bool)
    spoils[1, 9 // spoilt * spoilt : 9 // spoilt * spoilt + spoilt, 3:6, 17:20] = True
    assert torch.equal(~y.isfinite(), spoils)
    assert torch.equal(y[~spoils], before[~spoils])


def test_pieces_that_fit_no_segments_are_refused(modules):
    run = Run(Case(1, 16, 7, 20, 3, 1, cases.symmetric(3)), torch.bfloat16)  # 2 pieces across; 7 rows cannot be 5 equal segments
    name, arguments = run.call()
    for pieces in (3, 10, 16):
        with pytest.raises(RuntimeError, match=f"pieces is {pieces}; for an output of 7 x 20 a multiple of 2"):
            emulator.run(modules["sound"], [(name, (*arguments[:6], pieces, *arguments[7:]))])


def bug(text: str, replacement: str, says: str) -> emulator.Bug:
    return emulator.Bug("depthwise/forward_tensor.cuh", text, replacement, says, "depthwise_bf16", "-DONE_WINDOW")


BARRIER = "    __syncthreads();  // this stage has landed"
SEEDED = {
    "depthwise-missing-barrier": bug(BARRIER, "    // this stage has landed", "changes the result|off by|not finite"),
    "depthwise-missing-last-barrier": bug(
        "  __syncthreads();  // the last", "  // the last", "changes the result|off by|not finite"
    ),
    "depthwise-missing-wait": bug("copy_async_wait<Tr::kStages - 2>()", "copy_async_wait<Tr::kStages>()", "off by|not finite"),
    "depthwise-divergent-shuffle": bug(
        "float v = exists(half, g, c)",
        "if (!exists(half, g, c)) continue;\n        float v = exists(half, g, c)",
        "emulator: .*shuffle",
    ),
    "depthwise-off-by-one-store": bug("my_column < p.out_width", "my_column <= p.out_width", "heap-buffer-overflow|off by"),
}
SEEDED_RUNS = [
    Run(Case(1, 24, 19, 18, 5, 1, cases.symmetric(5)), torch.bfloat16),
    Run(Case(2, 16, 7, 7, 5, 1, cases.symmetric(5)), torch.bfloat16, multiprocessors=2),
]


def test_seeded_runs_are_sound(modules):
    """What catches the bugs passes without them."""
    check(modules["sound"], SEEDED_RUNS, range(3))


# One grid of either kernel takes two images; a real one's limits are out of an emulator's reach.
SMALL_GRIDS = {
    "depthwise-tensor-small-grid": emulator.Bug(
        "depthwise/forward.cuh", "kGridSide = 65535", "kGridSide = 2", "", "depthwise_bf16", "-DONE_WINDOW"
    ),
    "depthwise-direct-small-grid": emulator.Bug(
        "depthwise/forward.cuh", "(int64_t(1) << 31) / threads_an_image;", "2;", "", "depthwise_fp32", "-DONE_WINDOW"
    ),
}


@pytest.mark.parametrize("name", SMALL_GRIDS)
def test_more_images_than_a_grid_takes(name, modules):
    dtype = torch.bfloat16 if "tensor" in name else torch.float32
    runs = [Run(Case(images, 24, 6, 18, 5, 1, cases.symmetric(5)), dtype, multiprocessors=m) for images in (4, 5) for m in (1, 8)]
    check(modules[name], runs, range(1))


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check(modules[name], SEEDED_RUNS, range(3))


def test_misaligned_floats_take_single_channels(modules):
    """Pairs of channels need 8-byte addresses and even strides; without them the kernel goes channel by channel."""
    run = Run(Case(1, 12, 6, 9, 3, 1, cases.symmetric(3)), torch.float32)
    check(modules["sound"], [run, replace(run, misalign=1), replace(run, extra=1), replace(run, extra=2)], SEEDS)
