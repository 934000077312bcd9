"""The kernels' own source under AddressSanitizer and UBSan, against fp64 by the 2x rule: CUDA's run on the CPU by tests/emulator,
the CPU's for each instruction set."""

from __future__ import annotations

import itertools
import random
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
from tolerance import assert_2x

from effnet_fast.ops.common import output_size

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@dataclass(frozen=True)
class Gate:
    """A squeeze-excite gate: N, P, C and R, and on how large a GPU, of how many blocks a cluster. 0 multiprocessors: the CPU's
    kernel."""

    batch: int
    pieces: int
    channels: int
    reduced: int
    multiprocessors: int = 132
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    bias: bool = True
    misalign: int = 0
    cluster: int = 8

    def tensors(self) -> list[torch.Tensor | None]:
        g = torch.Generator().manual_seed(self.channels)
        n, p, c, r = self.batch, self.pieces, self.channels, self.reduced
        values = [torch.randn(s, generator=g) for s in [(n, p, c), (r, c, 1, 1), (r,), (c, r, 1, 1), (c,)]]
        weights = [v.mul(0.5).to(self.dtype) for v in values[1:]]
        return [values[0] * 49] + [w if self.bias or w.dim() > 1 else None for w in weights]

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        partial, *weights = self.tensors()
        return plain.gate(partial.to(dtype), 49, *weights, self.activation)

    def call(self, seed: int = 0) -> tuple[str, tuple]:
        partial, rw, rb, ew, eb = (None if t is None else raw(t) for t in self.tensors())
        options = (ACTIVATIONS[self.activation], DTYPES[self.dtype], self.multiprocessors, self.cluster, seed, self.misalign)
        return "squeeze_excite_gate", (partial, 49, rw, rb, ew, eb, *options)


# Slices and images of a block are what gate.cuh's clocks says for the GPU.
GATES = [
    Gate(1, 1, 32, 8),
    Gate(3, 2, 144, 6, activation="relu"),
    Gate(1, 2, 240, 20),
    Gate(2, 3, 37, 5, activation="relu6"),
    Gate(2, 4, 7, 1, activation="identity", bias=False),
    Gate(2, 2, 48, 12, dtype=torch.bfloat16),
    Gate(2, 2, 48, 12, dtype=torch.float16, bias=False),
    Gate(2, 2, 64, 16, dtype=torch.bfloat16, misalign=1),
    Gate(5, 3, 40, 9, multiprocessors=4, dtype=torch.bfloat16),  # groups of 4
    Gate(7, 2, 41, 12, multiprocessors=4, misalign=1),
    Gate(5, 3, 40, 8, multiprocessors=4),
    Gate(9, 1, 56, 7, multiprocessors=1, dtype=torch.float16, activation="relu"),
    Gate(2, 5, 641, 39, dtype=torch.bfloat16),  # 8 slices, the last of 81 channels and 4 units
    Gate(1, 1, 1032, 48, dtype=torch.float16),
    Gate(1, 2, 712, 100),  # 8 of 96 channels, the last of 40
    Gate(1, 1, 1600, 68),  # 8, too large to be staged
    Gate(5, 1, 640, 40, multiprocessors=20),  # 8, groups of 4
    Gate(9, 2, 520, 44, multiprocessors=2, dtype=torch.bfloat16, bias=False),
    Gate(3, 1, 640, 40, cluster=1),
    Gate(1, 1, 20, 1000),
    Gate(9, 1, 3200, 20, multiprocessors=1, cluster=1),
]
SEEDS = range(3)
# What catches the seeded bugs: threads that share pieces, misaligned weights, eight blocks, groups of images and rows that do not
# come out even.
SEEDED_GATES = [Gate(1, 301, 36, 4), Gate(2, 2, 64, 16, misalign=1), Gate(1, 1, 260, 64), Gate(11, 2, 104, 12, multiprocessors=2)]


def bug(text: str, replacement: str, says: str) -> emulator.Bug:
    return emulator.Bug("squeeze_excite/gate.cuh", text, replacement, says, "squeeze_excite")


