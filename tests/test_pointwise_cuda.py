"""The native pointwise kernel of CUDA: which backend takes what, and on a GPU the family's shapes against plain PyTorch by the 2x
rule. tests/test_emulator_pointwise.py runs its source without one."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import cases
import pytest
import torch
from plain import conv as plain_conv
from plain import misaligned, norm, wide
from tolerance import assert_2x

from effnet_fast import ops
from effnet_fast.ops import gpu, pointwise
from effnet_fast.ops.training import convolution

OP = torch.ops.effnet_fast.pointwise_conv_bn_act
HALVES = [torch.bfloat16, torch.float16]


def check(shape, out, dtype, gated, added, activation, weight_dtype=None):
    torch.manual_seed(out)
    channels = shape[1]
    n = ops.Norm(*(v.cuda() if torch.is_tensor(v) else v for v in norm(out)))
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(out, channels, 1, 1, device="cuda") / channels**0.5).to(weight_dtype or dtype)
    gate = torch.rand(shape[0], channels, device="cuda") if gated else None
    residual = torch.randn(shape[0], out, *shape[2:], device="cuda").to(dtype) if added else None
    args = {"activation": activation, "gate": gate, "residual": residual}
    with ops.backend("native", strict=True):
        y = ops.pointwise_conv_bn_act(x, weight, n, **args)
    exact = plain_conv(wide(x), wide(weight), wide(n), **{name: wide(value) for name, value in args.items()})
    assert_2x(y, plain_conv(x, weight, n, **args), exact, f"{shape} {out} {activation}")
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu", "fresh_memory_is_nan")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", cases.pointwise_shapes(), ids=str)
def test_family_on_a_gpu(case, dtype):
    shape = 3, case.channels, case.side, case.side
    check(shape, case.out, dtype, case.gate, case.residual, "identity" if case.gate else "silu")


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu", "fresh_memory_is_nan")
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("out", [8, 40, 56, 96, 104, 128, 256])
def test_widths_on_a_gpu(out, activation):
    for channels in (8, 40, 64, 136, 264):
        check((5, channels, 13, 11), out, torch.bfloat16, channels == 40, channels == 136, activation, torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_silu_of_every_bfloat16_on_a_gpu():
    """Off by what csrc/common/epilogue.cuh says of its tanh, 2^-12 of the value, and by the rounding."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    x = every[: len(every) // 8 * 8].view(1, -1, 1, 8).permute(0, 3, 1, 2).cuda()
    one = ops.Norm(None, None, torch.zeros(8, device="cuda"), torch.ones(8, device="cuda"), 0.0)
    weight = torch.eye(8, device="cuda", dtype=torch.bfloat16)[:, :, None, None]
    with ops.backend("native", strict=True):
        y = ops.pointwise_conv_bn_act(x, weight, one, activation="silu").double()
    v = x.double()
    exact = v / (1 + torch.exp(-v))
    rounded = 2**-8 * torch.maximum(y.abs(), exact.abs())
    assert ((y - exact).abs() <= 1.001 * (2**-12 * v.abs() + rounded) + 1e-37).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_views_and_the_out_form_on_a_gpu():
    x = torch.randn(3, 48, 9, 9, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 48, 1, 1, device="cuda", dtype=torch.bfloat16)
    n = ops.Norm(*(v.cuda() if torch.is_tensor(v) else v for v in norm(64)))
    args = (*n, torch.rand(3, 48, device="cuda"), None, "silu")
    expected = OP.native(x, weight, *args)
    assert torch.equal(OP.native(misaligned(x), misaligned(weight), *args), expected)
    assert torch.equal(OP.native(x.contiguous(), weight, *args), expected)
    y = torch.full_like(expected, float("nan"))
    OP.native_out(x, weight, *args, y=y)
    assert torch.equal(y, expected)
    torch.library.opcheck(OP.native, (x, weight, *args))


def test_what_the_kernel_does_not_take(monkeypatch):
    """Said before any kernel starts."""

    def x(*shape):
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda"), shape=shape, dtype=torch.bfloat16)

    def weight(out, channels):
        return torch.empty(out, channels, 1, 1, device="meta")

    assert pointwise.unsupported(x(2, 24, 7, 7), weight(40, 24), None) is None
    assert "multiples of 8" in pointwise.unsupported(x(2, 20, 7, 7), weight(40, 20), None)["native"]
    assert "too many pixels" in pointwise.unsupported(x(2**20, 24, 64, 64), weight(40, 24), None)["native"]
    gate = torch.empty(0)
    assert pointwise.unsupported(x(2, 24, 7, 7), weight(40, 24), gate) is None
    assert "6x7" in pointwise.unsupported(x(2, 24, 6, 7), weight(40, 24), gate)["native"]
    for_stats = functools.partial(convolution._unsupported_stats, "pointwise")
    assert for_stats(x(2, 24, 3, 7), weight(40, 24), gate, 1) is for_stats(x(2, 24, 1, 1), weight(40, 24), None, 1) is None
    assert "21 pixels or more" in for_stats(x(2, 24, 4, 5), weight(40, 24), gate, 1)["native"]
    assert "multiples of 8" in for_stats(x(2, 20, 7, 7), weight(40, 20), None, 1)["native"]
    assert "5632 at most" in for_stats(x(2, 5640, 7, 7), weight(40, 5640), None, 1)["native"]
    backward = functools.partial(convolution._unsupported_backward, "pointwise")
    normed, rest = torch.empty(0), (1, "identity", None)
    assert backward(x(2, 24, 1, 1), weight(288, 24), None, *rest) is None
    assert backward(x(2, 96, 1, 1), weight(128, 96), normed, *rest) is None
    for told, refused in (
        ("multiples of 8", backward(x(2, 20, 7, 7), weight(40, 20), None, *rest)),
        ("takes neither", backward(x(2, 24, 7, 7), weight(40, 24), None, 1, "silu", None)),
        ("takes neither", backward(x(2, 24, 7, 7), weight(40, 24), None, 1, "identity", torch.empty(0))),
        ("296 output channels: .* 288 at most of an x without", backward(x(2, 24, 7, 7), weight(296, 24), None, *rest)),
        ("136 output channels: .* 128 at most of an x with", backward(x(2, 24, 7, 7), weight(136, 24), normed, *rest)),
    ):
        assert re.search(told, refused["native"]), refused
    monkeypatch.setattr(gpu, "shared_memory", lambda index: 99 << 10)
    assert backward(x(2, 24, 7, 7), weight(144, 24), None, *rest) is None
    assert "of 101376 bytes of shared memory" in backward(x(2, 40, 7, 7), weight(240, 40), None, *rest)["native"]
    assert pointwise._slower(x(256, 24, 56, 56), weight(144, 24), None) is None
    assert pointwise._slower(x(1, 24, 56, 56), weight(144, 24), None)["native"].startswith("few pixels")
    assert pointwise._slower(x(1, 24, 56, 56), weight(144, 24), gate) is None
    assert "for halves" in pointwise.native_can_run(SimpleNamespace(is_cuda=True, dtype=torch.float32))
