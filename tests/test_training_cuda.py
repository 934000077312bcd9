"""Training's native kernels on an NVIDIA GPU: the shapes of B0 to B7 and the nasty ones by the 2x rule, the same bits each time,
depthwise ones on more than 2^31 elements. The same source runs on the CPU in test_emulator_training.py and _pointwise_stats.py."""

from __future__ import annotations

import cases
import pytest
import test_training_ops as every_backend
import torch
from plain import DTYPES, channels_last, misaligned
from test_training_ops import SHAPES, made, norm_of

from effnet_fast.ops import backends, native, training

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_a_gpu():
    """Fresh memory is NaN; what is made without a device is made there."""
    torch.set_default_device("cuda")
    try:
        if (reason := native.why_not(torch.empty(1), cuda=True)) is not None:
            pytest.skip(reason)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with backends.backend("native", strict=True), torch.no_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_nasty_shapes(case, dtype):
    every_backend.test_depthwise(case, dtype, "native")


@pytest.mark.parametrize("case", cases.depthwise_shapes()[::2], ids=str)
def test_shapes_of_the_family(case):
    every_backend.test_depthwise(case, torch.bfloat16, "native")


def pointwise(case: cases.Pointwise, images: int, dtype: torch.dtype, weight_dtype: torch.dtype = torch.float32) -> tuple:
    """What conv_stats is given: as a projection reads what is before it, or an expansion the block's input."""
    torch.manual_seed(case.out)
    x = channels_last(torch.randn(images, case.channels, case.side, case.side, dtype=dtype))
    weight = (torch.randn(case.out, case.channels, 1, 1) / case.channels**0.5).to(weight_dtype)
    norm, activation = (norm_of(case.channels), "silu") if case.gate else (None, "identity")
    return x, weight, norm, activation, torch.rand(images, case.channels) if case.gate else None, 1, (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", [case for case in cases.pointwise_shapes() if case.side**2 >= 21][::3], ids=str)
def test_pointwise_shapes_of_the_family(case, dtype):
    for images, weight_dtype in ((1, torch.float32), (5, dtype)):
        every_backend.check_stats(*pointwise(case, images, dtype, weight_dtype))


@pytest.mark.parametrize("activation", ("silu", "relu", "relu6", "identity"))
def test_pointwise_without_a_gate(activation):
    x, weight, norm, _, _, *rest = pointwise(cases.Pointwise(144, 40, 3, True, False), 7, torch.bfloat16)
    every_backend.check_stats(x, weight, norm, activation, None, *rest)


def test_pointwise_statistics_are_the_same_bits_each_time():
    args = pointwise(cases.Pointwise(240, 40, 28, True, False), 64, torch.bfloat16)
    first = every_backend.check_stats(*args)
    for _ in range(5):
        again = every_backend.check_stats(*args)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_pointwise_of_views_and_its_out_form():
    x, weight, norm, activation, gate, stride, padding = pointwise(cases.Pointwise(48, 24, 9, True, False), 3, torch.bfloat16)
    op = torch.ops.effnet_fast.pointwise_conv_stats
    rest = (activation, gate, stride, list(padding))
    expected = op.native(x, weight, norm, *rest)
    for again in (
        op.native(x.contiguous(), weight, norm, *rest),
        op.native(misaligned(x), misaligned(weight), misaligned(norm), activation, misaligned(gate), stride, list(padding)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    y, mean, var = (torch.full_like(t, float("nan")) for t in expected)
    op.native_out(x, weight, norm, *rest, y=y, mean=mean, var=var)
    assert all(torch.equal(a, b) for a, b in zip((y, mean, var), expected, strict=True))
    with pytest.raises(RuntimeError, match="^pointwise_conv_stats: the CUDA kernel takes x of bfloat16 or float16"):
        op.native(x.float(), weight, norm, *rest)
    with pytest.raises(RuntimeError, match="^pointwise_conv_stats: y must start at a multiple of 16 bytes"):
        op.native_out(x, weight, norm, *rest, y=misaligned(y), mean=mean, var=var)
    with pytest.raises(RuntimeError, match="^pointwise_conv_stats: an image has 16 pixels; with a gate 21 or more would do"):
        op.native(channels_last(x[..., :4, :4]), weight, norm, *rest)


def arguments(images: int, channels: int, size: int, dtype: torch.dtype) -> tuple[list, dict]:
    x, grad = (channels_last(torch.randn(images, channels, size, size, dtype=dtype)) for _ in range(2))
    weight, norm = torch.randn(channels, 1, 3, 3), norm_of(channels)
    return [x, grad, weight, norm, norm_of(channels), made(3, channels)], {"activation": "silu", "padding": (1, 1, 1, 1)}


def both(x, grad, weight, norm, y_norm, coefficients, y=None, **keywords):
    made_y, mean, var = training.conv_stats(x, weight, norm, **keywords)
    y = made_y if y is None else y
    backward = training.conv_backward(grad, y, y_norm, coefficients, x, weight, norm, y_activation="silu", **keywords)
    return made_y, mean, var, *backward


def test_the_same_bits_each_time():
    args, keywords = arguments(64, 144, 28, torch.bfloat16)
    first = both(*args, **keywords)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(both(*args, **keywords), first, strict=True))


def test_more_than_2_to_the_31_elements():
    """The last image is what it is alone."""
    args, keywords = arguments(24, 64, 1200, torch.bfloat16)
    assert args[0].numel() > 2**31
    y, _, _, grad_x, *_ = both(*args, **keywords)
    last = both(*(tensor[-1:] for tensor in args[:2]), *args[2:], **keywords)
    assert torch.equal(y[-1:], last[0]) and torch.equal(grad_x[-1:], last[3])
