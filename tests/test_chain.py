"""Passes whose kernels wait for one another: which do, and that nobody reads what has not been computed. On the CPU, where
something in the place of csrc/chain makes kernels wait."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_graphs import StandIn
from test_inference import OURS, PEERS, leaves
from tolerance import assert_2x
from torch import nn
from torch.utils._pytree import tree_map

import effnet_fast
from effnet_fast.benchmark import calibrate
from effnet_fast.inference import chain, optimize
from effnet_fast.inference.chain import Chains
from effnet_fast.inference.graphs import Few, Graphs
from effnet_fast.inference.joining import Joining
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
    """What runs while kernels wait must not touch memory: it gives a view, or memory that nobody has written."""
    run = Joining.run

    def checked(self: Joining, func: Any, args: Any, kwargs: Any) -> Any:
        waits = isinstance(self, chain.Chaining) and self._waiting > 0
        made = run(self, func, args, kwargs)
        if waits and func is not torch.ops.aten.empty.memory_format:
            for view in made if isinstance(made, (tuple, list)) else [made]:
                assert view.untyped_storage()._cdata == args[0].untyped_storage()._cdata, f"{func} copies"
        return made

    monkeypatch.setattr(Joining, "run", checked)
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
    assert chains(x).isfinite().all() and waiting.launched == [67]


@pytest.mark.parametrize("name", ["float32", "7x7", "12 channels"])
def test_what_a_chain_does_not_take_does_not_wait(name, waiting):
    dtype = torch.float32 if name == "float32" else BF16
    kernel, channels = (7 if name == "7x7" else 3), (12 if name == "12 channels" else 16)
    net = nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.SiLU(),
    ).eval()
    x = torch.randn(1, channels, 9, 8)
    exact, plain = net.double()(x.double()), net.to(dtype)(x.to(dtype))
    assert_2x(Chains(net, torch.ones(2, 3), dtype)(x.to(dtype)), plain, exact)
    assert waiting.launched == []


def test_what_nobody_reads_but_keeps_is_computed(waiting):
    """After the pass, when nothing waits any more."""
    depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    norm = nn.BatchNorm2d(16)
    net = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), depthwise, norm).eval().to(BF16)
    x, kept = torch.randn(1, 3, 9, 8, dtype=BF16), []

    class Keeping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept.append(net(x))
            return x * 2

    assert torch.equal(Chains(Keeping(), torch.ones(2, 3), BF16)(x), x * 2)
    torch.testing.assert_close(kept[0], net(x), rtol=0.02, atol=0.02)
    assert not waiting.recording and waiting.dropped == 0


def test_where_new_memory_is_written_there_is_no_pass(waiting):
    chains, x = Chains(nn.Identity(), torch.ones(2, 3), BF16), torch.randn(1, 3, 8, 8, dtype=BF16)
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


def joined(*modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*modules).eval().to(BF16)


def pointwise(*channels: int) -> list[nn.Module]:
    made = zip(channels, channels[1:], strict=False)
    return [m for c, k in made for m in (nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k), nn.SiLU())]


class Applied(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.forward = function


# What nets of others may do between our kernels, and how many kernels then wait together.
BETWEEN = {
    "a copy into another layout": (lambda x: x.permute(0, 1, 3, 2).contiguous(), [1, 1]),
    "a composite operator": (lambda x: x.reshape(2, 8, -1).view(2, 8, 6, 4).to(memory_format=torch.channels_last), [2]),
    "a mean that is told": (lambda x: [x.mean(), x][1], [1, 1]),
    "a new tensor": (lambda x: x + torch.zeros(8, 1, 1, dtype=BF16), [1, 1]),
    "parts": (lambda x: [x.split(4, 1), x.unbind(0), x.chunk(2, 1), x.squeeze()][3], [2]),
    "views": (lambda x: x.permute(0, 3, 2, 1).transpose(1, 3).detach()[:].view(2, 8, 4, 6), [2]),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_comes_between(name, waiting):
    function, launched = BETWEEN[name]
    net, x = joined(*pointwise(8, 8), Applied(function), *pointwise(8, 8)), torch.randn(2, 8, 4, 6, dtype=BF16)
    torch.testing.assert_close(Chains(net, torch.ones(2, 3), BF16)(x), net(x), rtol=0.05, atol=0.05)
    assert waiting.launched == launched


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_convolution_after_a_turned_map(bias, waiting):
    """Its reference copies what it is given, inside of the op; and a bias is converted before it."""
    dense = nn.Conv2d(8, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8), nn.SiLU()
    net, x = joined(*pointwise(8, 8), Applied(lambda x: x.permute(0, 1, 3, 2)), *dense), torch.randn(2, 8, 4, 6, dtype=BF16)
    net[-2].float()
    torch.testing.assert_close(Chains(net, torch.ones(2, 3), BF16)(x), net(x), rtol=0.05, atol=0.05)


def test_a_weight_that_a_kernel_makes_is_there_before_it_is_read(waiting):
    """Weights are read ahead of their turn."""
    a, b = torch.randn(16, 8, dtype=BF16), torch.randn(24, 8, dtype=BF16)
    net = joined(*pointwise(8, 16), Applied(lambda x: nn.functional.linear(x.mean((2, 3)), b @ a.t())))
    net.append(nn.Linear(24, 24).to(BF16))  # for the constants of so many classes
    x = torch.randn(2, 8, 4, 6, dtype=BF16)
    torch.testing.assert_close(Chains(net, torch.ones(2, 3), BF16)(x), net(x), rtol=0.05, atol=0.2)
    assert waiting.launched == [3, 2]


@pytest.mark.parametrize("bias", [(24,), (1, 24), None])
def test_classifiers(bias, waiting):
    """With a bias of another shape it starts at once."""
    weight, shift = torch.randn(24, 16, dtype=BF16), None if bias is None else torch.randn(bias, dtype=BF16)
    net = joined(*pointwise(8, 16), Applied(lambda x: x.mean((2, 3), keepdim=True).flatten(1)))
    net.append(Applied(lambda x: x @ weight.t() if shift is None else torch.addmm(shift, x, weight.t())))
    x = torch.randn(2, 8, 4, 6, dtype=BF16)
    chains = Chains(net, torch.ones(2, 3), BF16)
    chains._constants = torch.zeros(24, dtype=BF16), torch.ones(24, dtype=BF16)
    torch.testing.assert_close(chains(x), net(x), rtol=0.05, atol=0.2)
    assert waiting.launched == ([2] if bias == (1, 24) else [3])


def test_on_the_cpu_nothing_waits():
    """The ops themselves: a thread records one chain at a time, of a barrier of 4 bytes."""
    ops = torch.ops.effnet_fast
    with pytest.raises(RuntimeError, match="chain: barrier must be one int32"):
        ops.chain_begin(torch.zeros(2, dtype=torch.int32))
    net = create_model("efficientnet_b0").eval().to(BF16)
    chains, x = Chains(net, torch.ones(2, 3), BF16), torch.randn(1, 3, 32, 32, dtype=BF16)
    kept = dict(vars(chains))
    torch.testing.assert_close(chains(x), net(x), rtol=0.05, atol=0.05)
    assert chains.launches == 0 and chains.waited == [67]
    changed = {name for name, value in vars(chains).items() if value is not kept[name]}
    assert changed <= {"waited", "launches"}, "a pass left something behind, in a pool that others may use"


def other(change: Callable[[torch.Tensor], torch.Tensor]):
    """Of a run, another that is changed, and a text."""

    class Other:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return change(x)

        def __str__(self) -> str:
            return "all in one"

    return Few(Other(), optimize._agree)


def fails(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("the GPU has no room\nfor it")


@pytest.mark.parametrize(
    "change, times, told",
    [
        (lambda x: x + x, (3.0, 2.0), "a CUDA graph with all in one, 2.000 ms in place of 3.000"),
        (lambda x: x + x, (3.0, 4.0), "a CUDA graph, 3.000 ms; with all in one it would take 4.000"),
        (lambda x: x * 3, (3.0, 2.0), "a CUDA graph; with all in one it would give another result"),
        (lambda x: (x * 2.0) / 0, (3.0, 2.0), "a CUDA graph; with all in one it would give another result"),
        (lambda x: x + x, (3.0, 2.95), "a CUDA graph, 3.000 ms; with all in one it would take 2.950"),
        (fails, (3.0, 2.0), "a CUDA graph; another way failed: ValueError: the GPU has no room"),
    ],
)
def test_the_faster_of_two_ways_stays(change, times, told, monkeypatch):
    """Of few images; where it is right. Nobody else's random numbers change."""
    monkeypatch.setattr(StandIn, "milliseconds", lambda self, graphs: list(times))
    replayed = Graphs(lambda x: x.float() * 2, torch.float32, StandIn, other(lambda x: change(x.float())))
    x, before = torch.randn(4, 3, 2, 2), torch.get_rng_state()
    for batch in (x, (x * 50 + 100).to(torch.uint8), torch.cat([x, x])):
        assert torch.equal(replayed(batch), batch.float() * 2)
    assert torch.equal(torch.get_rng_state(), before)
    few, of_bytes, many = replayed.lines()
    assert few == f"  4x3x2x2 NCHW torch.float32: {told}" and of_bytes.endswith(f"torch.uint8: {told}")
    assert many == "  8x3x2x2 NCHW torch.float32: a CUDA graph"


