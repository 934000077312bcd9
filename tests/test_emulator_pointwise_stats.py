"""Training's pointwise kernel for CUDA, its own source run on the CPU under AddressSanitizer and UBSan: every instance against fp64
by the 2x rule, several thread orders and cuts into blocks, seeded bugs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulator import build as emulator
from emulator.arrays import ACTIVATIONS, DTYPES, from_raw, raw
from test_training_ops import made, norm_of, plain_conv, wide
from tolerance import assert_2x

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
A100, H100 = 164 << 10, 228 << 10  # bytes of shared memory of a multiprocessor
SEEDS = range(2)


@dataclass(frozen=True)
class Run:
    """A launch for N images of P pixels, C and K channels; ``activation`` of x, or None where x is read as it is."""

    images: int
    pixels: int
    channels: int
    out: int
    activation: str | None = None
    gated: bool = False
    dtype: torch.dtype = BF16
    weight_dtype: torch.dtype = BF16
    multiprocessors: int = 2
    shared_bytes: int = H100
    shift: float = 0.0

    def conv(self) -> tuple:
        """x, weight, norm, activation, gate, stride, padding: what conv_stats takes."""
        torch.manual_seed(self.channels + self.out)
        x = made(self.images, self.channels, self.pixels, 1, shift=self.shift).to(self.dtype)
        weight = (made(self.out, self.channels, 1, 1) / self.channels**0.5).to(self.weight_dtype)
        norm = None if self.activation is None else norm_of(self.channels)
        gate = torch.rand(self.images, self.channels) + 0.5 if self.gated else None
        return x, weight, norm, self.activation or "identity", gate, 1, (0, 0, 0, 0)

    def call(self, seed: int) -> tuple[str, tuple]:
        x, weight, norm, activation, gate, *_ = self.conv()
        arrays = raw(x[..., 0].transpose(1, 2).contiguous()), raw(weight[:, :, 0, 0])
        vectors = (None if v is None else raw(v) for v in (norm, gate))
        types = [DTYPES[self.dtype], DTYPES[self.weight_dtype]]
        gpu = self.multiprocessors, self.shared_bytes, seed
        return "pointwise_stats", (*arrays, *vectors, ACTIVATIONS[activation], types, *gpu)


# Every width of a block with and without norm and gate; weights that stay and that stream, one step and more; tiles of one image
# and of many, a last one that is short; columns that do not fill a block; blocks with several tiles, blocks with one row.
RUNS = [
    Run(1, 7, 8, 8),
    Run(1, 1, 8, 16, "silu"),
    Run(2, 130, 16, 96),
    Run(3, 49, 24, 144, weight_dtype=FP32, multiprocessors=1),
    Run(1, 65, 200, 104, multiprocessors=1, shared_bytes=A100),
    Run(1, 129, 40, 56, dtype=FP16, weight_dtype=FP32),
    Run(3, 49, 144, 24, "silu", True, multiprocessors=1),
    Run(2, 130, 96, 32, "silu", True, weight_dtype=FP32, multiprocessors=1),
    Run(9, 21, 136, 40, "silu", True, shared_bytes=A100),
    Run(7, 45, 376, 112, "silu", True, weight_dtype=FP32, multiprocessors=3),
    Run(2, 64, 64, 80, "relu6", True, FP16, FP16),
    Run(6, 50, 72, 16, "silu", True, FP16, FP32, multiprocessors=1),
    Run(4, 44, 40, 48, "relu", True, FP16, FP16, shared_bytes=A100),
    Run(9, 4, 144, 24, "silu"),
    Run(2, 260, 32, 16, "relu6", weight_dtype=FP32, multiprocessors=1),
    Run(1, 300, 96, 40, "silu", dtype=FP16, weight_dtype=FP16),
    Run(3, 25, 80, 48, "relu"),
    Run(2, 70, 336, 320, "identity", multiprocessors=1),
    Run(1, 81, 56, 64, "silu", dtype=FP16),
    Run(4, 150, 16, 96, shift=4.0, multiprocessors=1),
    Run(1, 25, 5632, 96, "silu", True, shared_bytes=100 << 10),  # the most channels that the smallest GPU has shared memory for
]


@pytest.fixture(scope="module")
def modules(shared_directory) -> dict[str, Path]:
    with shared_directory("emulator") as directory:
        return emulator.build(directory, SEEDED)


def check(module: Path, runs: list[Run]) -> None:
    results = iter(emulator.run(module, [run.call(seed) for run in runs for seed in SEEDS]))
    for run in runs:
        outs = [next(results) for _ in SEEDS]
        same = all(a.tobytes() == b.tobytes() for out in outs for a, b in zip(out, outs[0], strict=True))
        assert same, f"{run}: the order of threads changes the result"
        y, mean, var = from_raw(outs[0][0], run.dtype).transpose(1, 2)[..., None], *map(torch.from_numpy, outs[0][1:])
        assert_2x(y, plain_conv(*run.conv()), plain_conv(*wide(*run.conv())), f"{run}: y")
        exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        plain_var, plain_mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
        assert_2x(mean, plain_mean, exact_mean, f"{run}: mean")
        assert_2x(var, plain_var, exact_var, f"{run}: var")


def test_every_kernel(modules):
    check(modules["sound"], RUNS)


def test_any_cut_into_blocks_gives_the_same_y(modules):
    """Pieces change the order of sums alone."""
    runs = [Run(8, 60, 144, 24, "silu", True, multiprocessors=m) for m in (1, 3, 32)]
    check(modules["sound"], runs)
    outs = emulator.run(modules["sound"], [run.call(0) for run in runs])
    assert all(out[0].tobytes() == outs[0][0].tobytes() for out in outs)
    assert len({out[2].tobytes() for out in outs}) > 1  # else there was but one cut


def test_statistics_of_values_far_from_zero(modules):
    """A mean a hundred deviations away: sums of squares would have lost the variance."""
    run = Run(3, 500, 8, 16, dtype=FP16, weight_dtype=FP16, multiprocessors=1)
    x = 100 + torch.randn(3, 500, 8)
    arguments = raw(x.half()), raw(torch.eye(16, 8).half()), *run.call(0)[1][2:]
    (out,) = emulator.run(modules["sound"], [("pointwise_stats", arguments)])
    var, mean = torch.var_mean(from_raw(out[0], FP16).double()[..., :8], (0, 1), correction=0)
    torch.testing.assert_close(torch.from_numpy(out[1])[:8].double(), mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(torch.from_numpy(out[2])[:8].double(), var, rtol=2e-6, atol=0)


def test_what_it_does_not_take_is_told(modules):
    for run, says in (
        (Run(2, 20, 8, 8, "silu", True), "pointwise_conv_stats: an image has 20 pixels; with a gate 21 or more would do"),
        (Run(1, 3, 6400, 96, "silu", shared_bytes=100 << 10), "6400 input channels take more shared memory than a block may have"),
        (Run(2, 42, 9, 8), "pointwise_conv_stats: the CUDA kernel takes C and K that are multiples of 8, got 9 and 8"),
    ):
        with pytest.raises(RuntimeError, match=says):
            emulator.run(modules["sound"], [run.call(0)])


def bug(text: str, replacement: str, says: str, path: str = "training/pointwise_stats.cuh") -> emulator.Bug:
    return emulator.Bug(path, text, replacement, says, "training_pointwise_bf16", "-DONE_KERNEL")


WRONG = "off by|not finite|changes the result"
SEEDED = {
    "stats-gate-of-another-image": bug("(images >> 2 * row & 3)", "(images & 3)", WRONG),
    "stats-norm-of-another-step": bug("norms + (step * kDepth + k", "norms + (k", WRONG, "pointwise/forward.cuh"),
    "stats-lost-group": bug("group < kGroups; ++group", "group < kGroups - 1; ++group", WRONG),
    "stats-of-rows-past-the-end": bug("min(left, 16)", "16 * takes", "heap-buffer-overflow|" + WRONG, "pointwise/forward.cuh"),
    "stats-missing-barrier": bug(
        "    __syncthreads();\n    if (int(threadIdx.x) >= columns)", "    if (int(threadIdx.x) >= columns)", WRONG
    ),
    "stats-late-barrier": bug("    __syncthreads();  // nothing lands", "    // nothing lands", WRONG, "pointwise/forward.cuh"),
    "stats-shared-memory-too-short": bug("return norms(p) * int(sizeof(Affine))", "return 0", "outside shared|heap-buffer"),
    "stats-lost-shift": bug("const double shift = value_of<T>(shift_, e), count", "const double shift = 0, count", WRONG),
}
SEEDED_RUNS = [
    Run(5, 49, 200, 24, "silu", True, multiprocessors=1),
    Run(3, 45, 72, 32, "silu", True, weight_dtype=FP32, multiprocessors=2),
]


def test_seeded_runs_are_sound(modules):
    check(modules["sound"], SEEDED_RUNS)


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check(modules[name], SEEDED_RUNS)
