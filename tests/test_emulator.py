"""The kernels' own source under AddressSanitizer and UBSan, against fp64 by the 2x rule: CUDA's run on the CPU by tests/emulator,
the CPU's for each instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulator import build as emulator
from tolerance import assert_2x

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

ACTIVATIONS = {"identity": 0, "silu": 1, "relu": 2, "relu6": 3}  # the enum of csrc/common/activation.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the enum of csrc/common/dtype.h


@dataclass(frozen=True)
class Gate:
    """A squeeze-excite gate: N, P, C and R, and on how large a GPU. 0 multiprocessors: the CPU's kernel."""

    batch: int
    pieces: int
    channels: int
    reduced: int
    multiprocessors: int = 132
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    bias: bool = True
    misalign: int = 0

    def tensors(self) -> list[torch.Tensor | None]:
        g = torch.Generator().manual_seed(self.channels)
        n, p, c, r = self.batch, self.pieces, self.channels, self.reduced
        values = [torch.randn(s, generator=g) for s in [(n, p, c), (r, c, 1, 1), (r,), (c, r, 1, 1), (c,)]]
        weights = [v.mul(0.5).to(self.dtype) for v in values[1:]]
        return [values[0] * 49] + [w if self.bias or w.dim() > 1 else None for w in weights]

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        partial, rw, rb, ew, eb = (None if t is None else t.to(dtype) for t in self.tensors())
        hidden = F.linear(partial.sum(1) / 49, rw.flatten(1), rb)
        hidden = {"identity": lambda t: t, "silu": F.silu, "relu": F.relu, "relu6": F.relu6}[self.activation](hidden)
        return torch.sigmoid(F.linear(hidden, ew.flatten(1), eb))

    def call(self, seed: int = 0) -> tuple[str, tuple]:
        raw = [None if t is None else (t if t.dtype == torch.float32 else t.view(torch.uint16)).numpy() for t in self.tensors()]
        partial, rw, rb, ew, eb = raw
        options = (ACTIVATIONS[self.activation], DTYPES[self.dtype], self.multiprocessors, seed, self.misalign)
        return "squeeze_excite_gate", (partial, 49, rw, rb, ew, eb, *options)


# Weights above 128 KB are split over blocks when there are fewer images than multiprocessors.
GATES = [
    Gate(1, 1, 32, 8),
    Gate(3, 2, 144, 6, activation="relu"),
    Gate(2, 3, 37, 5, activation="relu6"),
    Gate(2, 4, 7, 1, activation="identity", bias=False),
    Gate(2, 2, 48, 12, dtype=torch.bfloat16),
    Gate(2, 2, 48, 12, dtype=torch.float16, bias=False),
    Gate(2, 2, 64, 16, misalign=1),
    Gate(2, 2, 64, 16, dtype=torch.bfloat16, misalign=1),
    Gate(1, 2, 640, 40),
    Gate(2, 1, 641, 39, multiprocessors=16, dtype=torch.bfloat16),
    Gate(1, 1, 1032, 48, dtype=torch.float16),
    Gate(3, 1, 640, 40, multiprocessors=2),
]
SEEDS = range(3)


def bug(text: str, replacement: str, says: str) -> emulator.Bug:
    return emulator.Bug("squeeze_excite/gate.cuh", text, replacement, says, "squeeze_excite")


SEEDED = {
    "missing-barrier": bug("  __syncthreads();\n", "", "changes the result|off by"),
    "off-by-one-store": bug("if (row < last && member == 0)", "if (row <= last && member == 0)", "heap-buffer-overflow"),
    "divergent-shuffle": bug("base < last; base +=", "base + lane / lanes < last; base +=", "shuffle"),
    "misaligned-vector": bug("inner % V == 0 && aligned16(weight)", "inner % V == 0", "misaligned address"),
    "shared-memory-too-short": bug("p.channels + p.reduced) * sizeof", "p.channels) * sizeof", "heap-buffer-overflow"),
}


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> dict[str, Path]:
    """The kernels as they are, "sound", and with each seeded bug."""
    return emulator.build(emulator.directory(tmp_path_factory.getbasetemp()), SEEDED)


def check_squeeze_excite_gate(module: Path) -> None:
    results = iter(emulator.run(module, [gate.call(seed) for gate in GATES for seed in SEEDS]))
    for gate in GATES:
        outs = [next(results) for _ in SEEDS]
        assert all(np.array_equal(out, outs[0]) for out in outs), f"{gate}: the order of threads changes the result"
        assert_2x(torch.from_numpy(outs[0]), gate.expected(torch.float32), gate.expected(torch.float64), str(gate))


def test_squeeze_excite_gate(modules):
    check_squeeze_excite_gate(modules["sound"])


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check_squeeze_excite_gate(modules[name])


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


@pytest.mark.parametrize(("width", "flag"), [(4, None), (8, "avx2"), (16, "avx512dq")], ids=["baseline", "avx2", "avx512"])
def test_squeeze_excite_gate_cpu(width, flag, modules):
    cpu = Path("/proc/cpuinfo")
    if width > 4 and not (cpu.exists() and f" {flag} " in cpu.read_text()):
        pytest.skip(f"this machine has no {flag}")
    outs = emulator.run(modules["sound"], [gate.call() for gate in CPU_GATES], EMULATED_WIDTH=str(width))
    for gate, out in zip(CPU_GATES, outs, strict=True):
        assert_2x(torch.from_numpy(out), gate.expected(torch.float32), gate.expected(torch.float64), str(gate))
