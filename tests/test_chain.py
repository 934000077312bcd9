"""Passes whose kernels wait for one another: which do, and that nobody reads what has not been computed. On the CPU, where
something in the place of csrc/chain makes kernels wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_inference import OURS, PEERS, leaves
from tolerance import assert_2x
from torch.utils._pytree import tree_map

import effnet_fast
from effnet_fast.benchmark import calibrate
from effnet_fast.inference import chain
from effnet_fast.inference.chain import Chains
from effnet_fast.models import create_model
from effnet_fast.ops import native

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))


class Waiting:
    """In the place of ``torch.ops.effnet_fast``: what its kernels give is NaN until they are launched."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable, tuple, Any]] = []
        self.recording, self.launched, self.dropped = False, [], 0

    class Op:
        def __init__(self, native: Callable) -> None:
            self.native = native

    def __getattr__(self, name: str) -> Op:
        kernel = getattr(torch.ops.effnet_fast, name).native

        def wait(*args: Any) -> Any:
            assert self.recording
            results = tree_map(lambda t: torch.full_like(t, float("nan")), kernel(*args))
            self.waiting.append((kernel, args, results))
            return results

        return self.Op(wait)

    def chain_begin(self, barrier: torch.Tensor) -> None:
        assert not self.recording and barrier.shape == (1,) and barrier.dtype == torch.int32
        self.recording = True

    def chain_launch(self) -> None:
        for kernel, args, results in self.waiting:
            tree_map(lambda to, made: to.copy_(made), results, kernel(*args))
        self.launched.append(len(self.waiting))
        self.waiting.clear()

    def chain_end(self) -> int:
        if not self.recording:
            return 0
        self.recording, self.dropped = False, len(self.waiting)
        self.waiting.clear()
        return len(self.launched)


@pytest.fixture
def waiting(monkeypatch) -> Waiting:
    monkeypatch.setattr(chain, "_OPS", made := Waiting())
    return made


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """Not here: what waits may still read what was there."""


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# Launches, and kernels of the longest. Of V2 the dense convolutions start at once, each between two that wait.
LAUNCHED = {
    "efficientnet_b0": (1, 67),
    "timm b0": (1, 67),
    "torchvision b0": (1, 67),
    "efficientnet_lite0": (1, 51),
    "efficientnetv2_s": (9, 124),
}


@pytest.mark.parametrize("name", sorted({*OURS, *PEERS, *LAUNCHED}))
def test_nobody_reads_what_waits(name, waiting):
    torch.manual_seed(0)
    net = calibrate((PEERS[name]() if name in PEERS else create_model(name)).eval(), (47, 66))
    x = torch.randn(2, 3, 47, 66)
    exact, plain = leaves(net.double()(x.double())), leaves(net.to(BF16)(x.to(BF16)))
    effnet_fast.accelerate(net)
    chains = Chains(net, torch.ones(2, 3), BF16)
    for _ in range(2):  # the first makes what the classifier lacks of a norm
        waiting.launched.clear()
        for made, expected, truth in zip(leaves(chains(x.to(BF16))), plain, exact, strict=True):
            assert_2x(made, expected, truth, name)
        assert waiting.launched == chains.waited and waiting.dropped == 0 and not waiting.recording
    if name in LAUNCHED:
        assert (chains.launches, max(chains.waited)) == LAUNCHED[name]
        assert str(chains) == f"{sum(chains.waited)} kernels in {chains.launches}"


def test_a_pass_that_fails_launches_nothing(waiting):
    net = create_model("efficientnet_b0").eval().to(BF16)
    chains, x = Chains(net, torch.ones(2, 3), BF16), torch.randn(1, 3, 32, 32, dtype=BF16)

    def fail(module, args):
        raise RuntimeError("no more")

    hook = net.blocks[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        chains(x)
    assert waiting.launched == [] and waiting.dropped > 0 and not waiting.recording
    hook.remove()
    assert chains(x).isfinite().all() and waiting.launched == [66, 1]


@pytest.mark.parametrize("name", ["float32", "7x7", "12 channels"])
def test_what_a_chain_does_not_take_does_not_wait(name, waiting):
    dtype = torch.float32 if name == "float32" else BF16
    kernel, channels = (7 if name == "7x7" else 3), (12 if name == "12 channels" else 16)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
        torch.nn.BatchNorm2d(channels),
        torch.nn.SiLU(),
    ).eval()
    x = torch.randn(1, channels, 9, 8)
    exact, plain = net.double()(x.double()), net.to(dtype)(x.to(dtype))
    assert_2x(Chains(net, torch.ones(2, 3), dtype)(x.to(dtype)), plain, exact)
    assert waiting.launched == []


def test_what_nobody_reads_but_keeps_is_computed(waiting):
    """After the pass, when nothing waits any more."""
    depthwise = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    norm = torch.nn.BatchNorm2d(16)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1, bias=False), torch.nn.BatchNorm2d(16), depthwise, norm).eval().to(BF16)
    x, kept = torch.randn(1, 3, 9, 8, dtype=BF16), []

    class Keeping(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept.append(net(x))
            return x * 2

    assert torch.equal(Chains(Keeping(), torch.ones(2, 3), BF16)(x), x * 2)
    torch.testing.assert_close(kept[0], net(x), rtol=0.02, atol=0.02)
    assert not waiting.recording and waiting.dropped == 0


def test_where_new_memory_is_written_there_is_no_pass(waiting):
    chains, x = Chains(torch.nn.Identity(), torch.ones(2, 3), BF16), torch.randn(1, 3, 8, 8, dtype=BF16)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="use_deterministic_algorithms"):
            chains(x)
    finally:
        torch.use_deterministic_algorithms(False)
    with effnet_fast.backend("reference"), pytest.raises(RuntimeError, match="backend 'reference' is asked for"):
        chains(x)
    assert not waiting.recording and chains(x) is x


def test_where_there_are_none():
    cuda = torch.device("cuda", 0)
    assert chain.why_not(torch.device("cpu"), BF16) == "it is for CUDA, not for cpu"
    assert chain.why_not(cuda, torch.float32) == "it is for torch.bfloat16 and torch.float16, not for torch.float32"
    assert (chain.why_not(cuda, BF16) is None) == native.CUDA_KERNELS


def test_on_the_cpu_nothing_waits():
    """The ops themselves: a thread records one chain at a time, of a barrier of 4 bytes."""
    ops = torch.ops.effnet_fast
    with pytest.raises(RuntimeError, match="chain: barrier must be one int32"):
        ops.chain_begin(torch.zeros(2, dtype=torch.int32))
    net = create_model("efficientnet_b0").eval().to(BF16)
    x = torch.randn(1, 3, 32, 32, dtype=BF16)
    assert Chains(net, torch.ones(2, 3), BF16)(x).isfinite().all()
