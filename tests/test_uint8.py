"""uint8 images: the stem that normalises them as it reads them, on every backend, and nets that are given them."""

from __future__ import annotations

import cases
import plain
import pytest
import torch
from plain import DTYPES, channels_last, wide
from test_inference import OURS, PEERS, leaves, planned, small
from test_ops import good
from tolerance import assert_2x
from torch import nn
from uint8 import check_refusals, check_stem

import effnet_fast
from effnet_fast import ops
from effnet_fast.benchmark import calibrate
from effnet_fast.models import create_model
from effnet_fast.ops import backends, native
from effnet_fast.ops.conv.reference import normalised
from effnet_fast.weights import Preprocessing

HALF = torch.full((3,), 0.5)


@pytest.fixture(params=["native", "reference"])
def backend(request) -> str:
    if (reason := backends.reasons()[request.param]["conv_bn_act"]) is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.STEMS, ids=str)
def test_stem(case, dtype, backend):
    check_stem(case, dtype, backend, "cpu")


def test_arguments_are_checked(backend):
    check_refusals(backend, "cpu")


def test_out_form_is_of_the_weights_dtype(backend):
    args = good("conv_bn_act") | {"x": plain.uint8_images(2, 3, 8, 8), "pixels": plain.pixels(3), "residual": None}
    args["weight"] = args["weight"].bfloat16()
    op = torch.ops.effnet_fast.conv_bn_act
    returning, out_form = getattr(op, backend), getattr(op, f"{backend}_out")
    torch.library.opcheck(returning, tuple(args.values()))
    made = returning(*args.values())
    given = torch.full_like(made, float("nan"))
    out_form(*args.values(), y=given)
    assert made.dtype == torch.bfloat16 and torch.equal(given, made)
    with pytest.raises((TypeError, RuntimeError), match="^conv_bn_act: y "):
        out_form(*args.values(), y=given.float())


def test_weights_in_double_are_the_references():
    args = good("conv_bn_act") | {"x": plain.uint8_images(2, 3, 8, 8), "residual": None}
    weight, n = wide(args["weight"]), ops.Norm(*(torch.ones(16, dtype=torch.float64) for _ in range(4)), 1e-3)
    window = {"stride": 2, "padding": (1,) * 4, "activation": "relu"}
    y = ops.conv_bn_act(args["x"], weight, n, **window, pixels=plain.pixels(3).double())
    assert_2x(y, y, plain.conv(plain.normalised(args["x"]), weight, n, **window).double())
    with ops.backend("native", strict=True), pytest.raises(RuntimeError, match="the result would be torch.float64; kernels give"):
        ops.conv_bn_act(args["x"], weight, n, **window, pixels=plain.pixels(3).double())


@planned
@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_nets_take_images_as_they_are_decoded(name):
    """By the net's own mean and deviation, in both layouts, by the same kernels as normalised images: none makes those first."""
    torch.manual_seed(0)
    net = calibrate((PEERS[name]() if name in PEERS else create_model(name)).eval(), (47, 66))
    optimized, x = effnet_fast.optimize_for_inference(net), plain.uint8_images(3, 3, 47, 66)
    mean, std = (HALF, HALF) if "lite" in name else (plain.MEAN, plain.STD)
    with torch.no_grad():
        expected = leaves(net(plain.normalised(x, torch.float32, mean, std)))
        exact = leaves(net.double()(plain.normalised(x, torch.float64, mean, std)))
    optimized(plain.normalised(x, torch.float32))
    for images in (x, x.permute(0, 2, 3, 1).contiguous(), channels_last(x), x[:1]):
        for made, near, truth in zip(leaves(optimized(images)), expected, exact, strict=True):
            assert_2x(made, near[: len(images)], truth[: len(images)], name)
    steps = {(plan.size.steps, plan.size.arena_bytes) for _, plan in optimized._made_plans()}
    assert len(steps) == 1 and len(optimized._plans) == 3


