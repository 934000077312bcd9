"""The CPU's native convolutions, depthwise and stem, against fp64 by the 2x rule, and the laws a convolution obeys."""

from __future__ import annotations

import cases
import plain
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import DTYPES, VIEWS, channels_last, wide
from tolerance import assert_2x

from effnet_fast import ops
from effnet_fast.ops import backends, native
from effnet_fast.ops.common import output_size

pytestmark = pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))

DEPTHWISE, CONV = torch.ops.effnet_fast.depthwise_conv_bn_act, torch.ops.effnet_fast.conv_bn_act
(KERNEL,) = (kernel for kernel in backends.kernels("depthwise_conv_bn_act") if kernel.backend == "native")


def depthwise_arguments(case, dtype=torch.float32, activation="silu", pieces=2, weight_dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(case.images, case.channels, case.height, case.width, generator=g).to(dtype))
    weight = torch.randn(case.channels, 1, case.kernel, case.kernel, generator=g).to(weight_dtype)
    return [x, weight, *plain.norm(case.channels, weight_dtype, g), case.stride, list(case.padding), activation, pieces]


def conv_arguments(shape, out, kernel=3, stride=2, padding=(1, 1, 1, 1), dtype=torch.float32, activation="silu", residual=False):
    g = torch.Generator().manual_seed(shape[1] + out)
    x, weight = torch.randn(shape, generator=g).to(dtype), torch.randn(out, shape[1], kernel, kernel, generator=g)
    arguments = [x, weight, *plain.norm(out, generator=g), None, stride, list(padding), activation, None]
    if residual:
        arguments[7] = torch.randn(CONV.reference(*arguments).shape, generator=g).to(dtype)
    return arguments


def check_depthwise(arguments):
    y, partial = DEPTHWISE.native(*arguments)
    assert_2x(y, DEPTHWISE.reference(*arguments)[0], DEPTHWISE.reference(*wide(arguments))[0], "y")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert partial.shape == (y.shape[0], arguments[-1], y.shape[1])
    if arguments[-1]:
        total = y.double().sum((2, 3))
        assert_2x(partial.sum(1), y.float().sum((2, 3)), total, "partial")
    return y, partial


def check_conv(arguments):
    y = CONV.native(*arguments)
    assert_2x(y, CONV.reference(*arguments), CONV.reference(*wide(arguments)))
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


def pieces_of(case):
    """As many as the op makes of it."""
    top, bottom, left, right = case.padding
    height = output_size(case.height, case.kernel, case.stride, top, bottom)
    return KERNEL.pieces(torch.empty(0), height, output_size(case.width, case.kernel, case.stride, left, right))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("number", "case"), list(enumerate(cases.REDUCED)), ids=str)
def test_reduced_cases(number, case, dtype):
    activation = ops.ACTIVATIONS[(number + DTYPES.index(dtype)) % 4]
    check_depthwise(depthwise_arguments(case, dtype, activation, pieces_of(case)))


FULL = cases.depthwise_shapes()


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in FULL), *((case, torch.bfloat16) for case in FULL[::9])], ids=str
)
def test_full_cases(case, dtype):
    """Of images above 112 pixels a band of whole rows."""
    band = case._replace(height=case.height if case.height <= 112 else 16 + case.height % 16)
    check_depthwise(depthwise_arguments(band, dtype, pieces=pieces_of(band)))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, "x's"], ids=str)
def test_types(weight_dtype, dtype, activation):
    case = cases.Case(2, 40, 9, 11, 5, 1, (2, 2, 2, 2))
    same = dtype if weight_dtype == "x's" else weight_dtype
    check_depthwise(depthwise_arguments(case, dtype, activation, weight_dtype=same))


