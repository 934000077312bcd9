"""The CUDA kernels of expand_depthwise_conv_bn_act in the emulator, under sanitizers: every kernel that is compiled against fp64 by
the 2x rule, the partial sums against the stored output, several thread orders, seeded bugs."""

from __future__ import annotations

import itertools
import random
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import cases
import plain
import pytest
import torch
from cases import Case
from emulator import build as emulator
from emulator.arrays import raw
from sass import depthwise_instance
from test_emulator_depthwise import Run
from tolerance import assert_2x

from effnet_fast.ops import Norm
from effnet_fast.ops.expand_depthwise import launch

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

H100 = 227 << 10  # bytes of shared memory of a block
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Expanding:
    """The depthwise convolution that ``run`` is, behind a pointwise one of so many input channels."""

    run: Run
    inputs: int

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, Norm]:
        """x [N, inputs, H, W], weight [C, inputs, 1, 1], and the norm of that convolution: of the types that the other's norm and
        weight have, and of another eps, so that nothing can be taken from the wrong one."""
        run, c = self.run, self.run.case
        g = torch.Generator().manual_seed(self.inputs)
        x = torch.randn(c.images, self.inputs, c.height, c.width, generator=g).to(run.dtype)
        weight = (torch.randn(c.channels, self.inputs, 1, 1, generator=g) / self.inputs**0.5).to(run.norm_dtype)
        norm = plain.norm(c.channels, run.weight_dtype, g)
        norm = norm._replace(eps=2 * norm.eps)
        return x, weight, norm if run.affine else norm._replace(weight=None, bias=None)

    def expected(self, wide: bool) -> torch.Tensor:
        """What PyTorch's functions compute, in x's dtype or in fp64."""
        run, c = self.run, self.run.case
        (x, expand, norm), (_, weight, second) = self.tensors(), run.tensors()
        if wide:
            x, expand, norm, weight, second = (plain.wide(value) for value in (x, expand, norm, weight, second))
        h = plain.conv(x, expand, norm, activation=run.activation)
        return plain.conv(h, weight, second, c.stride, c.padding, c.channels, run.activation)

    def call(self, seed: int = 0, shared_bytes: int = H100) -> tuple[str, tuple]:
        x, expand, norm = self.tensors()
        name, arguments = self.run.call(seed)
        expansion = [raw(expand[:, :, 0, 0]), *(None if v is None else raw(v) for v in norm[:4])]
        return name, (raw(x.permute(0, 2, 3, 1)), *arguments[1:-2], expansion, shared_bytes)


def drawn(draw: random.Random, case: Case, inputs: int, dtype: torch.dtype, activation: str) -> Expanding:
    """The case with each of the other options by lot."""
    types = [draw.choice((FP32, dtype)) for _ in range(2)]
    run = Run(case, dtype, activation, *types, affine=draw.random() < 0.8, squeeze=draw.random() < 0.9)
    return Expanding(replace(run, multiprocessors=draw.choice((1, 4, 16))), inputs)


# Of each strip's columns, output widths: a strip that is partly used, and one that is full or two of them.
WIDTHS = {8: (5, 8), 16: (9, 16), 32: (18, 35)}
INPUTS = (8, 16, 24, 40, 80)


