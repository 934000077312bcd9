"""The backward of training's pointwise kernel for CUDA, its own source run on the CPU under AddressSanitizer and UBSan: every
instance against autograd in fp64 by the 2x rule, several thread orders and cuts into blocks, seeded bugs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
from emulator import build as emulator
from emulator.arrays import ACTIVATIONS, DTYPES, from_raw, raw
from test_training_ops import made, norm_of, plain_backward, wide
from tolerance import assert_2x

from effnet_fast.ops import gpu
from effnet_fast.ops.training import convolution

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
BF16, FP16 = torch.bfloat16, torch.float16
A100, H100 = 164 << 10, 228 << 10  # bytes of shared memory of a multiprocessor
SEEDS = range(2)


@dataclass(frozen=True)
class Run:
    """A launch for N images of P pixels, C and K channels; ``activation`` of x, or None where x is read as it is; ``keeps``: y has
    a gate; ``need``: of x and of the weight."""

    images: int
    pixels: int
    channels: int
    out: int
    activation: str | None = None
    gated: bool = False
    dtype: torch.dtype = BF16
    keeps: bool = False
    residual: bool = False
    need: tuple[bool, bool] = (True, True)
    multiprocessors: int = 2
    shared_bytes: int = H100
    y_activation: str = "identity"
    pools: bool = False

    def arguments(self) -> tuple:
        """What conv_backward takes, as test_training_ops.plain_backward does."""
        torch.manual_seed(self.channels + self.out)

        def image(channels: int) -> torch.Tensor:
            return made(self.images, channels, self.pixels, 1).to(self.dtype)

        x, weight = image(self.channels), (made(self.out, self.channels, 1, 1) / self.out**0.5).to(self.dtype)
        norm = None if self.activation is None else norm_of(self.channels)
        gate = torch.rand(self.images, self.channels) + 0.5 if self.gated else None
        y_gate, y_pool = torch.rand(self.images, self.out) + 0.5 if self.keeps else None, made(self.images, self.out)
        of_y = image(self.out), image(self.out), norm_of(self.out), made(3, self.out), self.y_activation, y_gate
        residual = image(self.channels) if self.residual else None
        read = x, weight, norm, self.activation or "identity", gate
        return *of_y, y_pool if self.pools else None, *read, residual, 1, (0, 0, 0, 0)

    def call(self, seed: int) -> tuple[str, tuple]:
        grad, y, *vectors, y_activation, y_gate, y_pool, x, weight, norm, activation, gate, residual, _, _ = self.arguments()
        vectors += [y_gate, y_pool]
        of_y = [by_pixel(grad), by_pixel(y), *(None if v is None else raw(v) for v in vectors)]
        read = by_pixel(x), raw(weight[:, :, 0, 0]), *(None if v is None else raw(v) for v in (norm, gate)), ACTIVATIONS[activation]
        rest = ACTIVATIONS[y_activation], None if residual is None else by_pixel(residual), list(self.need)
        gpu = self.multiprocessors, self.shared_bytes, seed
        return "pointwise_backward", (*read, [DTYPES[self.dtype]] * 2, of_y, *rest, *gpu)


def by_pixel(x: torch.Tensor):
    return raw(x[..., 0].transpose(1, 2).contiguous())


# Every instance in both types; C that fills no block, and that takes several; K that ends within 16 and 32; images that fill no
# tile, of several tiles and of several parts; rows that fill no 16; blocks with several tasks, and with none of the last round.
RUNS = [
    Run(1, 7, 8, 8),
    Run(3, 49, 16, 96, residual=True, multiprocessors=1),
    Run(2, 130, 24, 144, multiprocessors=1),
    Run(1, 65, 40, 240, dtype=FP16, residual=True),
    Run(2, 33, 48, 288),
    Run(1, 100, 80, 24, keeps=True, multiprocessors=3),
    Run(3, 20, 64, 40, need=(True, False)),
    Run(3, 20, 40, 56, need=(False, True), multiprocessors=1),
    Run(2, 70, 24, 72, dtype=FP16, shared_bytes=A100),
    Run(3, 49, 144, 24, "silu", True, multiprocessors=1),
    Run(2, 300, 32, 16, "silu", True, keeps=True, multiprocessors=7),
    Run(1, 1100, 16, 8, "silu", True, multiprocessors=1),
    Run(5, 17, 96, 40, "silu", True, FP16, multiprocessors=1),
    Run(1, 64, 136, 112, "silu", True, shared_bytes=A100),
    Run(2, 1, 72, 128, "relu6", True, FP16),
    Run(2, 50, 200, 80, "relu", True, residual=True),
    Run(2, 90, 40, 24, "silu", True, need=(False, True)),
    Run(2, 90, 40, 24, "silu", True, need=(True, False)),
    Run(3, 49, 144, 24, "silu", multiprocessors=1),
    Run(3, 49, 144, 24, "silu", dtype=FP16),
    Run(2, 50, 200, 80, "silu"),
    Run(70, 2, 8, 8, "silu", keeps=True),  # of many pieces
    Run(2, 200, 32, 120, "relu6", dtype=FP16, keeps=True, residual=True),
    Run(9, 10, 80, 16, "identity", multiprocessors=1),
    Run(2, 40, 24, 32, "silu", need=(False, True)),
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
        found = [from_raw(outs[0][0], run.dtype).transpose(1, 2)[..., None], *map(torch.from_numpy, outs[0][1:])]
        arguments = run.arguments()
        expected, exact = plain_backward(*arguments), plain_backward(*wide(*arguments))
        (need_x, need_weight), normed = run.need, run.activation is not None
        for name, needed, *of in zip(
            ("grad_x", "grad_weight", "sums"), (need_x, need_weight, need_x and normed), found, expected, exact, strict=True
        ):
            ours, theirs, reference = of
            if needed:
                assert_2x(ours.view(reference.shape), theirs.to(ours.dtype), reference.double(), f"{run}: {name}")
            else:
                assert ours.isnan().all(), f"{run}: {name} was written"


def test_every_kernel(modules):
    check(modules["sound"], RUNS)


def test_any_cut_into_blocks_gives_the_same_grad_x(modules):
    """Pieces change the order of sums alone."""
    runs = [Run(8, 150, 72, 24, "silu", True, multiprocessors=m) for m in (1, 3, 32)]
    check(modules["sound"], runs)
    outs = emulator.run(modules["sound"], [run.call(0) for run in runs])
    assert all(out[0].tobytes() == outs[0][0].tobytes() for out in outs)
    assert len({out[1].tobytes() for out in outs}) > 1  # else there was but one cut


def test_what_it_does_not_take_is_told(modules):
    run = Run(1, 3, 8, 8)
    for changed, says in (
        ({"channels": 9}, "the CUDA kernel takes C and K that are multiples of 8, got 9 and 8"),
        ({"y_activation": "silu"}, "the CUDA kernel takes neither an activation nor a pool of y"),
        ({"pools": True}, "the CUDA kernel takes neither an activation nor a pool of y"),
        ({"out": 480}, "8 input and 480 output channels take more than a block has"),
        ({"channels": 64, "out": 136, "activation": "silu"}, "64 input and 136 output channels take more than a block has"),
    ):
        with pytest.raises(RuntimeError, match=f"pointwise_conv_backward: {says}"):
            emulator.run(modules["sound"], [replace(run, **changed).call(0)])


@pytest.mark.parametrize("shared_bytes", [100 << 10, A100, H100])
def test_it_takes_what_the_package_gives_it(shared_bytes, modules, monkeypatch):
    """Every layer of B0 to B7 that is not left to PyTorch's products."""
    monkeypatch.setattr(gpu, "shared_memory", lambda index: shared_bytes - 1024)
    runs = []
    for channels, out, gated in sorted({(case.channels, case.out, case.gate) for case in cases.pointwise_shapes()}):
        x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), shape=(1, channels, 1, 1))
        weight, norm = torch.empty(out, channels, 1, 1, device="meta"), torch.empty(0) if gated else None
        if convolution._unsupported_backward("pointwise", x, weight, norm, 1, "identity", None) is None:
            runs.append(Run(1, 1, channels, out, "silu" if gated else None, gated, shared_bytes=shared_bytes))
    assert (16, 96) in {(run.channels, run.out) for run in runs} and (144, 24) in {(run.channels, run.out) for run in runs}
    assert len(runs) > (40 if shared_bytes == H100 else 10)
    emulator.run(modules["sound"], [run.call(0) for run in runs])