def test_half_precision_rounds_to_nearest_even():
    """Through an identity kernel every value is stored as PyTorch stores it: ties, subnormals, overflow, NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        exact = [1.0, 1 + info.eps, 2 - info.eps, info.max, info.smallest_normal, info.smallest_normal * info.eps, 0.0]
        values = torch.tensor([*exact, float("inf"), float("nan"), 65519.0, 65520.0, 1e-8, 3.1e-5, 0.1, 1 / 3, 3e38])
        # x = 1 and the norm's shift is the value: it is rounded once, when it is stored.
        for shift in torch.cat([values, -values]), torch.randn(1000).double().exp().float() * torch.randn(1000) * 1e-3:
            count = len(shift)
            x, weight = channels_last(torch.zeros(1, count, 1, 1, dtype=dtype)), torch.zeros(count, 1, 3, 3)
            vectors = torch.ones(count), shift, torch.zeros(count), torch.ones(count)
            y, partial = DEPTHWISE.native(x, weight, *vectors, 0.0, 1, [1, 1, 1, 1], "identity", 1)
            assert torch.equal(y.flatten().nan_to_num(nan=7.0), shift.to(dtype).nan_to_num(nan=7.0))
            assert torch.equal(partial.flatten().nan_to_num(nan=7.0), y.flatten().float().nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", VIEWS)
def test_views(how, dtype):
    """Strides and alignment change nothing, of x, of the parameters and of the residual."""
    arguments = depthwise_arguments(cases.Case(2, 37, 9, 12, 3, 2, (0, 1, 1, 1)), dtype)
    y, partial = DEPTHWISE.native(*arguments)
    viewed = [VIEWS[how](arguments[0]), plain.every_second(arguments[1]), *arguments[2:]]
    again, sums = DEPTHWISE.native(*viewed)
    assert torch.equal(again, y) and torch.equal(sums, partial)
    arguments = conv_arguments((2, 3, 13, 20), 24, dtype=dtype, residual=True)
    y = CONV.native(*arguments)
    viewed = [VIEWS[how](arguments[0]), *arguments[1:7], VIEWS[how](arguments[7]), *arguments[8:]]
    assert torch.equal(CONV.native(*viewed), y)


@pytest.mark.parametrize("images", [1, 3, 16])
@pytest.mark.parametrize(("channels", "side"), [(1160, 7), (136, 32)])
def test_threads_do_not_matter(channels, side, images):
    """Bands, groups of channels, images: however the work is shared, the same bits come out."""
    arguments = depthwise_arguments(cases.Case(images, channels, side, side, 5, 1, (2, 2, 2, 2)), pieces=side // 7)
    stem = conv_arguments((images, 3, 3 * side, 2 * side), 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((*DEPTHWISE.native(*arguments), CONV.native(*stem)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_number_of_pieces_follows_from_the_shape():
    x = torch.empty(0)
    assert [KERNEL.pieces(x, height, height) for height in (1, 7, 14, 28, 112, 300)] == [1, 1, 2, 4, 16, 16]


@pytest.mark.parametrize("pieces", [0, 1, 3, 9, 20])
def test_pieces(pieces):
    """Any number of them covers the image; those beyond its rows are empty."""
    y, partial = check_depthwise(depthwise_arguments(cases.Case(2, 24, 9, 5, 3, 1, (1, 1, 1, 1)), pieces=pieces))
    if pieces == 9:
        torch.testing.assert_close(partial, y.sum(3).transpose(1, 2).contiguous())


sizes = st.integers(1, 12)


@settings(max_examples=40, deadline=None)
@given(st.data(), sizes, sizes, st.integers(1, 40), st.sampled_from([3, 5]), st.sampled_from([1, 2]))
def test_depthwise_is_linear_and_moves_with_its_input(data, height, width, channels, kernel, stride):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    # Small whole numbers: every sum is exact, so that the laws hold to the bit.
    a, b = (torch.randint(-8, 9, (2, channels, height, width), generator=g).float() for _ in "ab")
    weight = torch.randint(-8, 9, (channels, 1, kernel, kernel), generator=g).float()
    vectors = [torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)]

    def conv(x, padding, pieces=3):
        return DEPTHWISE.native(channels_last(x), weight, *vectors, 0.0, stride, padding, "identity", pieces)

    pad = [data.draw(st.integers(0, kernel)) for _ in range(4)]
    pad[1], pad[3] = max(pad[1], kernel - height - pad[0]), max(pad[3], kernel - width - pad[2])
    y, partial = conv(a, pad)
    assert torch.equal(conv(3 * a - b, pad)[0], 3 * y - conv(b, pad)[0])
    assert torch.equal(y, F.conv2d(F.pad(a, (pad[2], pad[3], pad[0], pad[1])), weight, stride=stride, groups=channels))
    assert torch.equal(partial.sum(1), y.sum((2, 3)))
    # The image moved down and right by one stride: the output moves by one pixel.
    moved = conv(F.pad(a, (stride, 0, stride, 0)), pad)[0]
    first = -(-max(pad[0], pad[2]) // stride)  # what lies on the padding's edge is not moved, but made anew
    assert torch.equal(moved[:, :, 1 + first :, 1 + first :], y[:, :, first:, first:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("out", [1, 7, 16, 24, 40, 56])
def test_stem(out, channels, dtype):
    for height, width, padding in ((9, 14, (0, 1, 0, 1)), (12, 7, (1, 1, 1, 1)), (1, 26, (2, 0, 1, 3))):
        activation = ops.ACTIVATIONS[(out + width) % 4]
        check_conv(conv_arguments((2, channels, height, width), out, padding=padding, dtype=dtype, activation=activation))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 3), (3, 1), (5, 2), (7, 4)])
def test_other_kernels_of_few_channels(kernel, stride):
    arguments = conv_arguments((2, 3, 17, 15), 32, kernel, stride, (kernel // 2, 0, 1, kernel // 2), residual=True)
    check_conv(arguments)


@pytest.mark.parametrize("resolution", [224, 240])
def test_full_stem(resolution):
    check_conv(conv_arguments((1, 3, resolution, resolution), 32))
    check_conv(conv_arguments((1, 3, resolution, resolution), 40, padding=(0, 1, 0, 1), dtype=torch.bfloat16))


def test_no_images():
    y, partial = DEPTHWISE.native(*depthwise_arguments(cases.Case(0, 16, 9, 9, 3, 2, (1, 1, 1, 1))))
    assert y.shape == (0, 16, 5, 5) and partial.shape == (0, 2, 16)
    assert CONV.native(*conv_arguments((0, 3, 9, 9), 16)).shape == (0, 16, 5, 5)


GOOD = cases.Case(1, 16, 8, 8, 3, 1, (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.ones(16, 8, 8), r"x has shape \[16, 8, 8\]"),
        (0, torch.ones(1, 8, 8, 8), r"weight has shape \[16, 1, 3, 3\], expected \[8, 1, k, k\]"),
        (0, torch.ones(1, 16, 8, 8, dtype=torch.float64), "x must be float32, bfloat16 or float16"),
        (1, torch.ones(16, 1, 7, 7), "the kernel must be 3x3 or 5x5, got 7x7"),
        (1, torch.ones(16, 1, 3, 5), r"weight has shape \[16, 1, 3, 5\]"),
        (2, torch.ones(15), r"norm_weight has shape \[15\], expected \[16\]"),
        (3, torch.ones(16).bfloat16(), "norm_bias must have the dtype of norm_mean"),
        (7, 3, "stride must be 1 or 2, got 3"),
        (8, [1, 1, 1], "padding must have 4 sides, got 3"),
        (8, [1, -1, 1, 1], "padding must be from 0"),
        (9, "gelu", "activation must be silu"),
        (10, -1, "pieces must not be negative"),
    ],
)
def test_depthwise_refuses(position, bad, message):
    arguments = depthwise_arguments(GOOD)
    arguments[position] = bad
    with pytest.raises(RuntimeError, match=f"depthwise_conv_bn_act: {message}"):
        DEPTHWISE.native(*arguments)


def test_outputs_must_be_channels_last():
    arguments = depthwise_arguments(GOOD)
    y, partial = DEPTHWISE.native(*arguments)
    with pytest.raises(RuntimeError, match="y must be channels_last in the result's dtype"):
        DEPTHWISE.native_out(*arguments, y=y.contiguous(), partial=partial)
    with pytest.raises(RuntimeError, match="partial must be contiguous float32"):
        DEPTHWISE.native_out(*arguments, y=y, partial=partial.double())
    stem = conv_arguments((1, 3, 8, 8), 16)
    with pytest.raises(RuntimeError, match=r"conv_bn_act: residual has shape \[1\]"):
        CONV.native(*stem[:7], torch.ones(1), *stem[8:])
    with pytest.raises(RuntimeError, match=r"conv_bn_act: weight has shape \[16, 3, 3, 3\], expected \[K, 2, k, k\]"):
        CONV.native(stem[0][:, :2], *stem[1:])


def choice(call):
    with backends.tracing() as trace:
        call()
    return trace[0]


def test_choice():
    """The native kernels run where they can; what they do not take is said, and the reference runs."""

    def depthwise(kernel, stride, dtype=torch.float32):
        case = cases.Case(1, 16, 9, 9, kernel, stride, (kernel // 2,) * 4)
        x, weight, *rest = depthwise_arguments(case, dtype)
        n = ops.Norm(*(v.to(dtype) if dtype == torch.float64 else v for v in rest[:4]), rest[4])
        return choice(
            lambda: ops.depthwise_conv_bn_act(x, weight, n, stride=stride, padding=case.padding, activation="silu", squeeze=True)
        )

    assert depthwise(5, 2).backend == "native"
    others = "only the reference takes others than 3x3 and 5x5, stride 1 and 2"
    assert depthwise(7, 1).refused["native"] == f"kernel 7x7, stride 1: {others}"
    assert depthwise(3, 3).refused["native"] == f"kernel 3x3, stride 3: {others}"
    assert "float64" in depthwise(3, 1, torch.float64).refused["native"]

    def conv(channels):
        x, weight, *rest = conv_arguments((1, channels, 9, 9), 16)
        n = ops.Norm(*rest[:5])
        return choice(lambda: ops.conv_bn_act(x, weight, n, stride=2, padding=(1, 1, 1, 1), activation="silu"))

    assert conv(3).backend == "native"
    assert conv(24).backend == "reference" and "24 input channels" in conv(24).refused["native"]
    x, weight, *rest = depthwise_arguments(GOOD._replace(kernel=7, padding=(3, 3, 3, 3)))
    with ops.backend("native", strict=True), pytest.raises(RuntimeError, match="kernel 7x7"):
        ops.depthwise_conv_bn_act(x, weight, ops.Norm(*rest[:5]), stride=1, padding=(3, 3, 3, 3), activation="silu", squeeze=False)