SEEDED = {
    "missing-barrier": bug("  __syncthreads();  // the parts are there\n", "", "changes the result|off by|not finite"),
    "missing-barrier-of-the-cluster": bug(
        "    cluster_arrive();\n    cluster_wait();  // every",
        "    __syncthreads();  // every",
        "changes the result|off by|not finite|AddressSanitizer",
    ),
    "cluster-arrives-and-does-not-wait": bug(
        "    cluster_wait();  // every", "    __syncthreads();  // every", "changes the result|off by|not finite|AddressSanitizer"
    ),
    "written-before-they-have-started": bug(
        "  if (slices > 1) cluster_wait();  // all blocks", "  // all blocks", "before all blocks are known|has not waited"
    ),
    "weights-read-before-they-are-there": bug("  copy_async_wait<1>();\n", "", "changes the result|not finite|off by"),
    "off-by-one-store": bug("if (of < rows) put", "if (of <= rows) put", "heap-buffer-overflow|off by|changes"),
    "divergent-shuffle": bug("base < rows; base +=", "base + (lane >> shift) * M < rows; base +=", "emulator: .*shuffle"),
    "misaligned-vector": bug("&& aligned16(weight)", "", "misaligned address"),
    "shared-memory-too-short": bug(
        "int64_t(images) * plan.hidden_stride", "int64_t(images - 1) * plan.hidden_stride", "heap-buffer-overflow|outside"
    ),
}


@pytest.fixture(scope="module")
def modules(shared_directory) -> dict[str, Path]:
    """The kernels as they are, "sound", and with each seeded bug."""
    with shared_directory("emulator") as directory:
        return emulator.build(directory, SEEDED)


def check_squeeze_excite_gate(module: Path, gates: list[Gate]) -> None:
    results = iter(emulator.run(module, [gate.call(seed) for gate in gates for seed in SEEDS]))
    for gate in gates:
        outs = [next(results) for _ in SEEDS]
        assert all(np.array_equal(out, outs[0]) for out in outs), f"{gate}: the order of threads changes the result"
        assert_2x(torch.from_numpy(outs[0]), gate.expected(torch.float32), gate.expected(torch.float64), str(gate))


def test_squeeze_excite_gate(modules):
    check_squeeze_excite_gate(modules["sound"], [*GATES, *SEEDED_GATES])


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check_squeeze_excite_gate(modules[name], SEEDED_GATES)


CPU_GATES = [
    Gate(batch, pieces, channels, reduced, 0, dtype, activation, bias, misalign)
    for batch in (1, 2, 6, 17)
    for pieces, channels, reduced, dtype, activation, bias, misalign in [
        (1, 7, 1, torch.float32, "identity", False, 0),
        (3, 37, 5, torch.float32, "relu6", True, 1),
        (2, 75, 19, torch.bfloat16, "relu", True, 1),
        (1, 130, 35, torch.float16, "silu", False, 0),
    ]
] + [Gate(batch, 1, 2304, 96, 0) for batch in (1, 40)]


@pytest.fixture(params=[(4, None), (8, "avx2"), (16, "avx512dq")], ids=["baseline", "avx2", "avx512"])
def width(request) -> int:
    """Floats in a vector of each instruction set that this machine has."""
    width, flag = request.param
    cpu = Path("/proc/cpuinfo")
    if width > 4 and not (cpu.exists() and f" {flag} " in cpu.read_text()):
        pytest.skip(f"this machine has no {flag}")
    return width


def test_squeeze_excite_gate_cpu(width, modules):
    outs = emulator.run(modules["sound"], [gate.call() for gate in CPU_GATES], EMULATED_WIDTH=str(width))
    for gate, out in zip(CPU_GATES, outs, strict=True):
        assert_2x(torch.from_numpy(out), gate.expected(torch.float32), gate.expected(torch.float64), str(gate))


@dataclass(frozen=True)
class Pointwise:
    """A pointwise convolution: N, H * W, C and K; on a GPU of so many multiprocessors with so much shared memory each, or for 0 on
    the CPU."""

    images: int
    pixels: int
    channels: int
    out: int
    gate: bool = False
    residual: bool = False
    activation: str = "silu"
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    misalign: int = 0
    multiprocessors: int = 0
    shared_bytes: int = 228 << 10

    def tensors(self) -> list:
        """x [N * H * W, C], weight [K, C], the norm, and what there is of gate and residual."""
        g = torch.Generator().manual_seed(self.channels)
        rows, c, k = self.images * self.pixels, self.channels, self.out
        x, residual = torch.randn(rows, c, generator=g).to(self.dtype), torch.randn(rows, k, generator=g).to(self.dtype)
        weight = (torch.randn(k, c, generator=g) / c**0.5).to(self.weight_dtype)
        norm = plain.norm(k, generator=g)
        gate = torch.rand(self.images, c, generator=g)
        return [x, weight, norm, gate if self.gate else None, residual if self.residual else None]

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        x, weight, norm, gate, residual = plain.wide(self.tensors()) if dtype == torch.float64 else self.tensors()
        x, residual = (
            None if t is None else t.to(dtype).view(self.images, self.pixels, 1, -1).permute(0, 3, 1, 2) for t in (x, residual)
        )
        y = plain.conv(x, weight[:, :, None, None], norm, activation=self.activation, residual=residual, gate=gate)
        return y.permute(0, 2, 3, 1).flatten(0, 2)

    def call(self, seed: int = 0) -> tuple[str, tuple]:
        x, weight, norm, *others = self.tensors()
        tensors = raw(x), raw(weight), raw(torch.stack(norm[:4])), *(None if t is None else raw(t) for t in others)
        options = (ACTIVATIONS[self.activation], DTYPES[self.dtype], DTYPES[self.weight_dtype])
        gpu = self.multiprocessors, self.shared_bytes, seed
        return "pointwise", (*tensors, self.pixels, *options, *gpu, self.misalign)


