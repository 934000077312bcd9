"""The pass that CUDA graphs capture: its convolutions joined with what surrounds them, here on whatever backend there is."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from test_inference import OURS, PEERS, leaves
from tolerance import assert_2x
from torch.utils._python_dispatch import TorchDispatchMode

import effnet_fast
from effnet_fast import ops
from effnet_fast.benchmark import calibrate
from effnet_fast.inference.joining import run_joined
from effnet_fast.models import create_model
from effnet_fast.ops import backends


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Ran(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(f"{func.namespace}.{func._opname}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_a_joined_pass_gives_the_nets_answer(name, backend):
    """By the 2x rule; a peer's stem is one op, as ours is."""
    torch.manual_seed(0)
    net = calibrate((PEERS[name]() if name in PEERS else create_model(name)).eval(), (47, 66))
    x = torch.randn(3, 3, 47, 66)
    plain, exact = leaves(net(x)), leaves(net.double()(x.double()))
    net.float()
    effnet_fast.accelerate(net)
    with ops.backend(backend) if backend else torch.no_grad(), backends.tracing() as trace:
        joined = leaves(run_joined(net, x))
    for made, expected, truth in zip(joined, plain, exact, strict=True):
        assert_2x(made, expected, truth, name)
    chosen = [choice.op for choice in trace if isinstance(choice, backends.Choice)]
    assert chosen[0] == "conv_bn_act" and chosen[-1] == "pointwise_conv_bn_act"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", ["efficientnet_b0", "timm tf_b0", "torchvision b0"])
def test_an_image_of_bytes_is_normalised_by_the_stem(name, backend, layout):
    """Its value is what the net gives for the normalised image, and no other operator reads it."""
    torch.manual_seed(0)
    net = calibrate((PEERS[name]() if name in PEERS else create_model(name)).eval(), (47, 66))
    image = torch.randint(0, 256, (2, 3, 47, 66), dtype=torch.uint8)
    image = image.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else image
    pixels = torch.tensor([[0.02, 0.017, 0.015], [-2.1, -2.0, -1.8]])
    x = image * pixels[0, :, None, None] + pixels[1, :, None, None]
    plain, exact = net(x), net.double()(image * pixels[0, :, None, None].double() + pixels[1, :, None, None])
    effnet_fast.accelerate(net.float())
    with ops.backend(backend) if backend else torch.no_grad():
        assert_2x(run_joined(net, image, pixels, torch.float32), plain, exact)


def test_bytes_that_no_convolution_reads_first_are_normalised():
    image = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
    pixels = torch.tensor([[0.02, 0.017, 0.015], [-2.1, -2.0, -1.8]])
    x = image * pixels[0, :, None, None] + pixels[1, :, None, None]
    for passed in (lambda x: x * 2, lambda x: F.pad(x, (1, 2, 3, 0)) + 1, lambda x: x.mean((2, 3))):
        torch.testing.assert_close(run_joined(passed, image, pixels, torch.float32), passed(x))


@pytest.mark.parametrize("write", [F.relu_, lambda x: x.add_(1), lambda x: x[:, :1].mul_(2)], ids=["relu_", "add_", "view"])
def test_a_convolution_reads_its_input_before_that_is_written(write):
    net = PASSES["dense"]

    def written(x):
        x = x.sin()
        y = F.conv2d(x, torch.ones(4, 8, 3, 3))
        write(x)
        return F.batch_norm(y, torch.zeros(4), torch.ones(4)), net(x)

    x = torch.randn(2, 8, 12, 12)
    for made, expected in zip(run_joined(written, x), written(x), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_reads_a_joined_result_before_that_is_written():
    def written(x):
        h = PASSES["dense"](x)
        y = F.conv2d(h, torch.ones(4, h.shape[1], 1, 1))
        torch.add(h, 1, out=h) if x.sum() > 0 else h.add_(1)
        return F.batch_norm(y, torch.zeros(4), torch.ones(4)), h

    for x in (torch.rand(2, 8, 12, 12), -torch.rand(2, 8, 12, 12)):
        for made, expected in zip(run_joined(written, x), written(x), strict=True):
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["conv_stem", "bn1", "conv_head", "bn2"])
def test_what_a_hook_keeps_can_be_read(where):
    """Though the pass has joined it with what follows."""
    net, kept = calibrate(timm.create_model("efficientnet_b0").eval(), (40, 40)), []
    net.get_submodule(where).register_forward_hook(lambda module, x, y: kept.append(y))
    x = torch.randn(1, 3, 40, 40)
    net(x)
    effnet_fast.accelerate(net)
    run_joined(net, x)
    effnet_fast.optimize_for_inference(net)(x)
    expected, joined = kept[0], kept[1]
    assert len(kept) >= 2 and all(y.sum().isfinite() for y in kept)
    torch.testing.assert_close(joined, expected, rtol=1e-3, atol=1e-3)


