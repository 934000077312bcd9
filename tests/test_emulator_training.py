"""Training's depthwise kernels for CUDA, their own source run on the CPU under AddressSanitizer and UBSan: every instance and the
nasty cases against autograd in fp64 by the 2x rule, several thread orders and cuts into blocks, seeded bugs."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from pathlib import Path

import cases
import plain
import pytest
import torch
from cases import Case
from emulator import build as emulator
from emulator.arrays import ACTIVATIONS, DTYPES, from_raw, raw
from test_training_ops import made, norm_of, plain_backward, plain_conv, wide
from tolerance import assert_2x

from effnet_fast.ops.common import output_size

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@dataclass(frozen=True)
class Run:
    """One launch each of both kernels. ``normed``: x has a norm and activation, else it has a residual; ``gated``: y has a gate and
    a gradient of its pool; ``need``: of x and of the weight; ``misalign``: elements by which every tensor is moved."""

    case: Case
    dtype: torch.dtype
    activation: str = "silu"
    normed: bool = True
    gated: bool = True
    weight_dtype: torch.dtype = torch.float32
    need: tuple[bool, bool] = (True, True)
    multiprocessors: int = 1
    misalign: int = 0

    def conv(self, wide_: bool = False) -> tuple:
        """x, weight, norm, activation, gate, stride, padding: what conv_stats takes."""
        c = self.case
        torch.manual_seed(c.channels + c.height)
        x = made(c.images, c.channels, c.height, c.width).to(self.dtype)
        weight = made(c.channels, 1, c.kernel, c.kernel).to(self.weight_dtype)
        norm, activation = (norm_of(c.channels), self.activation) if self.normed else (None, "identity")
        arguments = (x, weight, norm, activation, None, c.stride, c.padding)
        return tuple(wide(*arguments)) if wide_ else arguments

    def of_y(self, y: torch.Tensor) -> list:
        """grad, y, y_norm, coefficients, y_activation, y_gate, y_pool."""
        torch.manual_seed(1)
        images, channels = y.shape[:2]
        grad, norm, coefficients = made(*y.shape).to(self.dtype), norm_of(channels), made(3, channels)
        gate, pool = (torch.rand(images, channels) + 0.5, made(images, channels)) if self.gated else (None, None)
        return [grad, y, norm, coefficients, self.activation, gate, pool]

    def residual(self) -> torch.Tensor | None:
        c = self.case
        torch.manual_seed(2)
        return None if self.normed else made(c.images, c.channels, c.height, c.width).to(self.dtype)

    def arguments(self) -> tuple:
        x, weight, norm, activation, _, stride, (top, bottom, left, right) = self.conv()
        c = self.case
        size = output_size(c.height, c.kernel, stride, top, bottom), output_size(c.width, c.kernel, stride, left, right)
        types = [DTYPES[self.dtype], DTYPES[self.weight_dtype]]
        arrays = by_pixel(x), raw(weight[:, 0]), None if norm is None else raw(norm)
        return (*arrays, [stride, top, left, *size], ACTIVATIONS[activation], types)

    def stats(self, seed: int) -> tuple[str, tuple]:
        return "depthwise_stats", (*self.arguments(), self.multiprocessors, seed, self.misalign)

    def backward(self, y: torch.Tensor, seed: int) -> tuple[str, tuple]:
        grad, y, norm, coefficients, activation, gate, pool = self.of_y(y)
        vectors = [None if v is None else raw(v) for v in (norm, coefficients, gate, pool)]
        residual = self.residual()
        rest = (ACTIVATIONS[activation], None if residual is None else by_pixel(residual), list(self.need))
        of_y = [by_pixel(grad), by_pixel(y), *vectors]
        return "depthwise_backward", (*self.arguments(), of_y, *rest, self.multiprocessors, seed, self.misalign)


def by_pixel(x: torch.Tensor):
    return raw(x.permute(0, 2, 3, 1).contiguous())


def by_channel(array, dtype: torch.dtype) -> torch.Tensor:
    return from_raw(array, dtype).permute(0, 3, 1, 2)


def drawn(draw: random.Random, case: Case, dtype: torch.dtype) -> Run:
    return Run(
        case,
        dtype,
        draw.choice(list(plain.ACTIVATIONS)),
        normed=draw.random() < 0.7,
        gated=draw.random() < 0.7,
        weight_dtype=draw.choice((torch.float32, dtype)),
        need=draw.choice(((True, True), (True, True), (True, False), (False, True))),
        multiprocessors=draw.choice((1, 4, 16)),
        misalign=draw.choice((0, 1)),
    )


def every_kernel() -> list[Run]:
    """Each window in each type, images and channels that fill no tile, odd and even padding, as many rows as make segments."""
    draw, runs = random.Random(0), []
    for (kernel, stride), dtype in itertools.product(itertools.product((3, 5), (1, 2)), plain.DTYPES):
        for padding, channels in ((cases.symmetric(kernel), 37), ((0, 2, 1, 1), 40), ((3, 1, 2, 0), 7), ((2, 1, 1, 3), 72)):
            case = Case(draw.randint(1, 3), channels, draw.randint(9, 21), draw.randint(7, 19), kernel, stride, padding)
            runs.append(drawn(draw, case, dtype))
    return runs


def nasty() -> list[Run]:
    draw = random.Random(1)
    chosen = [case for case in cases.nasty() if case.images]
    return [drawn(draw, case, list(plain.DTYPES)[i % 3]) for i, case in enumerate(chosen)]


@pytest.fixture(scope="module")
def modules(shared_directory) -> dict[str, Path]:
    with shared_directory("emulator") as directory:
        return emulator.build(directory, SEEDED)


def check(module: Path, runs: list[Run], seeds: range) -> None:
    """Both kernels of each run, the backward with the y that the forward has stored."""
    forward = iter(emulator.run(module, [run.stats(seed) for run in runs for seed in seeds]))
    stored = []
    for run in runs:
        outs = [next(forward) for _ in seeds]
        assert all(same(out, outs[0]) for out in outs), f"{run}: the order of threads changes the result"
        y, mean, var = by_channel(outs[0][0], run.dtype), *map(torch.from_numpy, outs[0][1:])
        assert_2x(y, plain_conv(*run.conv()), plain_conv(*run.conv(True)), f"{run}: y")
        exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        plain_var, plain_mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
        assert_2x(mean, plain_mean, exact_mean, f"{run}: mean")
        assert_2x(var, plain_var, exact_var, f"{run}: var")
        stored.append(y)
    backward = iter(emulator.run(module, [run.backward(y, s) for run, y in zip(runs, stored, strict=True) for s in seeds]))
    for run, y in zip(runs, stored, strict=True):
        outs = [next(backward) for _ in seeds]
        assert all(same(out, outs[0]) for out in outs), f"{run}: the order of threads changes the result"
        found = [by_channel(outs[0][0], run.dtype), torch.from_numpy(outs[0][1])[:, None], torch.from_numpy(outs[0][2])]
        of_y = run.of_y(y)
        rest = (*run.conv()[:5], run.residual(), *run.conv()[5:])
        expected, exact = plain_backward(*of_y, *rest), plain_backward(*wide(*of_y, *rest))
        wanted = (run.need[0], run.need[1], run.need[0] and run.normed)
        for name, want, out, of_plain, of_wide in zip(
            ("grad_x", "grad_weight", "sums"), wanted, found, expected, exact, strict=True
        ):
            if want:
                assert_2x(out, of_plain.to(out.dtype), of_wide.double(), f"{run}: {name}")
            else:
                assert out.isnan().all(), f"{run}: {name} is not wanted and was written"


def same(a, b) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", plain.DTYPES, ids=str)
def test_every_kernel(dtype, modules):
    check(modules["sound"], [run for run in every_kernel() if run.dtype == dtype], range(2 if dtype == torch.bfloat16 else 1))


def test_nasty_cases(modules):
    check(modules["sound"], nasty(), range(1))


def test_any_cut_into_blocks_gives_the_same_y_and_gradient(modules):
    """Segments and pieces change the order of sums alone."""
    run = Run(Case(3, 40, 40, 9, 5, 1, cases.symmetric(5)), torch.float32)
    runs = [replace(run, multiprocessors=m) for m in (1, 3, 32)]
    check(modules["sound"], runs, range(1))
    ys = emulator.run(modules["sound"], [run.stats(0) for run in runs])
    grads = emulator.run(modules["sound"], [run.backward(by_channel(ys[0][0], run.dtype), 0) for run in runs])
    assert all(out[0].tobytes() == of[0][0].tobytes() for of in (ys, grads) for out in of)
    assert len({out[1].tobytes() for out in grads}) > 1  # else there was but one cut


def test_statistics_of_values_far_from_zero(modules):
    """A mean a thousand deviations away: sums of squares would have lost the variance."""
    run = Run(Case(2, 8, 12, 12, 3, 1, (0, 0, 0, 0)), torch.float32, normed=False)
    arguments = list(run.stats(0)[1])
    arguments[0] = arguments[0] * 1e-3 + 1.0
    arguments[1] = arguments[1] * 0 + 1.0
    (out,) = emulator.run(modules["sound"], [("depthwise_stats", tuple(arguments))])
    var, mean = torch.var_mean(torch.from_numpy(out[0]).double(), (0, 1, 2), correction=0)
    torch.testing.assert_close(torch.from_numpy(out[1]).double(), mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(torch.from_numpy(out[2]).double(), var, rtol=2e-6, atol=0)


def bug(path: str, text: str, replacement: str, says: str) -> emulator.Bug:
    return emulator.Bug(f"training/{path}", text, replacement, says, "training_fp32", "-DONE_WINDOW")


WRONG = "off by|not finite|changes the result"
SEEDED = {
    "training-missing-barrier": bug("depthwise_backward.cuh", "  __syncthreads();  // the taps", "  // the taps", WRONG),
    "training-missing-stats-barrier": bug("depthwise_stats.cuh", "  __syncthreads();\n", "", WRONG),
    "training-off-by-one-store": bug(
        "depthwise_stats.cuh", "if (t < columns_out) stored", "if (t <= columns_out) stored", "overflow|" + WRONG
    ),
    "training-column-beyond": bug("depthwise_backward.cuh", "if (in != kAll)", "if (false)", WRONG),
    "training-wrong-ring-slot": bug("depthwise_backward.cuh", "slot_of(i, u, S, L)", "slot_of(i, u, S, L + 1) % L", WRONG),
    "training-lost-piece": bug("ends.cuh", "half > 0; half /= 2", "half > 1; half /= 2", WRONG),
    "training-missing-wait": bug(
        "depthwise_stats.cuh", "copy_async_wait<Tr::kSteps - 2>", "copy_async_wait<Tr::kSteps - 1>", WRONG
    ),
    "training-missing-syncwarp": bug("depthwise_backward.cuh", "__syncwarp();  // this step", "// this step", WRONG),
}
SEEDED_RUNS = [
    Run(Case(2, 37, 26, 10, 3, 1, cases.symmetric(3)), torch.float32, multiprocessors=16),
    Run(Case(1, 24, 9, 11, 3, 1, (2, 1, 0, 2)), torch.float32),
]


def test_seeded_runs_are_sound(modules):
    check(modules["sound"], SEEDED_RUNS, range(3))


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check(modules[name], SEEDED_RUNS, range(3))