# The last ones are shared between the three threads, by rows and by channels, and deep enough for several slices.
POINTWISES = [
    Pointwise(1, 1, 1, 1),
    Pointwise(2, 7, 3, 13, True, True, "relu6"),
    Pointwise(1, 25, 17, 33, True, misalign=1),
    Pointwise(3, 9, 33, 3, True, True, "relu", misalign=1),
    Pointwise(1, 47, 16, 96),
    Pointwise(2, 11, 100, 100, False, True, "identity", weight_dtype=torch.float16),
    Pointwise(2, 13, 35, 49, True, True, "silu", torch.bfloat16, torch.bfloat16, 1),
    Pointwise(1, 23, 64, 24, False, False, "identity", torch.bfloat16),
    Pointwise(5, 171, 65, 66, True, True, misalign=1),
    Pointwise(1, 9, 1549, 277, True, True, "identity", misalign=1),
    Pointwise(1, 6, 800, 640, False, True),
]


def test_pointwise_cpu(width, modules):
    outs = emulator.run(modules["sound"], [pointwise.call() for pointwise in POINTWISES], EMULATED_WIDTH=str(width))
    for pointwise, out in zip(POINTWISES, outs, strict=True):
        plain = pointwise.expected(torch.float32).to(pointwise.dtype)
        assert_2x(from_raw(out, pointwise.dtype), plain, pointwise.expected(torch.float64), str(pointwise))


def test_pointwise_cpu_by_bf16_dot_products(modules):
    cpu = Path("/proc/cpuinfo")
    if not (cpu.exists() and " avx512_bf16 " in cpu.read_text()):
        pytest.skip("this machine has no avx512_bf16")
    cases = [replace(case, dtype=torch.bfloat16) for case in POINTWISES]
    outs = emulator.run(modules["sound"], [case.call() for case in cases], EMULATED_WIDTH="16", EMULATED_BF16="1")
    for case, out in zip(cases, outs, strict=True):
        plain = case.expected(torch.bfloat16)  # which rounds the weights and the gated inputs too
        assert_2x(from_raw(out, case.dtype), plain, case.expected(torch.float64), str(case))


@dataclass(frozen=True)
class Convolution:
    """A depthwise convolution on the CPU, with so many pieces of sums, or a dense one of ``out`` channels, from either layout."""

    case: Case
    dtype: torch.dtype
    activation: str
    misalign: int
    by_channel: bool = False
    out: int | None = None
    pieces: int = 0
    uint8: bool = False  # x, of a dense one

    def tensors(self) -> list:
        """x [N, C, H, W], weight, and the norm."""
        c = self.case
        g, channels = torch.Generator().manual_seed(c.channels + c.height), self.out or c.channels
        shape = c.images, c.channels, c.height, c.width
        x = plain.uint8_images(*shape, g) if self.uint8 else torch.randn(shape, generator=g).to(self.dtype)
        weight = torch.randn(channels, c.channels if self.out else 1, c.kernel, c.kernel, generator=g)
        return [x, weight, plain.norm(channels, generator=g)]

    def call(self) -> tuple[str, tuple]:
        c, activation, dtype = self.case, ACTIVATIONS[self.activation], DTYPES[self.dtype]
        top, bottom, left, right = c.padding
        height = output_size(c.height, c.kernel, c.stride, top, bottom)
        window = [c.stride, top, left, height, output_size(c.width, c.kernel, c.stride, left, right)]
        x, weight, norm = self.tensors()
        x = raw(x.permute(0, 2, 3, 1))
        if self.out:
            tensors = x, self.by_channel, raw(weight), [raw(v) for v in norm[:4]]
            pixels = raw(plain.pixels(c.channels)) if self.uint8 else None
            return "conv", (*tensors, window, activation, pixels, None, [dtype, 0, 0], 0, 0, self.misalign)
        tensors = x, raw(weight[:, 0]), [raw(v) for v in norm[:4]]
        return "depthwise", (*tensors, norm.eps, window, activation, self.pieces, [dtype, 0, 0], 0, 0, self.misalign, [], 0)

    def check(self, result) -> None:
        y = from_raw(result if self.out else result[0], self.dtype).permute(0, 3, 1, 2)
        arguments = self.case.stride, self.case.padding, 1 if self.out else self.case.channels, self.activation
        x, *others = self.tensors()
        x, exact = (plain.normalised(x, self.dtype), plain.normalised(x)) if self.uint8 else (x, x.double())
        assert_2x(y, plain.conv(x, *others, *arguments), plain.conv(exact, *plain.wide(others), *arguments), str(self))
        if self.pieces:
            partial = torch.from_numpy(result[1])
            assert_2x(partial.sum(1), y.float().sum((2, 3)), y.double().sum((2, 3)), str(self))


