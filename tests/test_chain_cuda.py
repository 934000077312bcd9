"""On a GPU: passes whose kernels are one launch, by the 2x rule, whether or not they are faster there. tests/test_emulator_chain.py
runs the kernel's source without one, tests/test_chain.py the passes."""

from __future__ import annotations

import copy

import pytest
import torch
from test_chain import fresh_memory_is_nan, no_grad  # noqa: F401 (fixtures of every test)
from test_inference import PEERS, leaves
from tolerance import assert_2x

import effnet_fast
from effnet_fast.benchmark import calibrate
from effnet_fast.inference import chain
from effnet_fast.models import create_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]
HALVES = [torch.bfloat16, torch.float16]


def images(number: int, size: tuple[int, int], dtype: torch.dtype, last: bool = False) -> torch.Tensor:
    torch.manual_seed(number)
    form = torch.channels_last if last else torch.contiguous_format
    return torch.randn(number, 3, *size, device="cuda").to(dtype).contiguous(memory_format=form)


def check(net: torch.nn.Module, x: torch.Tensor, runs: int = 20) -> chain.Chains:
    """That all runs give the same, and what the net gives."""
    exact, plain = leaves(copy.deepcopy(net).double()(x.double())), leaves(copy.deepcopy(net).to(x.dtype)(x))
    frozen = effnet_fast.optimize_for_inference(net, x.dtype)
    chains = chain.Chains(frozen.frozen, frozen.pixels, x.dtype)
    made = leaves(chains(x))
    for ours, expected, truth in zip(made, plain, exact, strict=True):
        assert_2x(ours, expected, truth)
    for _ in range(runs):
        assert all(torch.equal(a, b) for a, b in zip(leaves(chains(x)), made, strict=True)), "runs differ"
    return chains


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "efficientnet_lite0", "efficientnetv2_s", "tf_efficientnet_b0", *sorted(PEERS)]
)
def test_nets(name, number, dtype):
    torch.manual_seed(0)
    net = calibrate((PEERS[name]() if name in PEERS else create_model(name)).eval(), (96, 80)).cuda()
    chains = check(net, images(number, (96, 80), dtype, last=number == 3))
    assert sum(chains.waited) > 40 and len(chains.waited) == chains.launches


@pytest.mark.parametrize("index", range(8))
def test_family_at_its_own_resolution(index):
    name = f"efficientnet_b{index}"
    size = (effnet_fast.models.FAMILY[name].resolution,) * 2
    torch.manual_seed(0)
    net = calibrate(create_model(name).eval(), (64, 64)).cuda()
    chains = check(net, images(1, size, torch.bfloat16), runs=5)
    assert len(chains.waited) == 1 and chains.launches == (2 if index > 5 else 1)


def test_a_copy_keeps_the_faster():
    """And tells which; another stream and other shapes in between change nothing."""
    torch.manual_seed(0)
    net = calibrate(create_model("efficientnet_b0").eval(), (64, 64)).cuda()
    optimized = effnet_fast.optimize_for_inference(net, torch.bfloat16, one_launch=True)
    batches = [images(number, (size, 64), torch.bfloat16) for number in (1, 4, 2, 8) for size in (64, 96)]
    before = [optimized(x) for x in batches]
    for line in str(optimized).splitlines():
        assert "failed" not in line and "another result" not in line, line
    assert str(optimized).count("67 kernels in 1") == 6  # those of up to four images
    for _ in range(50):
        with torch.cuda.stream(torch.cuda.Stream()):
            for x, made in zip(batches, before, strict=True):
                assert torch.equal(optimized(x), made)
    torch.cuda.synchronize()
    plain = effnet_fast.optimize_for_inference(net, torch.bfloat16)
    for x, made in zip(batches, before, strict=True):
        exact = copy.deepcopy(net).double()(x.double())
        assert_2x(made, plain(x), exact)


def test_what_was_not_launched_is_not_and_leaves_others_alone():
    op, ops = torch.ops.effnet_fast.depthwise_conv_bn_act.native, torch.ops.effnet_fast
    x = images(1, (9, 8), torch.bfloat16).repeat(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    weight, vector = torch.randn(24, 1, 3, 3, device="cuda").bfloat16(), torch.rand(24, device="cuda") + 0.5
    args = x, weight, vector, vector, vector, vector, 1e-3, 1, [1, 1, 1, 1], "silu", 0
    expected, _ = op(*args)
    barrier = torch.zeros(1, dtype=torch.int32, device="cuda")
    ops.chain_begin(barrier)
    with pytest.raises(RuntimeError, match="recording one already"):
        ops.chain_begin(barrier)
    y, _ = op(*args)
    y.zero_()
    assert ops.chain_end() == 0 and (y == 0).all() and barrier.item() == 0
    ops.chain_begin(barrier)
    y, _ = op(*args)
    y.zero_()  # before it is launched
    ops.chain_launch()
    assert ops.chain_end() == 1
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    assert torch.equal(op(*args)[0], expected)