@planned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    net, x = small(), plain.uint8_images(3, 3, 64, 64)
    with torch.no_grad():
        exact = net.double()(plain.normalised(x))
        near = net.to(dtype)(plain.normalised(x, dtype))
    assert_2x(effnet_fast.optimize_for_inference(net.float(), dtype)(x.permute(0, 2, 3, 1)), near, exact)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_and_the_preprocessing_that_is_given(channels):
    torch.manual_seed(0)
    net = calibrate(create_model("efficientnet_b0", in_chans=channels, num_classes=10), channels=channels)
    x, some = plain.uint8_images(2, channels, 40, 36), Preprocessing(32, 32, mean=(0.1, 0.3, 0.5, 0.2), std=(0.5, 0.2, 0.4, 0.1))
    given = some.for_channels(channels)
    by_default = effnet_fast.optimize_for_inference(net)
    default = Preprocessing(32, 32).for_channels(channels)
    for optimized, used in ((effnet_fast.optimize_for_inference(net, preprocessing=some), given), (by_default, default)):
        image = plain.normalised(x, torch.float32, torch.tensor(used.mean), torch.tensor(used.std))
        with torch.no_grad():
            for images in (x, x.permute(0, 2, 3, 1).contiguous()):
                torch.testing.assert_close(optimized(images), net(image), rtol=1e-4, atol=1e-4)


class Brighter(nn.Module):
    """A net of images that it changes first."""

    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x):
        return self.net(x + 0.25)


def test_a_net_that_starts_with_something_else_is_given_normalised_images():
    net, x = Brighter().eval(), plain.uint8_images(2, 3, 40, 40)
    optimized = effnet_fast.optimize_for_inference(net)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(plain.normalised(x, torch.float32)), rtol=1e-4, atol=1e-4)
    assert native.REASON is not None or "normalised, add, then one native call" in str(optimized)


class Decoded(nn.Module):
    """A net, and a convolution after it that is defined before it."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Conv2d(1280, 5, 1)
        self.net = small()

    def forward(self, x):
        return self.decoder(self.net.forward_features(x))


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (Decoded, 3),
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 1), small()), 1),
        (lambda: nn.Sequential(nn.Conv2d(12, 3, 1), small()), 12),
    ],
    ids=["decoder", "grey", "spectrum"],
)
def test_images_have_the_channels_of_the_first_convolution_that_runs(build, channels):
    torch.manual_seed(0)
    net, x = build().eval(), plain.uint8_images(2, channels, 40, 36)
    optimized = effnet_fast.optimize_for_inference(net)
    with torch.no_grad():
        expected = net(normalised(x, optimized.pixels, torch.float32))
    for images in (x, x.permute(0, 2, 3, 1).contiguous()):
        torch.testing.assert_close(optimized(images), expected, rtol=1e-4, atol=1e-4)


def test_both_layouts_at_once_is_nchw():
    optimized, x = effnet_fast.optimize_for_inference(small()), plain.uint8_images(2, 3, 40, 3)
    torch.testing.assert_close(optimized(x), optimized(plain.normalised(x, torch.float32)), rtol=1e-4, atol=1e-4)


def test_views_and_no_images():
    optimized, x = effnet_fast.optimize_for_inference(small()), plain.uint8_images(4, 3, 80, 70)
    for view in (x[:, :, 5:69, ::2], x.permute(0, 2, 3, 1)[::2, 3:50], x[:1].expand(3, -1, -1, -1)):
        torch.testing.assert_close(optimized(view), optimized(view.contiguous()), rtol=1e-4, atol=1e-4)
    assert optimized(x[:0]).shape == optimized(x[:0].permute(0, 2, 3, 1)).shape == (0, 10)


def test_what_is_no_image_is_named_and_leaves_the_copy_usable():
    optimized = effnet_fast.optimize_for_inference(small())
    for shape in ((1, 4, 40, 40), (1, 40, 40, 4), (40, 40, 3), (1, 40, 3, 40)):
        with pytest.raises(ValueError, match=r"x is \(.*\) of torch.uint8; a batch of images \[N, 3, H, W\] of .* would do"):
            optimized(torch.zeros(shape, dtype=torch.uint8))
    assert optimized(torch.zeros(1, 40, 40, 3, dtype=torch.uint8)).shape == (1, 10)
    with pytest.raises(TypeError, match="preprocessing is a tuple; a Preprocessing would do"):
        effnet_fast.optimize_for_inference(small(), preprocessing=(0.5, 0.5))