def convolutions() -> list[Convolution]:
    """All combinations of type, activation, address and layout, dealt to the cases at random."""
    draw = random.Random(0)

    def dealt(*options: tuple) -> list[tuple]:
        combinations = list(itertools.product(*options))
        return draw.sample(combinations, len(combinations))

    of_family = cases.REDUCED[len(cases.nasty()) :: 4]
    depthwise = [case for case in (*cases.nasty(), *of_family) if case.images]  # the binding stops at none
    dense = [
        (Case(2, channels, 3 + i, 14 - i, kernel, stride, (kernel // 2, 0, 1, kernel // 2)), out)
        for kernel, stride in ((3, 2), (3, 1), (5, 2))
        for i, (channels, out) in enumerate([(3, 32), (1, 7), (4, 40), (2, 1), (3, 24), (3, 56)])
    ]
    options = plain.DTYPES, tuple(plain.ACTIVATIONS), (0, 1)
    hands = dealt(*options)
    assert len(depthwise) >= len(hands)
    made = [Convolution(c, *hand, pieces=draw.randint(0, 5)) for c, hand in zip(depthwise, itertools.cycle(hands), strict=False)]
    hands = dealt(*options, (False, True))
    made += [Convolution(c, *hand, out=out) for (c, out), hand in zip(itertools.cycle(dense), hands, strict=False)]
    return made + [replace(convolution, uint8=True) for convolution in made[-len(hands) :: 2]]


CONVOLUTIONS = convolutions()


# Stem, narrow, expanded, reduced, head, classes, and by how many elements images and results are misaligned.
NETS = [
    ((17, 13), 3, (7, 5, 9, 2, 11, 3, 1), "silu", torch.float32),
    ((33, 30), 5, (16, 16, 96, 4, 40, 10, 0), "silu", torch.float32),
    ((24, 41), 4, (24, 10, 63, 5, 33, 17, 1), "relu6", torch.float32),
    ((1, 9), 1, (3, 3, 130, 1, 20, 5, 0), "relu", torch.float32),
    ((20, 27), 7, (18, 12, 49, 6, 50, 13, 1), "silu", torch.bfloat16),
    ((21, 18), 14, (9, 17, 81, 3, 25, 30, 0), "relu", torch.float16),
    ((64, 600), 1, (8, 8, 40, 3, 16, 5, 0), "silu", torch.float32),  # rows of which few fit into the scratch
]


def test_inference_plan_cpu(width, modules):
    """A net recorded and replayed gives what its kernels give one by one: three pairs of them are joined."""
    calls = []
    for size, images, channels, activation, dtype in NETS:
        x = torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
        calls.append(("plan_cpu", (raw(x), channels, ACTIVATIONS[activation], DTYPES[dtype])))
    outs = emulator.run(modules["sound"], calls, EMULATED_WIDTH=str(width))
    for net, (planned, direct, steps) in zip(NETS, outs, strict=True):
        made, expected = from_raw(planned, net[-1]), from_raw(direct, net[-1])
        assert expected.isfinite().all() and steps == 15, net
        assert len(expected) == 1 or expected.float().std(0).mean() > 0.02, net
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[net[-1]]
        torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance, msg=lambda told, net=net: f"{net}: {told}")


def test_convolutions_cpu(width, modules):
    results = emulator.run(modules["sound"], [c.call() for c in CONVOLUTIONS], EMULATED_WIDTH=str(width))
    for convolution, result in zip(CONVOLUTIONS, results, strict=True):
        convolution.check(result)