def bug(text: str, replacement: str, says: str) -> emulator.Bug:
    path = "training/pointwise_backward.cuh"
    return emulator.Bug(path, text, replacement, says, "training_pointwise_backward_bf16", "-DONE_KERNEL")


WRONG = "off by|not finite|changes the result"
SEEDED = {
    "back-gate": bug("int64_t(now.image) * K", "int64_t(0) * K", WRONG),
    "back-unfilled-rows": bug("left + 15 & ~15", "left", WRONG),
    "back-no-barrier": bug("    __syncthreads();  // g and x", "    // g and x", WRONG),
    "back-early-a": bug("if (Tr::kNormed) __syncthreads();  // a", "// a", WRONG),
    "back-slot": bug("    __syncthreads();  // g and x", "    load_next(free_slot);\n    __syncthreads();  // g and x", WRONG),
    "back-last-k": bug("const bool whole = k + 8 < K;", "const bool whole = true;", WRONG),
    "back-z-too-large": bug("at.z_in_stage = at.y >= turned;", "at.z_in_stage = true;", WRONG),
    "back-lost-warp": bug("w < Tr::kWarps; ++w", "w < Tr::kWarps - 1; ++w", WRONG),
    "back-kept-sums": bug("sums[s][e] = 0.f;", ";", WRONG),
    "back-short": bug("kWarps * kSums * kMostColumns * 4)", "0)", "outside shared|heap-buffer|SEGV|" + WRONG),
    "back-parts": bug("int64_t(now.task(p)) * kSums", "int64_t(now.image) * kSums", WRONG),
}
SEEDED_RUNS = [
    Run(3, 145, 72, 24, "silu", True, keeps=True, multiprocessors=1),
    Run(5, 49, 32, 40, "silu", True, keeps=True, multiprocessors=2),
    Run(1, 1200, 8, 8, "silu", True, multiprocessors=1),
]


def test_seeded_runs_are_sound(modules):
    check(modules["sound"], SEEDED_RUNS)


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check(modules[name], SEEDED_RUNS)
