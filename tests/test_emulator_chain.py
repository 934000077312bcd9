"""The chain of kernels in one launch for CUDA, its own source run on the CPU under AddressSanitizer and UBSan: each step against
what plain PyTorch makes of the step's own input, by the 2x rule; several orders of threads and numbers of blocks; seeded bugs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from emulator import build as emulator
from emulator.arrays import ACTIVATIONS, DTYPES, from_raw, raw
from tolerance import assert_2x

from effnet_fast.ops.common import output_size
from effnet_fast.ops.conv.reference import conv_bn_act
from effnet_fast.ops.depthwise.reference import depthwise_conv_bn_act
from effnet_fast.ops.pointwise.reference import pointwise_conv_bn_act
from effnet_fast.ops.squeeze_excite.reference import squeeze_excite_gate

missing = emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
BF16, FP16 = torch.bfloat16, torch.float16
SEEDS = range(2)
LARGE, SMALL = 227 << 10, 24 << 10  # bytes of shared memory of a block: enough for the weights of gates, or not
EPS = 1e-3
STEM, DEPTHWISE, GATE, POINTWISE, POOL = range(5)  # the enum of csrc/chain/params.h


@dataclass(frozen=True)
class Block:
    """An MBConv: expanded to ``expanded`` channels, or not where that is 0; a gate of ``reduced`` hidden units, or none."""

    expanded: int
    out: int
    kernel: int = 3
    stride: int = 1
    reduced: int = 0
    pieces: int = 3


@dataclass(frozen=True)
class Net:
    """Of [images, channels, height, width], which a stem makes of twice as large images where ``image`` is "nchw", "nhwc" or
    "bytes"; ``head``: output channels of a 1x1 convolution at its end, before a mean and as many ``classes``."""

    images: int
    channels: int
    height: int
    width: int
    blocks: tuple[Block, ...]
    head: int = 0
    image: str = ""
    classes: int = 0
    activation: str = "silu"
    dtype: torch.dtype = BF16
    multiprocessors: int = 3
    shared_bytes: int = LARGE


class Made(NamedTuple):
    """A step's result: the number of its array, its shape as a tensor, and what makes it of arrays by number in a dtype."""

    number: int
    shape: tuple[int, ...]
    make: Any