def test_a_copy_tries_it_where_it_is_asked_for(monkeypatch):
    """And says why not; both ways of few images are compared."""
    net, x = create_model("efficientnet_b0").eval(), torch.randn(2, 3, 32, 32)
    assert "more than one launch" not in str(effnet_fast.optimize_for_inference(net, BF16))
    told = str(effnet_fast.optimize_for_inference(net, BF16, one_launch=True))
    assert "more than one launch: it is for CUDA, not for cpu" in told
    told = str(effnet_fast.optimize_for_inference(net, BF16, one_launch=True, cuda_graphs=False))
    assert "more than one launch: it is for CUDA graphs" in told

    monkeypatch.setattr(optimize.InferenceModel, "_on_cpu", optimize.InferenceModel._on_cuda)
    monkeypatch.setattr(optimize, "CudaPool", lambda device: StandIn())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(chain, "why_not", lambda device, dtype: None)
    copy = effnet_fast.optimize_for_inference(net, BF16, one_launch=True)
    made = copy(x)
    assert "a CUDA graph, 1.000 ms; with 67 kernels in 0 it would take 1.000" in str(copy)
    monkeypatch.setattr(StandIn, "milliseconds", lambda self, graphs: [2.0, 1.0])
    faster = pickle.loads(pickle.dumps(copy))
    torch.testing.assert_close(faster(x), made, rtol=0.05, atol=0.05)
    assert "a CUDA graph with 67 kernels in 0, 1.000 ms in place of 2.000" in str(faster)
