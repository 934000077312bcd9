"""Training's native depthwise kernels on an NVIDIA GPU: the shapes of B0 to B7 and the nasty ones by the 2x rule, the same bits
each time, tensors of more than 2^31 elements. The same source runs on the CPU in test_emulator_training.py."""

from __future__ import annotations

import cases
import pytest
import test_training_ops as every_backend
import torch
from plain import DTYPES, channels_last
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