def test_nothing_is_computed_in_vain():
    """A stem's and a head's convolution, norm and activation are not run before they are run as one."""
    net = PEERS["timm b0"]().eval()
    effnet_fast.accelerate(net)
    x = torch.randn(1, 3, 40, 40)
    ran = Ran()
    with ran, ops.backend("reference"):
        net.conv_stem(x)
    assert "aten.convolution" in ran.names, "the mode sees what runs"
    ran = Ran()
    with ran:
        run_joined(lambda x: F.silu(net.bn1(net.conv_stem(x))), x)
    joined = "effnet_fast.conv_bn_act" in ran.names
    assert ran.names.count("aten.convolution") == (0 if joined else 1)
    ran = Ran()
    with ran:
        run_joined(lambda x: net.conv_stem(x) is None, x)
    assert "aten.convolution" not in ran.names


WEIGHT, DEPTHWISE, GROUPED, POINTWISE = (torch.randn(8, c, k, k) for c, k in ((8, 3), (1, 3), (2, 3), (8, 1)))
BIAS, MEAN, VAR, SCALE = torch.randn(8), torch.randn(8), torch.rand(8) + 0.5, torch.rand(8) + 0.5


def normed(y: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(y, MEAN, VAR, SCALE, BIAS, eps=1e-3)


def twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = F.conv2d(x, WEIGHT, BIAS)
    z = normed(y)
    return y, z, F.relu(z), y.mean((2, 3))


def written(x: torch.Tensor) -> torch.Tensor:
    y = F.conv2d(x, WEIGHT)
    y.add_(1)
    return F.relu_(normed(F.silu(y, inplace=True)))


def weight_written_to(x: torch.Tensor) -> torch.Tensor:
    weight = POINTWISE.clone()
    y = F.conv2d(x, weight)
    weight.zero_()
    return normed(y)


def weight_made(x: torch.Tensor) -> torch.Tensor:
    """By a convolution that waits itself."""
    return normed(F.conv2d(x, F.conv2d(POINTWISE, POINTWISE)))


PASSES = {
    "dense": lambda x: F.silu(normed(F.conv2d(x, WEIGHT, padding=1, stride=2))),
    "dense with a bias": lambda x: F.relu6(normed(F.conv2d(x, WEIGHT, BIAS))),
    "padded": lambda x: F.silu(normed(F.conv2d(F.pad(x, (0, 1, 0, 1)), WEIGHT, stride=2)), inplace=True),
    "depthwise": lambda x: normed(F.conv2d(x, DEPTHWISE, groups=8, padding=1)),
    "pointwise": lambda x: F.relu(normed(F.conv2d(x, POINTWISE))),
    "no norm": lambda x: F.silu(F.conv2d(x, WEIGHT, BIAS, padding=(1, 0))),
    "no norm, padded": lambda x: F.relu(F.conv2d(F.pad(x, (0, 1, 2, 1)), WEIGHT, BIAS, stride=2, padding=1)),
    "grouped": lambda x: normed(F.conv2d(x, GROUPED, groups=4)),
    "dilated": lambda x: normed(F.conv2d(x, WEIGHT, dilation=2)),
    "transposed": lambda x: normed(F.conv_transpose2d(x, WEIGHT)),
    "training": lambda x: F.batch_norm(F.conv2d(x, WEIGHT), None, None, training=True),
    "other activation": lambda x: F.hardswish(normed(F.conv2d(x, WEIGHT)), inplace=True),
    "zeros alone": lambda x: F.pad(x, (1, 2, 3, 4)),
    "zeros of channels_last": lambda x: F.pad(x.contiguous(memory_format=torch.channels_last), (1, 2, 3, 4)).flatten(1),
    "one image": lambda x: F.conv2d(x[0], WEIGHT),
    "flattened": lambda x: F.conv2d(x, WEIGHT).flatten(1),
    "two activations": lambda x: F.relu(F.silu(normed(F.conv2d(x, WEIGHT)))),
    "two norms": lambda x: normed(normed(F.conv2d(x, WEIGHT))),
    "read twice": twice,
    "written to": written,
    "weight written to": weight_written_to,
    "weight made": weight_made,
}


@pytest.mark.parametrize("name", PASSES)
def test_what_can_be_joined_and_what_cannot(name):
    x = torch.randn(2, 8, 9, 10)
    for made, expected in zip(leaves(run_joined(PASSES[name], x)), leaves(PASSES[name](x)), strict=True):
        assert made.shape == expected.shape
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_the_norm_of_cudnn_is_joined():
    """What ``F.batch_norm`` is on CUDA in float32; here there is no kernel of it."""
    x = torch.randn(2, 8, 9, 10)

    def on_cuda(x):
        y, *_ = torch.ops.aten.cudnn_batch_norm(F.conv2d(x, WEIGHT, padding=1, stride=2), SCALE, BIAS, MEAN, VAR, False, 0.1, 1e-3)
        return F.silu(y)

    torch.testing.assert_close(run_joined(on_cuda, x), PASSES["dense"](x), rtol=1e-4, atol=1e-4)
