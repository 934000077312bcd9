"""Training's native kernels on an NVIDIA GPU: the shapes of B0 to B7 and the nasty ones by the 2x rule, the same bits each time,
also on more than 2^31 elements. The same source runs on the CPU in test_emulator_training.py, _pointwise_stats.py and
_pointwise_backward.py."""

from __future__ import annotations

import cases
import pytest
import test_training_ops as every_backend
import torch
from plain import DTYPES, channels_last, misaligned
from test_training_ops import SHAPES, made, norm_of

from effnet_fast.ops import backends, native, training
from effnet_fast.ops.training import convolution

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


def refused(case: cases.Pointwise) -> bool:
    """Whether the backward of a projection or an expansion is left to products of PyTorch's, on this GPU or every one."""
    x, weight = torch.empty(1, case.channels, 1, 1, dtype=torch.bfloat16), torch.empty(case.out, case.channels, 1, 1)
    norm = norm_of(case.channels) if case.gate else None
    return convolution._unsupported_backward("pointwise", x, weight, norm, 1, "identity", None) is not None


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "case", [case for case in cases.pointwise_shapes() if case.side**2 >= 21 and case.out <= 288][::2], ids=str
)
def test_pointwise_backward_of_the_family(case, dtype):
    if refused(case):
        pytest.skip("PyTorch's products do it")
    if dtype == torch.float16 and case.side > 60:
        pytest.skip("its gradients of weights, sums over so many pixels, overflow in plain PyTorch")
    for images, with_gate in ((1, False), (5, case.gate)) if dtype == torch.bfloat16 else ((1, case.gate),):
        x, *rest = pointwise(case, images, dtype)
        every_backend.check_conv(x, *rest, ("identity", with_gate, False), residual=not case.gate, dtype=dtype)


@pytest.mark.parametrize("activation", ("silu", "relu", "relu6", "identity"))
def test_pointwise_backward_without_a_gate(activation):
    x, weight, norm, _, _, *rest = pointwise(cases.Pointwise(144, 40, 9, True, False), 7, torch.bfloat16)
    every_backend.check_conv(x, weight, norm, activation, None, *rest, residual=True, dtype=torch.bfloat16)


def backward_arguments(images: int, channels: int, out: int, side: int) -> tuple[list, dict]:
    x, weight, norm, activation, gate, *_ = pointwise(cases.Pointwise(channels, out, side, True, False), images, torch.bfloat16)
    grad, y = (channels_last(torch.randn(images, out, side, side, dtype=torch.bfloat16)) for _ in range(2))
    return [grad, y, norm_of(out), made(3, out), x, weight, norm], {"activation": activation, "gate": gate}


def test_pointwise_gradients_are_the_same_bits_each_time():
    args, keywords = backward_arguments(64, 144, 24, 56)
    first = training.conv_backward(*args, **keywords)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(training.conv_backward(*args, **keywords), first, strict=True))


def test_pointwise_backward_of_views_and_its_out_form():
    (grad, y, y_norm, coefficients, x, weight, norm), keywords = backward_arguments(3, 48, 24, 9)
    op, rest = torch.ops.effnet_fast.pointwise_conv_backward, (keywords["activation"],)
    end = None, 1, [0, 0, 0, 0], True, True

    def run(form, change, **out):
        of_y = map(change, (grad, y, y_norm, coefficients))
        read = change(x), change(weight), change(norm), *rest, change(keywords["gate"])
        return form(*of_y, "identity", None, None, *read, *end, **out)

    expected = run(op.native, lambda t: t)
    assert all(torch.equal(a, b) for a, b in zip(run(op.native, misaligned), expected, strict=True))
    names = "grad_x", "grad_weight", "sums"
    out = {name: torch.full_like(t, float("nan")) for name, t in zip(names, expected, strict=True)}
    run(op.native_out, lambda t: t, **out)
    assert all(torch.equal(a, b) for a, b in zip(out.values(), expected, strict=True))
    with pytest.raises(RuntimeError, match="^pointwise_conv_backward: grad_x must start at a multiple of 16 bytes"):
        run(op.native_out, lambda t: t, **out | {"grad_x": misaligned(out["grad_x"])})
    with pytest.raises(RuntimeError, match="^pointwise_conv_backward: the CUDA kernel takes x of bfloat16 or float16"):
        run(op.native, lambda t: t.float())


def test_pointwise_gradients_of_more_than_2_to_the_31_elements():
    """The last image's is what it is alone."""
    args, keywords = backward_arguments(24, 64, 16, 1200)
    assert args[4].numel() > 2**31
    grad_x, _, sums = training.conv_backward(*args, **keywords)
    last = [t[-1:] if t.dim() == 4 and len(t) == 24 else t for t in args]
    alone, _, sums_alone = training.conv_backward(*last, **keywords | {"gate": keywords["gate"][-1:]})
    assert torch.equal(grad_x[-1:], alone)
    torch.testing.assert_close(sums[-1:], sums_alone, rtol=1e-4, atol=1e-2)  # of other parts


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