class Chain:
    """What the emulator is given, and what is to come of it."""

    def __init__(self, net: Net) -> None:
        torch.manual_seed(0)
        self.net, self.arrays, self.steps, self.made = net, [], [], []
        self.types: list[torch.dtype] = []
        n, c, h, w = net.images, net.channels, net.height, net.width
        bright = torch.arange(1, n + 1)[:, None, None, None]  # so that no two images have the same gates
        x = self.stem() if net.image else self.given((torch.randn(n, h, w, c) * bright).to(net.dtype))
        for block in net.blocks:
            shape, skip = (n, c, h, w), x
            inner, channels = x, c
            if block.expanded:
                channels = block.expanded
                inner = self.pointwise(x, shape, channels, net.activation)
            h, w = (output_size(size, block.kernel, block.stride, *[block.kernel // 2] * 2) for size in (h, w))
            inner, partial = self.depthwise(inner, (n, channels, *shape[2:]), (h, w), block)
            gate = self.gate(partial, channels, h * w, block.reduced) if block.reduced else -1
            residual = skip if block.stride == 1 and block.out == c else -1
            x, c = self.pointwise(inner, (n, channels, h, w), block.out, "identity", gate, residual), block.out
        if net.head:
            x, c = self.pointwise(x, (n, c, h, w), net.head, net.activation), net.head
        if net.classes:
            mean = self.result((n, c), lambda of: of(x).mean((1, 2)))
            self.steps.append((POOL, [x, mean], [n, h * w, c], 0))
            self.pointwise(mean, (n, c, 1, 1), net.classes, "identity")

    def given(self, t: torch.Tensor) -> int:
        self.arrays.append(raw(t))
        self.types.append(t.dtype)
        return len(self.arrays) - 1

    def result(self, shape: tuple[int, ...], make: Any, dtype: torch.dtype | None = None) -> int:
        """[N, C, H, W] lies as [N, H, W, C]."""
        lies = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
        number = self.given(torch.full(lies, float("nan"), dtype=dtype or self.net.dtype))
        self.made.append(Made(number, shape, make))
        return number

    def norm(self, channels: int) -> list[int]:
        vectors = torch.rand(channels) + 0.5, torch.randn(channels) / 2, torch.randn(channels) / 2, torch.rand(channels) + 0.5
        return [self.given(v) for v in vectors]

    def stem(self) -> int:
        net, planes = self.net, self.net.image == "nchw"
        n, c, h, w, inputs = net.images, net.channels, net.height, net.width, 3
        height, width = 2 * h - 1, 2 * w
        seen, pixels = torch.randn(n, height, width, inputs).to(net.dtype), -1
        if net.image == "bytes":
            seen, pixels = (
                torch.randint(0, 256, seen.shape, dtype=torch.uint8),
                self.given(torch.stack([torch.rand(inputs) / 50, -1 - torch.rand(inputs)])),
            )
        x = self.given(seen.permute(0, 3, 1, 2) if planes else seen)
        weight, norm = self.given((torch.randn(c, inputs, 3, 3) / 5).to(net.dtype)), self.norm(c)

        def make(of):
            vectors, given = [of(v) for v in norm], of(x) if planes else image(of(x))
            scales = None if pixels < 0 else of(pixels)
            return conv_bn_act(given, of(weight), *vectors, EPS, None, 2, [1, 1, 0, 1], net.activation, scales)

        y = self.result((n, c, h, w), make)
        self.steps.append(
            (STEM, [x, weight, *norm, pixels, y], [n, inputs, c, height, width, h, w, 1, 0, planes], ACTIVATIONS[net.activation])
        )
        return y

    def pointwise(self, x, shape, out, activation, gate=-1, residual=-1) -> int:
        n, c, h, w = shape
        weight, norm = self.given((torch.randn(out, c) / c**0.5).to(self.net.dtype)), self.norm(out)

        def make(of):
            vectors = [of(v) for v in norm]
            gates = None if gate < 0 else of(gate)
            rest = None if residual < 0 else image(of(residual))
            return pointwise_conv_bn_act(
                image(of(x).view(n, h, w, c)), of(weight)[:, :, None, None], *vectors, EPS, gates, rest, activation
            )

        y = self.result((n, out, h, w), make)
        self.steps.append((POINTWISE, [x, weight, *norm, gate, residual, y], [n * h * w, h * w, c, out], ACTIVATIONS[activation]))
        return y

    def depthwise(self, x, shape, size, block: Block) -> tuple[int, int]:
        n, c, h, w = shape
        k, pieces = block.kernel, block.pieces if block.reduced else 0
        weight, norm = self.given((torch.randn(c, k, k) / k).to(self.net.dtype)), self.norm(c)

        def make(of):
            vectors, padding = [of(v) for v in norm], [k // 2] * 4
            made = depthwise_conv_bn_act(
                image(of(x)), of(weight)[:, None], *vectors, EPS, block.stride, padding, self.net.activation, 1
            )
            return made[0]

        y = self.result((n, c, *size), make)
        partial = -1
        if pieces:  # their sum is what is said of them: of what was stored
            partial = self.result((n, pieces, c), lambda of: of(y).to(of(norm[0]).dtype).sum((1, 2))[:, None], torch.float32)
        sizes = [n, c, h, w, *size, k, block.stride, k // 2, k // 2, pieces]
        self.steps.append((DEPTHWISE, [x, weight, *norm, y, partial], sizes, ACTIVATIONS[self.net.activation]))
        return y, partial

    def gate(self, partial, channels, count, reduced) -> int:
        dtype = self.net.dtype
        weights = [
            self.given((3 * torch.randn(*shape) / shape[-1] ** 0.5).to(dtype))
            for shape in ((reduced, channels), (reduced,), (channels, reduced), (channels,))
        ]
        n, pieces = self.arrays[partial].shape[:2]

        def make(of):
            reduce, reduce_bias, expand, expand_bias = (of(v) for v in weights)
            return squeeze_excite_gate(
                of(partial), count, reduce[..., None, None], reduce_bias, expand[..., None, None], expand_bias, self.net.activation
            )

        gate = self.result((n, channels), make, torch.float32)
        self.steps.append(
            (GATE, [partial, *weights, gate], [n, pieces, channels, reduced, count], ACTIVATIONS[self.net.activation])
        )
        return gate

    def call(self, seed: int) -> tuple[str, tuple]:
        net = self.net
        return "chain", (self.arrays, self.steps, DTYPES[net.dtype], net.multiprocessors, net.shared_bytes, seed)

    def check(self, arrays: list) -> None:
        found = [from_raw(a, dtype) for a, dtype in zip(arrays, self.types, strict=True)]
        for made in self.made:
            told = f"{self.net}: result {made.number}"
            ours = found[made.number]
            plain, exact = made.make(lambda i: found[i]), made.make(lambda i: found[i].double())
            if len(made.shape) == 4:
                ours = image(ours)
            elif plain.dim() == 3:  # partial sums, of which plain PyTorch makes one
                ours = ours.double().sum(1, keepdim=True).to(plain.dtype)
            assert_2x(ours, plain, exact, told)


def image(t: torch.Tensor) -> torch.Tensor:
    return t.permute(0, 3, 1, 2)


# Every kind of step: kernels and strides, images that fill no tile of 16 and groups that fill no 32 channels, one image and several
# in a tile, pieces that blocks have several of and none, gates whose weights are staged or not, tiles that warps share or do not.
NETS = [
    Net(1, 32, 12, 11, (Block(0, 16, reduced=8), Block(96, 24, 3, 2, 4), Block(144, 24, 5, 1, 6)), head=40),
    Net(1, 8, 5, 3, (Block(0, 8),), multiprocessors=1),
    Net(2, 16, 7, 7, (Block(48, 16, 5, 2, 10), Block(40, 16, 3, 1, 3, 7)), activation="relu6", multiprocessors=5),
    Net(3, 24, 3, 5, (Block(136, 40, 3, 1, 12, 2), Block(240, 40, 5, 1, 10, 1)), dtype=FP16, shared_bytes=SMALL),
    Net(1, 40, 4, 4, (Block(480, 112, 5, 1, 28, 1), Block(0, 112, 3, 2)), head=64, multiprocessors=40, activation="relu"),
    Net(1, 8, 31, 29, (Block(48, 8, 3, 1, 2, 30),), dtype=FP16, multiprocessors=2),
    Net(1, 32, 9, 12, (Block(0, 16, reduced=8),), 64, "nchw", 40),
    Net(2, 40, 6, 7, (Block(0, 24, 3, 2),), 136, "bytes", 1000, dtype=FP16, multiprocessors=7),
    Net(3, 8, 2, 3, (Block(48, 8, 5),), 8, "nhwc", 8, activation="relu6", multiprocessors=1),
    Net(5, 64, 2, 1, (Block(384, 64, 5, 1, 16, 1),), head=256, multiprocessors=8),
]


@pytest.fixture(scope="module")
def modules(shared_directory) -> dict[str, Path]:
    with shared_directory("emulator") as directory:
        return emulator.build(directory, SEEDED)


def check(module: Path, nets: list[Net]) -> None:
    chains = [Chain(net) for net in nets]
    results = iter(emulator.run(module, [chain.call(seed) for chain in chains for seed in SEEDS]))
    for chain in chains:
        outs = [next(results) for _ in SEEDS]
        same = all(a.tobytes() == b.tobytes() for out in outs for a, b in zip(out, outs[0], strict=True))
        assert same, f"{chain.net}: the order of threads changes the result"
        chain.check(outs[0])


def test_every_step(modules):
    check(modules["sound"], NETS)


def test_any_number_of_blocks_gives_the_same_y(modules):
    """Where as many warps share a tile, which follows from it too: of few channels none do."""
    nets = [Net(2, 8, 9, 7, (Block(24, 8, 3, 1, 2, 5),), multiprocessors=m) for m in (1, 2, 7, 132)]
    check(modules["sound"], nets)
    outs = emulator.run(modules["sound"], [Chain(net).call(0) for net in nets])
    assert all(a.tobytes() == b.tobytes() for out in outs for a, b in zip(out, outs[0], strict=True))


def test_more_steps_than_a_launch_takes(modules):
    """The second launch goes on with the barrier as the first has left it."""
    check(modules["sound"], [Net(1, 8, 3, 3, (Block(8, 8, 3, 1),) * 50, multiprocessors=2)])


def bug(file: str, text: str, replacement: str, says: str = "") -> emulator.Bug:
    wrong = "off by|not finite|changes the result|AddressSanitizer"
    return emulator.Bug(file if "/" in file else f"chain/{file}.cuh", text, replacement, says or wrong, "chain_bf16")


GRID = "common/grid.h"
SEEDED = {
    "chain-no-wait": bug("chain", "grid_wait(program.barrier, before);", "__syncthreads();"),
    "chain-early": bug(
        "chain",
        "if (i + 1 < program.count) before = grid_arrive",
        "if (i + 1 < program.count && i) before = grid_arrive",
        "off by|not finite|changes the result|AddressSanitizer|wait for each",
    ),
    "chain-next": bug("chain", "shared + i % 2 * kStepBytes)[word]", "shared)[word]", "off by|not finite|changes|Sanit|runtime"),
    "chain-count": bug(GRID, "0x80000000u - (gridDim.x - 1)", "0x80000000u - gridDim.x", "blocks wait for each other"),
    "chain-any": bug(GRID, "& 0x80000000u) == 0", "& 0xffffffffu) == 0"),
    "chain-alone": bug(GRID, "  __syncthreads();\n  return", "  return"),
    "chain-late": bug(GRID, "    }\n  __syncthreads();\n}", "    }\n}"),
    "chain-taps": bug("depthwise", "if (!first) __syncthreads();  // the piece", "// the piece"),
    "chain-sums": bug("depthwise", "    __syncthreads();  // all warps'", "    // all warps'"),
    "chain-border": bug("depthwise", "unsigned(column + i) < unsigned(p.width)", "true"),
    "chain-staged": bug("gate", "    copy_async_wait<0>();\n", ""),
    "chain-mean": bug("gate", "    __syncthreads();  // the mean", "    // the mean"),
    "chain-hidden": bug("gate", "    __syncthreads();  // the hidden", "    // the hidden"),
    "chain-gates": bug("pointwise", "my_row / pixels;", "min(row + g, rows - 1) / pixels;"),
    "chain-no-gates": bug("pointwise", "      __syncthreads();  // the gates", "      // the gates"),
    "chain-rows": bug("pointwise", "min(row + g + 8 * h, rows - 1)", "row + g + 8 * h"),
    "chain-depth": bug("pointwise", "chunk + u < last_chunk && c < C ? load<4>(", "chunk + u < last_chunk ? load<4>("),
    "chain-columns": bug("pointwise", "min(tile_column + g / 2 * 2 * kWidth, K - 2 * kWidth)", "(tile_column + g * kWidth)"),
    "chain-shares": bug("pointwise", "if (base != first) __syncthreads();  // those", "// those"),
    "chain-short": bug("pointwise", "return gates_at(step) + (p.gate", "return (p.gate", "heap-buffer|outside shared"),
    "chain-all-sums": bug("pool", "    __syncthreads();  // all sums", "    // all sums"),
    "chain-old-sums": bug("pool", "if (item != int(blockIdx.x)) __syncthreads();  // the sums", "// the sums"),
    "chain-image": bug("stem", "p.x) + image * p.x_image", "p.x) + 0 * p.x_image"),
    "chain-zeros": bug("stem", "if (real) seen[c][tap] =", "if (c < p.in_channels) seen[c][tap] ="),
}
# Blocks with several pieces, slices and tiles, and tiles that warps share.
SEEDED_NETS = [
    NETS[0],
    Net(3, 40, 5, 5, (Block(480, 40, 5, 1, 28, 4),), head=64, multiprocessors=2),
    Net(1, 256, 7, 7, (Block(0, 40),), multiprocessors=1),
    Net(2, 8, 3, 3, (Block(0, 16, 3, 1, 4, 1),), multiprocessors=1),
    Net(2, 8, 4, 4, (Block(0, 16),), 136, "bytes", 24, multiprocessors=1),
]


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug_is_caught(name, modules):
    with pytest.raises((AssertionError, RuntimeError), match=SEEDED[name].says):
        check(modules[name], SEEDED_NETS)
