"""pointwise_conv_bn_act on the compiled CPU kernel: against fp64 by the 2x rule, its laws, threads, views and errors."""

from __future__ import annotations

import itertools

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import DTYPES, VIEWS, wide
from tolerance import assert_2x

from effnet_fast import ops
from effnet_fast.ops import backends, native, pointwise

pytestmark = pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))

POINTWISE = torch.ops.effnet_fast.pointwise_conv_bn_act


def arguments(images, channels, out, height, width, *, gate=True, residual=True, activation="silu", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(images, c, height, width, generator=g).to(dtype) for c in (channels, out))
    weight = torch.randn(out, channels, 1, 1, generator=g) / channels**0.5
    norm = [torch.rand(out, generator=g) + shift for shift in (0.5, -0.5, -0.5, 0.5)]
    gates = torch.rand(images, channels, generator=g)
    last = {"memory_format": torch.channels_last}
    return [
        x.contiguous(**last),
        weight.to(dtype),
        *norm,
        1e-3,
        gates if gate else None,
        y.contiguous(**last) if residual else None,
        activation,
    ]


def check(args):
    y = POINTWISE.native(*args)
    assert y.dtype == args[0].dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_2x(y, POINTWISE.reference(*args), POINTWISE.reference(*wide(args)), str([tuple(a.shape) for a in args[:2]]))
    return y


SIZES = [1, 3, 7, 13, 17, 33, 100]


