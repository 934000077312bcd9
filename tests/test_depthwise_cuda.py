"""The native CUDA kernels of depthwise_conv_bn_act: their launch rule, and on a GPU the cases by the 2x rule."""

from __future__ import annotations

import cases
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_2x

from effnet_fast import ops
from effnet_fast.ops import backends
from effnet_fast.ops.depthwise import launch

NAME = "depthwise_conv_bn_act"
OP = torch.ops.effnet_fast.depthwise_conv_bn_act
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_rows_and_pieces_agree():
    """The pieces are whole segments of equally many rows: the kernel, told the pieces alone, finds the same rows."""
    for case in cases.depthwise_shapes():
        height, width = -(-case.height // case.stride), -(-case.width // case.stride)
        for dtype in DTYPES:
            for images in (1, 7, 128):
                rows, pieces = launch.rows_and_pieces(dtype, images, case.channels, height, width, 132)
                across = -(-width // launch.tile(dtype, case.channels, width).piece)
                assert pieces % across == 0 and 1 <= rows <= height
                assert -(-height // (pieces // across)) == rows and -(-height // rows) * across == pieces


def test_segments_fill_the_gpu_and_no_more():
    shape = (1152, 7, 7)  # B0's last block: 24 channel tiles, four images a tile
    assert launch.rows_and_pieces(torch.bfloat16, 1, *shape, 132) == (2, 4)
    assert launch.rows_and_pieces(torch.bfloat16, 128, *shape, 132) == (7, 1)
    assert launch.rows_and_pieces(torch.float32, 128, *shape, 132) == (7, 2)


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(32, 112, (32, 32)), (40, 112, (32, 48)), (64, 112, (32, 64)), (144, 56, (32, 48)), (672, 14, (16, 48)), (64, 7, (8, 48))],
)
def test_tiles(channels, width, expected):
    tile = launch.tile(torch.float16, channels, width)
    assert (tile.columns, tile.channels) == expected and tile.images * tile.columns == 32


def test_pieces_trace_with_dynamic_shapes(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def partial(x):
        return x.new_zeros(x.shape[0], launch.pieces(x, x.shape[2], x.shape[3]), x.shape[1])

    torch._dynamo.reset()
    compiled = torch.compile(partial, backend=backend, fullgraph=True, dynamic=True)
    for images, side in ((2, 20), (3, 25), (64, 40), (9, 56)):
        x = torch.zeros(images, 48, side, side, dtype=torch.bfloat16)
        assert compiled(x).shape == partial(x).shape
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("weight", "stride", "says"),
    [((8, 1, 7, 7), 1, "kernel 7x7, stride 1: only the reference takes others than 3x3 and 5x5"), ((8, 1, 3, 3), 3, "stride 3")],
)
def test_other_windows_go_to_the_reference(weight, stride, says):
    norm = ops.Norm(None, None, torch.zeros(8), torch.ones(8), 1e-3)
    with backends.tracing() as trace:
        ops.depthwise_conv_bn_act(
            torch.randn(1, 8, 9, 9), torch.randn(weight), norm, stride=stride, padding=(1,) * 4, activation="silu", squeeze=False
        )
    assert trace[0].backend == "reference"
    if backends.reasons("cpu")["native"][NAME] is None:
        assert says in trace[0].refused["native"]
    kernel = backends.Kernel("native", OP.reference, backends.always)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._KERNELS, NAME, [kernel, *(k for k in backends._KERNELS[NAME] if k.backend == "reference")])
        assert backends.choose(NAME, torch.zeros(1)) == kernel
        assert backends.choose(NAME, torch.zeros(1), slower={"native": "kernel 7x7", "triton": "kernel 7x7"}).backend == "reference"


# What follows runs the kernels themselves.


@pytest.fixture
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def plain(x, weight, norm, case, activation):
    top, bottom, left, right = case.padding
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight.to(x.dtype), stride=case.stride, groups=case.channels)
    y = F.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps)
    return {"silu": F.silu, "relu": F.relu, "relu6": F.relu6, "identity": lambda t: t}[activation](y)