def every_kernel() -> list[Expanding]:
    """Each instance in bfloat16, with few rows, at both widths; channels that do not fill the last tile."""
    draw, made = random.Random(2), []
    for number, ((kernel, stride), columns, silu) in enumerate(
        itertools.product(itertools.product((3, 5), (1, 2)), WIDTHS, (True, False))
    ):
        width = WIDTHS[columns][number // 2 % 2]
        height, width = (stride * size - draw.randrange(stride) for size in (draw.randint(3, 7), width))
        channels, images = draw.choice((24, 56, 72)), draw.randint(1, 32 // columns + 1)
        case = Case(images, channels, height, width, kernel, stride, cases.symmetric(kernel))
        activation = "silu" if silu else ("relu", "relu6", "identity")[number // 2 % 3]
        made.append(drawn(draw, case, INPUTS[number % len(INPUTS)], BF16, activation))
    return made


def nasty() -> list[Expanding]:
    """The nasty cases: images smaller than the kernel, one-sided padding, odd sizes."""
    draw, made = random.Random(3), []
    for i, case in enumerate(case for case in cases.nasty() if case.images and case.channels % 8 == 0):
        made.append(drawn(draw, case, INPUTS[i % len(INPUTS)], BF16, "silu"))
    return made


COVERING = [*every_kernel(), *nasty()]
SEEDS = range(2)  # orders of threads


@pytest.fixture(scope="module")
def modules(shared_directory) -> dict[str, Path]:
    """The kernels as they are, "sound", and with each seeded bug."""
    with shared_directory("emulator") as directory:
        return emulator.build(directory, SEEDED)


def fits(run: Run, inputs: int) -> bool:
    return launch.shared_bytes(inputs, run.case.kernel, run.case.stride, run.size()[1]) <= H100


def check(module: Path, made: list[Expanding], seeds: range) -> None:
    results = iter(emulator.run(module, [one.call(seed) for one in made for seed in seeds]))
    for one in made:
        outs = [next(results) for _ in seeds]
        assert all(a.tobytes() == b.tobytes() for out in outs for a, b in zip(out, outs[0], strict=True)), (
            f"{one}: the order of threads changes the result"
        )
        y, partial = one.run.result(outs[0])
        assert_2x(y, one.expected(False), one.expected(True), str(one))
        if one.run.squeeze:
            assert partial.shape[1] >= 1
            total = y.double().sum((2, 3))  # the squeeze is of the stored y
            assert_2x(partial.sum(1), y.float().sum((2, 3)), total, f"{one}: the partial sums")


def test_every_kernel_is_covered(modules):
    """By the module's own symbols: of bfloat16 each."""
    symbols = subprocess.run(["nm", modules["sound"]], capture_output=True, text=True, check=True).stdout.split()
    names = [name for name in symbols if "_kernelI" in name and "Expander" in name and name.endswith("ParamsE")]
    compiled = {(kernel, stride, columns, silu) for _, (kernel, stride, columns, _), _, silu in map(depthwise_instance, names)}
    runs = [one.run for one in COVERING]
    assert {(*run.instance()[1][:3], run.instance()[3]) for run in runs} == compiled


def test_covering_cases(modules):
    check(modules["sound"], COVERING, SEEDS)


def test_float16(modules):
    case = Case(2, 56, 6, 35, 3, 1, cases.symmetric(3))
    check(modules["sound"], [Expanding(Run(case, FP16, weight_dtype=d), 40) for d in (FP16, FP32)], range(1))


@pytest.mark.parametrize("inputs", [8, 24, 32, 112, 192, 256])
def test_inputs(inputs, modules):
    """Few and many channels: with and without half a step at the end, with pixels an odd number of pieces apart and one more."""
    runs = [
        Run(Case(1, 48, 7, 7, 5, 1, cases.symmetric(5)), BF16, weight_dtype=BF16, multiprocessors=4),
        Run(Case(5, 24, 9, 8, 3, 1, cases.symmetric(3)), BF16, weight_dtype=BF16),
    ]
    check(modules["sound"], [Expanding(run, inputs) for run in runs], range(1))


@pytest.mark.parametrize("inputs", [384, 448, 480, 560])
def test_very_many_inputs(inputs, modules):
    """Whose pixels and rows are each a different number of pieces apart from what they are long."""
    runs = [
        Run(Case(1, 48, 5, width, 3, 1, cases.symmetric(3)), BF16, weight_dtype=d) for width in (7, 10, 20) for d in (BF16, FP32)
    ]
    check(modules["sound"], [Expanding(run, inputs) for run in runs if fits(run, inputs)], range(1))


@pytest.mark.parametrize("padding", [(1, 1, 1, 60), (1, 60, 1, 1), (1, 1, 60, 1), (40, 1, 1, 1)], ids=str)
def test_strips_that_are_padding_alone(padding, modules):
    runs = [Run(Case(1, 24, 4, 9, 3, stride, padding), BF16) for stride in (1, 2)]
    check(modules["sound"], [Expanding(run, 24) for run in runs], range(1))


@pytest.mark.parametrize("one", [one for one in COVERING if one.run.case.images == 1][::3], ids=str)
def test_more_than_shared_memory_holds_is_refused(one, modules):
    """To the byte that ops/expand_depthwise/launch.py says."""
    case, (_, width) = one.run.case, one.run.size()
    wanted = launch.shared_bytes(one.inputs, case.kernel, case.stride, width)
    emulator.run(modules["sound"], [one.call(shared_bytes=wanted)])
    says = f"{one.inputs} input channels take {wanted} bytes of shared memory; this GPU has {wanted - 1}"
    with pytest.raises(RuntimeError, match=says):
        emulator.run(modules["sound"], [one.call(shared_bytes=wanted - 1)])


def test_non_finite_input(modules):
    """It makes NaN of the outputs that see it, of all channels; what only borders on it in memory stays as it is."""
    one = Expanding(Run(Case(2, 16, 9, 20, 3, 1, cases.symmetric(3)), BF16, activation="identity"), 24)
    name, (x, *rest) = one.call()
    (clean,) = emulator.run(modules["sound"], [(name, (x, *rest))])
    spoilt = x.copy()
    spoilt[1, 4, 18, 9] = 0x7F80  # infinity
    (out,) = emulator.run(modules["sound"], [(name, (spoilt, *rest))])
    y, before = one.run.result(out)[0], one.run.result(clean)[0]
    sees = torch.zeros_like(y, dtype=torch.bool)
    sees[1, :, 3:6, 17:20] = True
    assert torch.equal(~y.isfinite(), sees)
    assert torch.equal(y[~sees], before[~sees])


def bug(text: str, replacement: str, says: str) -> emulator.Bug:
    return emulator.Bug("expand_depthwise/forward.cuh", text, replacement, says, "expand_depthwise_bf16", "-DONE_WINDOW")


CHANGES = "changes the result|off by|not finite"
SEEDED = {
    "expand-missing-barrier": bug("    __syncthreads();  // h is there", "    // h is there", CHANGES),
    "expand-missing-first-barrier": bug("    __syncthreads();  // x has landed", "    // x has landed", CHANGES),
    "expand-missing-wait": bug("copy_async_wait<0>()", "copy_async_wait<1>()", "off by|not finite"),
    "expand-activates-the-padding": bug("pixel < kStagePixels && within && is_real(row0 + row)", "true", "off by|not finite"),
    "expand-reads-past-the-row": bug(
        "min(Tr::kInColumns, p.width - first_column)", "Tr::kInColumns", "heap-buffer-overflow|AddressSanitizer"
    ),
}
SEEDED_CASES = [
    Expanding(Run(Case(1, 56, 9, 35, 3, 1, cases.symmetric(3)), BF16, weight_dtype=BF16), 24),
    Expanding(Run(Case(2, 48, 7, 18, 3, 1, cases.symmetric(3)), BF16, weight_dtype=BF16, multiprocessors=4), 40),
]


def test_seeded_cases_are_sound(modules):
    """What catches the bugs passes without them."""
    check(modules["sound"], SEEDED_CASES, range(3))


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check(modules[name], SEEDED_CASES, range(3))
