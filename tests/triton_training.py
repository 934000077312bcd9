"""Training's ops in Triton by the tests of every backend, test_training_ops.py's, and blocks trained beside plain PyTorch's: on a
GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1). test_triton.py runs this file in a pytest of its own."""

from __future__ import annotations

import itertools

import pytest
import test_training_ops as every_backend
import test_training_squeeze_excite as squeeze_excite
import torch
from test_training_ops import DTYPES, POINTWISE, SHAPES

from effnet_fast.ops import backends, training, triton_backend
from effnet_fast.ops.training import triton as passes
from effnet_fast.ops.training import triton_squeeze_excite
from effnet_fast.ops.training import triton_statistics as statistics

INTERPRETED = triton_backend.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"


def in_turn(cases: list) -> list[tuple]:
    """Each with each storage type on a GPU, with one of them in turn where kernels are interpreted."""
    if not INTERPRETED:
        return list(itertools.product(cases, DTYPES))
    return [(case, DTYPES[number % len(DTYPES)]) for number, case in enumerate(cases)]


@pytest.fixture(autouse=True)
def backend():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    with backends.backend("triton", strict=True), torch.no_grad(), torch.device(DEVICE):
        yield "triton"
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 9])
def processors(request, monkeypatch):
    """One, whose programs have many tiles each, and as many as cut the batch and images into pieces."""
    for module in (passes, statistics, triton_squeeze_excite):
        monkeypatch.setattr(module, "processors", lambda device: request.param)
    return request.param


NORMS = [(3, 24, 7, 9), (2, 13, 5, 1), (4, 3, 7, 5), (2, 68, 8, 10)]


@pytest.mark.parametrize("activation", every_backend.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_norm_act(shape, dtype, activation, processors):
    every_backend.test_norm_act(activation, shape, dtype)


# The largest error of few sums is luck, and so is that of few channels in half types.
DEPTHWISE = [case for case in SHAPES if case.images * case.height * case.width > 16]
DEPTHWISE = [
    (case, dtype)
    for case, dtype in in_turn(DEPTHWISE[:9] if INTERPRETED else DEPTHWISE)
    if INTERPRETED or dtype == torch.float32 or case.channels > 16
]


@pytest.mark.parametrize(("case", "dtype"), DEPTHWISE, ids=str)
def test_depthwise(case, dtype):
    every_backend.test_depthwise(case, dtype, "triton")


SMALL = [
    *(shape for shape in POINTWISE if shape[1] < 100 and shape[0] * shape[3] * shape[4] <= 160),
    (2, 33, 67, 9, 8),
    (1, 130, 20, 5, 4),
]


@pytest.mark.parametrize(("shape", "dtype"), in_turn(SMALL if INTERPRETED else POINTWISE), ids=str)
def test_pointwise(shape, dtype):
    every_backend.test_pointwise(shape, dtype)


@pytest.mark.parametrize(("stride", "dtype"), in_turn([1, 2]), ids=str)
def test_dense(stride, dtype):
    every_backend.test_dense(stride, dtype)


@pytest.mark.parametrize("channels", [1, 13, 128, 1153])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_vectors(dtype, channels):
    every_backend.test_norm_vectors(channels, dtype)


@pytest.mark.parametrize("channels", [1, 13, 128, 1153])
@pytest.mark.parametrize("values", [None, 1, 37, 2**33])
def test_norm_coefficients(values, channels):
    every_backend.test_norm_coefficients(channels, values)


@pytest.mark.parametrize(("shape", "dtype"), in_turn(squeeze_excite.SHAPES[1:7] if INTERPRETED else squeeze_excite.SHAPES), ids=str)
@pytest.mark.parametrize("activation", ["silu", "relu6"])
def test_squeeze_excite(activation, shape, dtype, processors):
    squeeze_excite.test_it(shape, activation, dtype)


def test_squeeze_excite_is_registered_and_takes_views():
    squeeze_excite.test_it_is_registered("triton")
    squeeze_excite.test_views_and_the_same_bits_each_time()
    squeeze_excite.test_many_hidden_units_are_left_to_pytorch()


def test_vectors_that_are_not_finite_go_through():
    every_backend.test_vectors_that_are_not_finite_go_through()


def test_statistics_far_from_zero(processors):
    every_backend.test_statistics_far_from_zero()


def test_statistics_whose_first_value_is_far_from_the_others(processors):
    """Differences from it lose no more digits than the variance has."""
    y = every_backend.channels_last(every_backend.made(2, 16, 40, 40))
    y[0, :, 0, 0] = 1e4
    mean, var = torch.ops.effnet_fast.batch_stats.triton(y)
    exact, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)


def test_the_same_to_the_bit(processors):
    y, norm, gate = every_backend.channels_last(every_backend.made(3, 24, 19, 17)), every_backend.norm_of(24), torch.rand(3, 24)

    def made() -> list[torch.Tensor]:
        sums = training.norm_act_sums(y, y, norm, "silu", gate), training.norm_act_mean(y, norm, "silu")
        return [*sums, *torch.ops.effnet_fast.batch_stats.triton(y)]

    assert all(torch.equal(a, b) for a, b in zip(made(), made(), strict=True))


@pytest.mark.parametrize("kind", ["depthwise_", "pointwise_", ""])
def test_convolutions_are_registered(kind):
    every_backend.test_convolutions_are_registered(kind, "triton")


def test_the_others_are_registered():
    every_backend.test_the_others_are_registered("triton")


# kernel, stride, channels in, expanded, out, and of the squeeze-excite: without an expansion, with a shortcut, with SAME padding.
TRAINED = [((3, 1, 16, 16, 8, 4), "symmetric"), ((5, 1, 16, 48, 16, 4), "symmetric"), ((3, 2, 8, 40, 12, 0), "same")]


@pytest.mark.parametrize(("block", "dtype"), in_turn(TRAINED), ids=str)
def test_a_trained_block(block, dtype):
    """Forward, backward and running statistics, by autocast where there are halves, beside plain PyTorch."""
    trained = pytest.importorskip("test_training")
    (shape, padding), x = block, every_backend.channels_last(torch.randn(3, block[0][2], 6, 5))
    module = trained.block_of(trained.MBConv, shape, padding=padding)
    module.residual = module.residual and dtype == torch.float32  # else the shortcut is float32, and children run one by one
    with torch.enable_grad():
        trained.check_step(module, x, autocast=None if dtype == torch.float32 else dtype)
        chosen = trained.choices(module, x)
    assert set(chosen) == {"triton"}