@pytest.fixture
def fp32_is_fp32():
    """For cuDNN, by its convolutions' own setting: where any test has used that, torch.backends.cudnn.flags raises."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def check_on_gpu(case, dtype, activation, view=lambda x: x.contiguous(memory_format=torch.channels_last)):
    torch.manual_seed(0)
    x = view(torch.randn(case.images, case.channels, case.height, case.width, device="cuda").to(dtype))
    weight = 0.5 * torch.randn(case.channels, 1, case.kernel, case.kernel, device="cuda")
    vectors = [torch.rand(case.channels, device="cuda") + shift for shift in (0.5, -0.5, -0.5, 0.5)]
    norm, wide = ops.Norm(*vectors, 1e-3), ops.Norm(*(v.double() for v in vectors), 1e-3)
    arguments = {"stride": case.stride, "padding": case.padding, "activation": activation}
    with ops.backend("native", strict=True):
        y, partial = ops.depthwise_conv_bn_act(x, weight, norm, squeeze=True, **arguments)
        again, empty = ops.depthwise_conv_bn_act(x, weight, norm, squeeze=False, **arguments)
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(again, y) and empty.shape[1] == 0
    assert_2x(y, plain(x, weight, norm, case, activation), plain(x.double(), weight.double(), wide, case, activation), str(case))
    total = y.double().sum((2, 3))
    assert_2x(partial.sum(1), y.float().sum((2, 3)), total, "partial")
    return y


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_memory_is_nan", "fp32_is_fp32")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*cases.REDUCED, *(c._replace(images=3) for c in cases.depthwise_shapes()[::8])], ids=str)
def test_cases_on_a_gpu(case, dtype):
    for activation in ops.ACTIVATIONS:
        check_on_gpu(case, dtype, activation)


VIEWS = {
    "nchw": lambda x: x.contiguous(),
    "misaligned": lambda x: (
        torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()])[1:]
        .view(x.shape[0], *x.shape[2:], x.shape[1])
        .permute(0, 3, 1, 2)
    ),
    "sliced": lambda x: F.pad(x, (1, 2, 3, 1, 8, 3), value=float("nan")).contiguous(memory_format=torch.channels_last)[
        :, 8:-3, 3:-1, 1:-2
    ],
}


@pytest.mark.gpu
@pytest.mark.usefixtures("fp32_is_fp32")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_on_a_gpu(dtype, view):
    case = cases.Case(2, 40, 19, 23, 5, 1, cases.symmetric(5))
    assert torch.equal(check_on_gpu(case, dtype, "silu", VIEWS[view]), check_on_gpu(case, dtype, "silu"))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    case = cases.Case(90, 96, 512, 512, 3, 2, cases.symmetric(3))
    x = torch.zeros(case.images, 512, 512, case.channels, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    x[-1].normal_()
    weight = torch.randn(96, 1, 3, 3, device="cuda")
    norm = ops.Norm(None, None, torch.zeros(96, device="cuda"), torch.ones(96, device="cuda"), 1e-3)
    with ops.backend("native", strict=True):
        arguments = {"stride": 2, "padding": case.padding, "activation": "silu", "squeeze": False}
        y, _ = ops.depthwise_conv_bn_act(x, weight, norm, **arguments)
        last, _ = ops.depthwise_conv_bn_act(x[-1:], weight, norm, **arguments)
    assert torch.equal(y[-1:], last)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_on_a_gpu(dtype):
    x = torch.randn(2, 16, 9, 7, device="cuda").to(dtype)
    vectors = [torch.rand(16, device="cuda") + 0.5 for _ in range(4)]
    torch.library.opcheck(OP.native, (x, torch.randn(16, 1, 5, 5, device="cuda"), *vectors, 1e-3, 2, [1, 2, 2, 2], "silu", 1))
