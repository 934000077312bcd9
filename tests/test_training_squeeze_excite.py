"""The backward of training's squeeze-excite: each backend by the 2x rule against autograd in fp64; registration; bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain import ACTIVATIONS
from test_training_ops import backend, check_out_form, made, wide  # noqa: F401 (a fixture)
from tolerance import assert_2x

from effnet_fast.ops import backends, training

OP = torch.ops.effnet_fast.squeeze_excite_backward
NAMES = ("pool", "norm_sums", "grad_reduce_weight", "grad_reduce_bias", "grad_expand_weight", "grad_expand_bias")
SHAPES = [  # images, channels, hidden units: none of them fills a tile, or all do
    (2, 16, 4),
    (1, 1, 1),
    (16, 32, 16),
    (3, 40, 10),
    (37, 144, 6),
    (5, 100, 33),
    (2, 70, 130),
    (20, 480, 20),
]


def gate_of(pooled, reduce, bias, expand, expand_bias, activation):
    hidden = F.linear(pooled, reduce.flatten(1).to(pooled.dtype), None if bias is None else bias.to(pooled.dtype))
    return torch.sigmoid(F.linear(ACTIVATIONS[activation](hidden), expand.flatten(1).to(pooled.dtype), expand_bias))


def plain(sums, pooled, reduce, bias, expand, expand_bias, activation, pixels):
    """By autograd, in the dtype of ``sums``."""
    of = [t.to(sums.dtype).clone().requires_grad_() for t in (pooled, reduce, bias, expand, expand_bias)]
    with torch.enable_grad():
        gate = gate_of(*of, activation)
        of_pooled, *of_weights = torch.autograd.grad((gate * sums[:, 0]).sum(), of)
    gate, pool = gate.detach()[:, None], of_pooled[:, None] / pixels
    norm_sums = (gate * sums[:, 1::2] + pool * sums[:, 2::2]).sum(0)
    return pool[:, 0], norm_sums, *(t.reshape(t.shape[:2]) if t.dim() > 1 else t for t in of_weights)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it(shape, activation, dtype):
    """Of weights in any dtype."""
    torch.manual_seed(sum(shape))
    images, channels, hidden = shape
    sums, pooled = made(images, 5, channels), made(images, channels)
    weights = made(hidden, channels, 1, 1, scale=channels**-0.5), made(hidden), made(channels, hidden, 1, 1), made(channels)
    weights = tuple(t.to(dtype) for t in weights)
    gate = gate_of(pooled, *(t.float() for t in weights), activation)
    found = training.squeeze_excite_backward(sums, gate, pooled, *weights[:3], activation=activation, pixels=49)
    expected = plain(sums, pooled, *weights, activation, 49)
    exact = plain(*wide(sums, pooled, *weights), activation, 49)
    for name, ours, theirs, reference in zip(NAMES, found, expected, exact, strict=True):
        assert_2x(ours, theirs, reference, f"{name} {shape}")
    unbiased = training.squeeze_excite_backward(sums, gate, pooled, weights[0], None, weights[2], activation=activation, pixels=49)
    biased = training.squeeze_excite_backward(
        sums, gate, pooled, weights[0], torch.zeros_like(weights[1]), weights[2], activation=activation, pixels=49
    )
    assert all(torch.equal(a, b) for a, b in zip(unbiased, biased, strict=True))


def arguments(images=3, channels=24, hidden=6) -> list:
    torch.manual_seed(0)
    weights = made(hidden, channels, 1, 1), made(hidden), made(channels, hidden, 1, 1)
    return [made(images, 5, channels), torch.rand(images, channels), made(images, channels), *weights, "silu", 63]


def test_it_is_registered(backend):  # noqa: F811
    name = backend if backend in OP.overloads() else "reference"
    for args in (arguments(), [None if i == 4 else a for i, a in enumerate(arguments())]):
        torch.library.opcheck(getattr(OP, name), args)
        results = getattr(OP, name)(*args)
        check_out_form(getattr(OP, f"{name}_out"), args, dict(zip(NAMES, results, strict=True)))


def test_views_and_the_same_bits_each_time():
    args = arguments(images=20, channels=70, hidden=33)
    strided = [t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2] for t in args[:6]]
    first, again, of_views = (
        training.squeeze_excite_backward(*given, activation="silu", pixels=63) for given in (args[:6], args[:6], strided)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, of_views, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, [1], TypeError, "sums is list; a torch.Tensor would do"),
        (0, torch.ones(3, 4, 24), ValueError, r"sums is \(3, 4, 24\); \[N, 5, C\] with N and C >= 1 would do"),
        (0, torch.ones(0, 5, 24), ValueError, r"sums is \(0, 5, 24\); \[N, 5, C\] with N and C >= 1 would do"),
        (0, torch.ones(3, 5, 24).half(), TypeError, "sums is torch.float16"),
        (1, torch.ones(3, 23), ValueError, r"gate is \(3, 23\); \(3, 24\) would do"),
        (2, torch.ones(3, 24).double(), TypeError, "pooled is torch.float64"),
        (3, torch.ones(6, 24), ValueError, r"reduce_weight is \(6, 24\); \[R, 24, 1, 1\] with R >= 1 would do"),
        (4, torch.ones(5), ValueError, r"reduce_bias is \(5,\); \(6,\) would do"),
        (5, torch.ones(24, 5, 1, 1), ValueError, r"expand_weight is \(24, 5, 1, 1\); \(24, 6, 1, 1\) would do"),
        (6, "gelu", ValueError, "activation is 'gelu'"),
        (7, 0, ValueError, "pixels is 0"),
    ],
)
def test_bad_input(place, value, error, message):
    args = arguments()
    args[place] = value
    with pytest.raises(error, match=f"squeeze_excite_backward: {message}"):
        training.squeeze_excite_backward(*args[:6], activation=args[6], pixels=args[7])


def test_a_tensor_that_asks_for_a_gradient_is_refused():
    args = arguments()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="squeeze_excite_backward"):
        training.squeeze_excite_backward(*args[:3], args[3].requires_grad_(), *args[4:6], activation="silu", pixels=63)


def test_many_hidden_units_are_left_to_pytorch():
    if backends.requested()[0] != "triton":
        pytest.skip("of Triton's kernel")
    args = arguments(hidden=257)
    with pytest.raises(RuntimeError, match="R is 257: the Triton kernel takes R up to 256"):
        training.squeeze_excite_backward(*args[:6], activation="silu", pixels=63)
    with backends.backend("triton"):
        assert training.squeeze_excite_backward(*args[:6], activation="silu", pixels=63)[0].isfinite().all()
