"""The pointwise kernel of CUDA in the emulator, under sanitizers, against fp64 by the 2x rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from emulator import build as emulator
from emulator.arrays import ACTIVATIONS, from_raw, raw
from test_emulator import Pointwise
from tolerance import assert_2x

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
A100 = 164 << 10  # bytes of shared memory of a multiprocessor


def of_halves(images, pixels, channels, out, gate=False, residual=False, activation="silu", dtype=BF16, weight_dtype=BF16, **gpu):
    gpu = {"multiprocessors": 2, **gpu}
    return Pointwise(images, pixels, channels, out, gate, residual, activation, dtype, weight_dtype, **gpu)


# Every width of a block with and without SiLU and gate; weights that stay and that stream, one step and more, few stages and many;
# tiles of one image and of many, a last one that is short; columns that do not fill a block; blocks with several tiles.
POINTWISES = [
    of_halves(1, 7, 8, 8),
    of_halves(2, 130, 16, 96),
    of_halves(3, 49, 24, 144, weight_dtype=FP32, multiprocessors=1),
    of_halves(1, 129, 40, 56, activation="silu", weight_dtype=FP16, multiprocessors=1),
    of_halves(1, 260, 40, 240, residual=True, activation="relu", multiprocessors=1),
    of_halves(1, 640, 8, 32, activation="identity", multiprocessors=1),
    of_halves(1, 500, 136, 48, activation="relu6", multiprocessors=1),
    of_halves(2, 129, 40, 40, activation="silu"),
    of_halves(3, 49, 144, 24, True, True, "identity", multiprocessors=1, shared_bytes=A100),
    of_halves(5, 49, 200, 40, True, True, "identity", shared_bytes=A100),
    of_halves(7, 43, 480, 112, True, False, "identity", multiprocessors=3),
    of_halves(8, 50, 64, 80, True, True, "silu", weight_dtype=FP32, multiprocessors=3),
    of_halves(2, 200, 336, 320, True, True, "identity", weight_dtype=FP32, multiprocessors=3),
    of_halves(1, 129, 320, 256, activation="silu", multiprocessors=3, shared_bytes=A100),
    of_halves(1, 129, 264, 128, activation="relu", multiprocessors=3),
    of_halves(6, 64, 24, 16, True, False, "identity"),
    of_halves(1, 300, 24, 144, activation="silu", shared_bytes=A100),
    of_halves(3, 70, 88, 48, True, True, "identity", FP16, FP16),
    of_halves(6, 45, 376, 40, True, False, "silu", FP16, FP32, shared_bytes=A100),
]
SEEDS = range(2)
# One block for all tiles, whose ring and rows go round again and again.
SEEDED_CASES = [
    of_halves(17, 49, 200, 40, True, True, "identity", multiprocessors=1, shared_bytes=100 << 10),
    of_halves(4, 170, 376, 48, True, weight_dtype=FP32, multiprocessors=1, shared_bytes=100 << 10),
]


def bug(text: str, replacement: str, says: str) -> emulator.Bug:
    return emulator.Bug("pointwise/forward.cuh", text, replacement, says, "pointwise_bf16", "-DONE_KERNEL")


# A barrier left out goes unseen here: the warps of a block keep step by their matrices.
SEEDED = {
    "missing-wait": bug("      wait_for_oldest(p.stages);\n", "", "changes|off by|not finite"),
    "rows-past-the-end": bug("min(left, 16)", "16 * takes", "heap-buffer-overflow|off by"),
    "gate-of-another-image": bug("image_of(0) == image_of(16 * Tr::kFragments - 1)", "true", "off by"),
    "channels-past-the-end": bug("bytes = c < p.in_channels ? 16 : 0", "bytes = 16", "heap-buffer|off by"),
    "pointwise-shared-memory-too-short": bug(
        "fixed + p.stages * stage", "fixed + p.stages * stage - 16", "outside shared|heap-buffer"
    ),
}


@pytest.fixture(scope="module")
def modules(shared_directory) -> dict[str, Path]:
    with shared_directory("emulator") as directory:
        return emulator.build(directory, SEEDED)


def check(module: Path, pointwises: list[Pointwise]) -> None:
    results = iter(emulator.run(module, [pointwise.call(seed) for pointwise in pointwises for seed in SEEDS]))
    for pointwise in pointwises:
        outs = [next(results) for _ in SEEDS]
        assert all(np.array_equal(out, outs[0]) for out in outs), f"{pointwise}: the order of threads changes the result"
        plain = pointwise.expected(pointwise.dtype)  # which rounds the weights and the gated inputs too
        assert_2x(from_raw(outs[0], pointwise.dtype), plain, pointwise.expected(torch.float64), str(pointwise))


def test_pointwise(modules):
    check(modules["sound"], POINTWISES)


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check(modules[name], SEEDED_CASES)


def test_silu_of_small_values_too(modules):
    """Each off by no more than csrc/common/epilogue.cuh says of its tanh, 2^-12 of the value, and by the rounding to bfloat16: the
    rule for tensors looks at the largest alone."""
    v = torch.linspace(-30, 30, 4096).to(BF16)
    norm = torch.stack([torch.ones(8), torch.zeros(8), torch.zeros(8), torch.full((8,), 1 - 1e-3)])  # the eps is 1e-3
    arrays = raw(v.view(-1, 8)), raw(torch.eye(8).to(BF16)), raw(norm), None, None
    (out,) = emulator.run(modules["sound"], [("pointwise", (*arrays, 512, ACTIVATIONS["silu"], 1, 1, 2, A100, 0, 0))])
    y, exact = from_raw(out, BF16).double().flatten(), v.double() / (1 + torch.exp(-v.double()))
    rounded = 2**-8 * torch.maximum(y.abs(), exact.abs())
    assert ((y - exact).abs() <= 1.001 * (2**-12 * v.double().abs() + rounded) + 1e-9).all()