# Rows come in tiles of 12 or fewer, channels in panels of up to three vectors of 4, 8 or 16.
@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize("out", SIZES)
def test_odd_sizes(channels, out):
    for (height, width), dtype in itertools.product([(1, 1), (1, 3), (7, 1), (1, 13), (17, 1), (3, 11), (5, 20)], DTYPES):
        check(arguments(2, channels, out, height, width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
def test_parts(gate, residual, activation, dtype):
    for shape in [(3, 40, 24, 5, 7), (1, 24, 40, 6, 6)]:
        check(arguments(*shape, gate=gate, residual=residual, activation=activation, dtype=dtype))


@pytest.mark.parametrize("images", [1, 2])
def test_family(images):
    """All channels, few rows: sides keep their residues modulo 4."""
    shapes = {shape._replace(side=min(shape.side, 4 + shape.side % 4)) for shape in cases.pointwise_shapes()}
    for channels, out, side, gate, residual in sorted(shapes):
        activation = "identity" if gate else "silu"
        check(arguments(images, channels, out, side, side, gate=gate, residual=residual, activation=activation))


@pytest.mark.parametrize("shape", [(16, 96, 112, False), (672, 192, 7, True), (320, 1280, 7, False)], ids=str)
def test_full_shapes(shape):
    channels, out, side, gate = shape
    check(arguments(1, channels, out, side, side, gate=gate, residual=gate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1600, 330, 7, 7),
        (2, 16, 96, 40, 41),
        (5, 240, 40, 14, 14),
        (1, 64, 3000, 3, 3),
        (16, 801, 19, 13, 13),
        (3, 1700, 50, 9, 11),
    ],
    ids=str,
)
def test_threads_do_not_change_a_bit(shape, dtype):
    """Shared by rows, by channels and by both; deep enough for several slices; gates in the rows and, of the last four, in the
    weights of each image."""
    args, before, outs = arguments(*shape, dtype=dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outs.append(POINTWISE.native(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert torch.equal(outs[0], check(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", VIEWS)
def test_views(how, dtype):
    for shape in [(2, 24, 40, 5, 7), (3, 1, 20, 4, 4), (2, 20, 1, 4, 4), (4, 9, 10, 1, 1), (1, 16, 16, 1, 9)]:
        args = arguments(*shape, dtype=dtype)
        views = [VIEWS[how](a) if torch.is_tensor(a) else a for a in args]
        assert torch.equal(POINTWISE.native(*views), POINTWISE.native(*args))


def test_no_images():
    assert POINTWISE.native(*arguments(0, 24, 40, 5, 7)).shape == (0, 40, 5, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_is_half", [False, True], ids=["", "half norm"])
@pytest.mark.parametrize("side", [5, 14])
def test_mixed_dtypes(dtype, weight_dtype, norm_is_half, side):
    """The larger side has its gates in the weights."""
    args = arguments(2, 34, 50, side, side, dtype=dtype)
    args[1] = args[1].to(weight_dtype)
    if norm_is_half:
        args[2:6] = [a.to(dtype) for a in args[2:6]]
    check(args)


def test_norm_without_weight_and_bias():
    args = arguments(2, 35, 50, 5, 5)
    args[2] = args[3] = None
    check(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [39, 40])
@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_pixels_spoil_themselves_alone(value, gate, channels, dtype):
    args = arguments(2, channels, 33, 6, 5, gate=gate, dtype=dtype)
    clean = POINTWISE.native(*args)
    args[0][1, [0, 7], 2, 3] = value
    # Of bf16, oneDNN spoils the pixel before as well where channels are odd: not so in fp64.
    out, plain = POINTWISE.native(*args), POINTWISE.reference(*wide(args))
    keep = torch.ones(2, 6, 5, dtype=torch.bool)
    keep[1, 2, 3] = False
    assert torch.equal(out.movedim(1, -1)[keep], clean.movedim(1, -1)[keep])
    assert torch.equal(out.isnan(), plain.isnan())


def test_bf16_is_rounded_to_nearest():
    """A GEMM with the identity, norm of ones, returns every kind of bf16 as it was, and rounds sums ties to even."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(1, 16, 64, 64)
    one, zero = torch.ones(16), torch.zeros(16)
    eye = torch.eye(16).reshape(16, 16, 1, 1)
    finite = torch.where(x.isfinite() & (x.abs() > 1e-30), x, torch.zeros_like(x))  # 0 * inf would spoil the pixel
    residual = finite.roll(1, 1).contiguous(memory_format=torch.channels_last)
    y = POINTWISE.native(finite, eye, one, zero, zero, one, 0.0, None, residual, "identity")
    assert torch.equal(y, (finite.float() + residual.float()).to(torch.bfloat16))


shapes = st.tuples(*(st.integers(1, size) for size in (4, 70, 70, 6, 6)))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_a_gate_of_ones_changes_nothing(shape, seed):
    args = arguments(*shape, gate=False, seed=seed)
    plain = POINTWISE.native(*args)
    args[7] = torch.ones(shape[0], shape[1])
    assert torch.equal(POINTWISE.native(*args), plain)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 1000), st.integers(-6, 6))
def test_scaling_by_a_power_of_two_is_exact(shape, seed, exponent):
    """Half of linearity, to the bit: without a shift, y(2^e x) = 2^e y(x)."""
    args = arguments(*shape, residual=False, activation="identity", seed=seed)
    args[3] = args[4] = torch.zeros(shape[2])
    plain = POINTWISE.native(*args)
    args[0] = args[0] * 2.0**exponent
    assert torch.equal(POINTWISE.native(*args), plain * 2.0**exponent)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_sums_of_integers_are_exact(shape, seed):
    """The other half: y(a + b) = y(a) + y(b), where all sums are small integers."""
    args = arguments(*shape, gate=False, residual=False, activation="identity", seed=seed)
    args[0], args[1] = args[0].mul(4).round(), args[1].mul(40).round()
    args[2:7] = [None, None, torch.zeros(shape[2]), torch.ones(shape[2]), 0.0]
    other = args[0].flip(1).contiguous(memory_format=torch.channels_last)
    both = POINTWISE.native(args[0] + other, *args[1:])
    assert torch.equal(both, POINTWISE.native(*args) + POINTWISE.native(other, *args[1:]))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 1000), st.sampled_from(DTYPES), st.randoms())
def test_an_image_does_not_depend_on_its_batch(shape, seed, dtype, random):
    args = arguments(*shape, seed=seed, dtype=dtype)
    order = random.sample(range(shape[0]), random.randint(1, shape[0]))
    moved = [a[order] if i in (0, 7, 8) else a for i, a in enumerate(args)]
    assert torch.equal(POINTWISE.native(*moved), POINTWISE.native(*args)[order])


def test_out_form_refuses_another_layout():
    args = arguments(2, 16, 24, 4, 4)
    with pytest.raises(RuntimeError, match="pointwise_conv_bn_act: y must be channels_last"):
        POINTWISE.native_out(*args, y=torch.empty(2, 24, 4, 4))


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.zeros(2, 24, 4), r"x has shape \[2, 24, 4\], expected \[N, C, H, W\]"),
        (0, torch.zeros(2, 24, 4, 4, dtype=torch.int32), "x must be float32, bfloat16 or float16"),
        (0, torch.zeros(2, 0, 4, 4), "x has shape .*, expected C, H and W from 1"),
        (1, torch.zeros(40, 20, 1, 1), r"weight has shape \[40, 20, 1, 1\], expected \[K, 24, 1, 1\]"),
        (1, torch.zeros(40, 24), r"weight has shape \[40, 24\]"),
        (2, torch.zeros(39), r"norm_weight has shape \[39\], expected \[40\]"),
        (3, torch.zeros(40, dtype=torch.bfloat16), "norm_bias must have the dtype of norm_mean"),
        (5, torch.zeros(41), r"norm_var has shape \[41\], expected \[40\]"),
        (7, torch.zeros(2, 40), r"gate has shape \[2, 40\], expected \[2, 24\]"),
        (7, torch.zeros(2, 24, dtype=torch.bfloat16), "gate must be float32"),
        (8, torch.zeros(2, 24, 4, 4), r"residual has shape \[2, 24, 4, 4\], expected \[2, 40, 4, 4\]"),
        (8, torch.zeros(2, 40, 4, 4, dtype=torch.bfloat16), "residual must have the dtype of x"),
        (9, "gelu", "activation must be silu, relu, relu6 or identity, got 'gelu'"),
    ],
)
def test_refuses(position, bad, message):
    args = arguments(2, 24, 40, 4, 4)
    args[position] = bad
    with pytest.raises(RuntimeError, match=f"pointwise_conv_bn_act: {message}"):
        POINTWISE.native(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_function_takes_the_native_kernel(dtype, monkeypatch):
    monkeypatch.setattr(pointwise, "MATRIX_TILES", False)
    x, weight, *norm, gate, residual, activation = args = arguments(2, 24, 40, 4, 4, dtype=dtype)
    with backends.tracing() as trace:
        y = ops.pointwise_conv_bn_act(x, weight, ops.Norm(*norm), gate=gate, residual=residual, activation=activation)
    assert torch.equal(y, POINTWISE.native(*args)) and trace[0].backend == "native"


def test_bf16_goes_to_onednn_where_there_are_matrix_tiles(monkeypatch):
    monkeypatch.setattr(pointwise, "MATRIX_TILES", True)
    for dtype in DTYPES:
        x, weight, *norm, gate, residual, activation = arguments(2, 24, 40, 4, 4, dtype=dtype)
        with backends.tracing() as trace:
            ops.pointwise_conv_bn_act(x, weight, ops.Norm(*norm), gate=gate, residual=residual, activation=activation)
        assert trace[0].backend == ("reference" if dtype == torch.bfloat16 else "native")


@pytest.mark.parametrize(
    ("images", "side", "channels", "dtype", "backend"),
    [
        (15, 8, 960, torch.float32, "native"),
        (16, 8, 960, torch.float32, "reference"),
        (16, 8, 960, torch.bfloat16, "native"),
        (16, 8, 1600, torch.bfloat16, "reference"),
        (16, 8, 1600, torch.float16, "native"),
        (8, 12, 960, torch.float32, "native"),
    ],
)
def test_gates_over_many_rows_and_channels_go_to_onednn(images, side, channels, dtype, backend, monkeypatch):
    monkeypatch.setattr(pointwise, "MATRIX_TILES", False)
    x, weight, *norm, gate, residual, activation = arguments(images, channels, 256, side, side, dtype=dtype)
    with backends.tracing() as trace:
        ops.pointwise_conv_bn_act(x, weight, ops.Norm(*norm), gate=gate, residual=residual, activation=activation)
    assert trace[0].backend == backend
    told = trace[0].refused.get("native") == "a gate over many rows and channels: oneDNN is faster"
    assert told == (backend == "reference")
