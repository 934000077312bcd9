"""The native CUDA kernel of conv_bn_act: which calls it takes, and on a GPU the cases by the 2x rule."""

from __future__ import annotations

import itertools

import cases
import plain
import pytest
import torch
from cases import Stem
from plain import wide
from tolerance import assert_2x
from uint8 import check_stem

from effnet_fast import ops
from effnet_fast.ops import backends, native

NAME = "conv_bn_act"
OP = torch.ops.effnet_fast.conv_bn_act
HALF = (torch.bfloat16, torch.float16)
# Of the tile's 4 rows and 112 columns multiples, parts and more than one; K of each width of a block, and of two blocks.
SHAPES = [
    *(Stem(2, 3, 33, 47, out) for out in (8, 24, 32, 40, 48, 56, 64, 72, 136)),
    *(Stem(2, channels, 9, 30, 40, (0, 1, 0, 1)) for channels in (1, 2, 4)),
    Stem(3, 3, 224, 224, 32),
    Stem(1, 3, 456, 456, 48),
    Stem(1, 3, 600, 600, 64),
    Stem(1, 3, 7, 227, 32, (2, 0, 1, 3)),
    Stem(2, 3, 5, 450, 16, (0, 0, 0, 0)),
    Stem(1, 3, 1, 1, 16),
    Stem(0, 3, 8, 8, 16),
]


class OnCuda:
    """Stands for a tensor on a GPU that this machine may not have."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(native, "REASON", None)
    monkeypatch.setattr(native, "why_no_cuda", lambda device: None)
    can_run = next(kernel.can_run for kernel in backends.kernels(NAME) if kernel.backend == "native")
    assert can_run(OnCuda(torch.bfloat16)) is can_run(OnCuda(torch.float16)) is can_run(OnCuda(torch.uint8)) is None
    assert can_run(OnCuda(torch.float32)) == "on CUDA the native kernel makes torch.bfloat16 or torch.float16"
    assert can_run(torch.empty(1)) is None and "float64" in can_run(OnCuda(torch.float64))

    def refused(x, weight, dtype=torch.bfloat16, stride=2, pixels=None):
        return (ops.conv._unsupported(x, torch.empty(weight, dtype=dtype), stride, pixels) or {}).get("native")

    x, table = OnCuda(torch.bfloat16), torch.empty(2, 3)
    assert refused(x, (32, 3, 3, 3)) is refused(x, (8, 4, 3, 3), torch.float32) is refused(x, (8, 3, 3, 3), pixels=table) is None
    assert refused(x, (12, 3, 3, 3)) == "12 output channels: on CUDA the native kernel makes a multiple of 8"
    assert refused(x, (8, 3, 3, 3), torch.float32, pixels=table) == can_run(OnCuda(torch.float32))
    assert refused(x, (8, 3, 3, 3), torch.float64, pixels=table).startswith("the result would be torch.float64")
    for weight, stride in (((8, 8, 3, 3), 2), ((8, 3, 5, 5), 2), ((8, 3, 3, 3), 1)):
        assert refused(x, weight, stride=stride).endswith(": GPU kernels take a stem's (3x3 of at most 4, stride 2)")
        assert refused(torch.empty(1), weight, stride=stride) is None


# What follows runs the kernel itself.


@pytest.fixture
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check_on_gpu(case, dtype, activation, view=plain.channels_last, residual=False, moved=lambda t: t):
    g = torch.Generator().manual_seed(case.out + case.width)
    x = view(torch.randn(case[:4], generator=g).to("cuda", dtype))
    weight = moved((0.5 * torch.randn(case.out, case.channels, 3, 3, generator=g)).to("cuda"))
    norm = plain.norm(case.out, generator=g)
    norm = ops.Norm(*(moved(v.cuda()) for v in norm[:4]), norm.eps)
    args = {"stride": 2, "padding": case.padding, "activation": activation}
    expected = plain.conv(x, weight, norm, **args)
    added = moved(plain.channels_last(torch.randn(expected.shape, generator=g).to("cuda", dtype))) if residual else None
    with ops.backend("native", strict=True):
        y = ops.conv_bn_act(x, weight, norm, **args, residual=added)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if y.numel():
        expected = expected if added is None else expected + added
        assert_2x(y, expected, plain.conv(wide(x), wide(weight), wide(norm), **args, residual=wide(added)), str(case))
    return y


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_cases_on_a_gpu(case, dtype):
    for activation, residual in itertools.product(ops.ACTIVATIONS, (False, True)):
        check_on_gpu(case, dtype, activation, residual=residual)


@pytest.mark.gpu
@pytest.mark.parametrize("view", plain.VIEWS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_views_on_a_gpu(dtype, view):
    for channels in (1, 3, 4):
        case = Stem(2, channels, 19, 23, 40)
        expected = check_on_gpu(case, dtype, "silu", residual=True)
        assert torch.equal(check_on_gpu(case, dtype, "silu", plain.VIEWS[view], True), expected)
        assert torch.equal(check_on_gpu(case, dtype, "silu", residual=True, moved=plain.misaligned), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [case for case in cases.STEMS if case.out % 8 == 0], ids=str)
def test_uint8_on_a_gpu(case, dtype):
    check_stem(case, dtype, "native", "cuda")


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    x = torch.zeros(900, 3, 896, 896, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=torch.channels_last)
    x[-1].normal_()
    weight = torch.randn(16, 3, 3, 3, device="cuda")
    norm = ops.Norm(None, None, torch.zeros(16, device="cuda"), torch.ones(16, device="cuda"), 1e-3)
    args = {"stride": 2, "padding": (1, 1, 1, 1), "activation": "silu"}
    with ops.backend("native", strict=True):
        assert torch.equal(ops.conv_bn_act(x, weight, norm, **args)[-1:], ops.conv_bn_act(x[-1:], weight, norm, **args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_opcheck_on_a_gpu(dtype):
    x, residual = (torch.randn(2, *shape, device="cuda").to(dtype) for shape in ((3, 9, 7), (16, 5, 4)))
    vectors = [torch.rand(16, device="cuda") + 0.5 for _ in range(4)]
    weight = torch.randn(16, 3, 3, 3, device="cuda")
    torch.library.opcheck(OP.native, (x, weight, *vectors, 1e-3, residual, 2, [1, 2, 1, 1], "silu", None))
