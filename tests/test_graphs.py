"""Networks as CUDA graphs: which are kept, who may use them when, and what happens where memory runs out. Most of it runs on the
CPU too, with something in the place of what CUDA does itself."""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inference import OURS, PEERS, leaves, small
from tolerance import assert_2x

import effnet_fast
from effnet_fast.benchmark import calibrate, images
from effnet_fast.inference import graphs
from effnet_fast.inference.graphs import CudaPool, Graph, Graphs, InPieces, Uncapturable
from effnet_fast.inference.joining import run_joined
from effnet_fast.models import create_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class StandIn:
    """A pool in the place of :class:`CudaPool`: a replay runs the network again, and writes to where its results were."""

    captured = 0  # by all of them, since a test began
    most = 1 << 40  # bytes of images and results that there is memory for

    def __init__(self) -> None:
        self.taken, self.busy = 0, False

    @contextmanager
    def turn(self):
        assert not self.busy, "two turns at the same time"
        self.busy = True
        yield
        time.sleep(0)  # another thread may come now
        self.busy = False

    def capture(self, run, x, key):
        static = key.stored(x)
        results = run(static)

        def replay() -> None:
            for old, new in zip(leaves(results), leaves(run(static)), strict=True):
                old.copy_(new)

        graph = Graph(static, results, replay)
        if self.taken + graph.static_bytes() > StandIn.most:
            raise torch.OutOfMemoryError("out of memory")
        self.taken += graph.static_bytes()
        StandIn.captured += 1
        return graph

    def milliseconds(self, graphs):
        return [1.0 for _ in graphs]

    def bytes(self) -> int:
        return self.taken


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> torch.device:
    monkeypatch.setattr(StandIn, "captured", 0)
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


def graphs_of(net: Callable, device: torch.device, dtype: torch.dtype = torch.float32) -> Graphs:
    pool = functools.partial(CudaPool, device) if device.type == "cuda" else StandIn
    return Graphs(functools.partial(run_joined, net), dtype, pool)


def near(out, expected) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def inference():
    """Without gradients, and with fp32 products as fp32."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "ieee"
    with torch.no_grad():
        yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*OURS[:2], "timm b0", "timm b0 features", "torchvision b0"])
def test_a_replay_gives_the_nets_answer(name, dtype, device):
    torch.manual_seed(0)
    net = calibrate((PEERS[name]() if name in PEERS else create_model(name)).eval(), (47, 66)).to(device)
    x = torch.randn(2, 3, 47, 66, device=device)
    exact, plain = leaves(net.double()(x.double())), leaves(net.to(dtype)(x.to(dtype)))
    effnet_fast.accelerate(net)
    replayed = graphs_of(net, device, dtype)
    replayed(torch.randn_like(x))
    for made, expected, truth in zip(leaves(replayed(x)), plain, exact, strict=True):
        assert_2x(made, expected, truth, name)


def test_what_cannot_be_captured_runs_without_a_graph(monkeypatch):
    """And is not tried again: each attempt costs memory for good."""
    tried = []

    class Refusing(StandIn):
        def capture(self, run, x, key):
            tried.append(key)
            raise Uncapturable("it waits for the GPU")

    graphs = Graphs(lambda x: x * 2, torch.float32, Refusing)
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="2x3x4x4 NCHW torch.float32 runs without a CUDA graph .* it waits for the GPU"):
        assert torch.equal(graphs(x), x * 2)
    assert torch.equal(graphs(x.double()), x * 2)
    assert len(tried) == 1 and "it waits for the GPU" in graphs.lines()[0] and graphs.static_bytes() == 0


class Cuda:
    """What :class:`CudaPool` uses of ``torch.cuda``, and in which order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.streams = [SimpleNamespace(name="caller")]
        self.MemPool, self.CUDAGraph = (lambda: SimpleNamespace(id=(0, 1))), (lambda: SimpleNamespace(replay=None))

    def Stream(self):
        tell = lambda what: lambda other: self.told.append(f"{what} {other.name}")  # noqa: E731
        self.streams[0].wait_stream = tell("caller waits for")
        return SimpleNamespace(name="side", wait_stream=tell("side waits for"), wait_event=tell("side waits for"))

    def Event(self):
        return SimpleNamespace(name="the last turn", record=lambda stream: self.told.append(f"turn ends on {stream.name}"))

    def current_stream(self, device):
        return self.streams[-1]

    def empty_cache(self) -> None:
        self.told.append("cache is emptied")

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    @contextmanager
    def use_mem_pool(self, pool, device):
        self.told.append("pool is used")
        try:
            yield
        finally:
            self.told.append("pool is left")

    @contextmanager
    def graph(self, graph, pool, stream, mode):
        self.told.append(f"capture on {stream.name} in {pool}, {mode}")
        yield
        self.told.append("capture ends")


def test_a_capture_comes_after_a_warm_up_in_its_pool(monkeypatch):
    """In which memory runs out if it does: not in the capture. And the caller's stream waits for what was started, all the same."""
    monkeypatch.setattr(torch, "cuda", cuda := Cuda())
    pool = CudaPool(torch.device("cpu"))
    ready = ["side waits for the last turn", "side waits for caller", "cache is emptied", "pool is used"]
    warm = ["pool is left", "caller waits for side"]
    x = torch.randn(1, 3, 4, 5)
    key = graphs_of(torch.sin, torch.device("cpu")).key(x)

    graph = pool.capture(lambda x: cuda.told.append("a pass") or x.sin(), x, key)
    assert cuda.told == [
        *ready,
        "a pass",
        *warm,
        "capture on side in (0, 1), thread_local",
        "a pass",
        "capture ends",
        "turn ends on side",
    ]
    assert torch.equal(graph.results, x.sin()) and graph.x is not x

    cuda.told.clear()
    with pytest.raises(torch.OutOfMemoryError):
        pool.capture(Scarce(0), x, key)
    assert cuda.told == [*ready, *warm, "turn ends on side"]


CALLS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(32, 40), st.integers(32, 40), st.booleans(), st.booleans()), min_size=2, max_size=6
)


def check_calls(run, net, device, calls) -> None:
    """Each against ``net``, at once and, since results are the caller's, after all."""
    kept = []
    for number, height, width, channels_last, wide in calls:
        x = torch.randn(number, 3, height, width, device=device, dtype=torch.float64 if wide else torch.float32)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        expected = net(x.float())
        kept.append((run(x), expected))
        near(*kept[-1])
    for pair in kept:
        near(*pair)


@settings(max_examples=10, deadline=None)
@given(CALLS)
def test_any_order_of_batches(calls):
    net = small()
    check_calls(graphs_of(net, torch.device("cpu")), net, "cpu", calls)


@pytest.mark.gpu
@settings(max_examples=20, deadline=None)
@given(CALLS)
def test_any_order_of_batches_on_cuda(calls):
    net = small().cuda()
    check_calls(effnet_fast.optimize_for_inference(net), net, "cuda", calls)


def test_keys(device):
    """One for each shape and layout, whatever the caller's floating type and strides."""
    replayed = graphs_of(small().to(device), device)
    x = torch.randn(2, 3, 40, 36, device=device)
    expected = replayed(x)
    for same in (x.double(), torch.stack([x, x], -1)[..., 0], x.mT.contiguous().mT):
        near(replayed(same), expected)
    assert len(replayed.lines()) == 1
    near(replayed(x.contiguous(memory_format=torch.channels_last)), expected)
    near(replayed(x[:1]), expected[:1])
    assert replayed.lines() == [
        "  2x3x40x36 NCHW torch.float32: a CUDA graph",
        "  2x3x40x36 channels_last torch.float32: a CUDA graph",
        "  1x3x40x36 NCHW torch.float32: a CUDA graph",
    ]


def test_the_graph_that_was_not_used_for_longest_goes(device, monkeypatch):
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    net = small().to(device)
    replayed = graphs_of(net, device)
    for size in (32, 33, 32, 34, 33):
        x = torch.randn(1, 3, size, 32, device=device)
        near(replayed(x), net(x))
    assert [line.split()[0] for line in replayed.lines()] == ["1x3x34x32", "1x3x33x32"]
    assert device.type == "cuda" or StandIn.captured == 4


def test_threads_take_turns(device):
    """On a stream of their own each, with the same graphs; every result is kept."""
    net = small().to(device)
    replayed = graphs_of(net, device)
    batches = [torch.randn(1 + i % 2, 3, 32 + 8 * (i % 3), 32, device=device) for i in range(12)]
    expected = [net(x) for x in batches]
    answers: dict[int, list[torch.Tensor]] = {}

    def serve(thread: int) -> None:
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.no_grad(), torch.cuda.stream(stream):
            answers[thread] = [replayed(x) for x in batches]
            if stream is not None:
                stream.synchronize()

    if device.type == "cuda":
        for x in batches:  # a capture wants no other thread to synchronize the device
            replayed(x)
        torch.cuda.synchronize()
    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(threads)
    for given_back in answers.values():
        near(given_back, expected)


def test_an_error_leaves_the_others_alone(device):
    net = small().to(device)
    replayed, x = graphs_of(net, device), torch.randn(1, 3, 40, 40, device=device)
    before = replayed(x)
    with pytest.raises((ValueError, RuntimeError), match="weight is|channels"):
        replayed(torch.randn(1, 4, 40, 40, device=device))
    assert len(replayed.lines()) == 1
    assert torch.equal(replayed(x), before)


def test_bytes_are_told_and_given_back(device):
    replayed = graphs_of(small().to(device), device)
    assert replayed.bytes() == replayed.static_bytes() == 0
    for number in (4, 2):
        replayed(torch.randn(number, 3, 40, 40, device=device))
    assert replayed.static_bytes() == 4 * (4 + 2) * (3 * 40 * 40 + 10)
    assert replayed.bytes() >= replayed.static_bytes()
    replayed.clear()
    assert replayed.bytes() == replayed.static_bytes() == 0


class Scarce:
    """A net of two results that has memory for so many images, and what it was asked for."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[int] = []
        self.freed = 0

    def free(self) -> None:
        self.freed += 1

    def __call__(self, x: torch.Tensor) -> dict:
        self.asked.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return {"sum": x.sum((1, 2, 3)), "maps": [2 * x], "none": None}


def test_what_memory_does_not_suffice_for_runs_in_pieces():
    """After one more try with all memory that can be had; it is told once, and remembered for such images."""
    net = Scarce(3)
    run = InPieces(net, net.free)
    x = torch.randn(11, 3, 4, 5)
    with pytest.warns(UserWarning, match="for 11 images of 3x4x5: 3 run at a time"):
        results = run(x)
    near(results["sum"], x.sum((1, 2, 3)))
    assert torch.equal(results["maps"][0], 2 * x) and results["none"] is None
    assert net.asked == [11, 11, 6, 3, 3, 3, 2] and net.freed == 3
    net.asked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (11, 2, 4):
            assert torch.equal(run(x[:number])["maps"][0], 2 * x[:number])
    assert net.asked == [3, 3, 3, 2, 2, 3, 1]
    with pytest.raises(torch.OutOfMemoryError):
        InPieces(Scarce(0), net.free)(x)


def test_graphs_make_room_before_a_batch_is_cut(monkeypatch):
    """Memory for one batch of 8 or of 6, and not for both."""
    monkeypatch.setattr(StandIn, "most", 8 * (3 * 40 * 40 + 10) * 4)
    net = small()
    replayed = graphs_of(net, torch.device("cpu"))
    run = InPieces(replayed, replayed.clear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (8, 6, 8):
            x = torch.randn(number, 3, 40, 40)
            near(run(x), net(x))
    x = torch.randn(20, 3, 40, 40)
    with pytest.warns(UserWarning, match="for 20 images of 3x40x40: 5 run at a time"):
        near(run(x), net(x))
    assert len(replayed.lines()) == 1


@pytest.mark.gpu
def test_a_batch_over_memory_on_cuda():
    """Under a limit that a batch of 1024 does not fit in, with graphs and without."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    net = small().cuda()
    x = torch.randn(1024, 3, 224, 224, device="cuda")
    expected = torch.cat([net(piece) for piece in x.split(32)])
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (3 << 30)) / total)
        for cuda_graphs in (True, False):
            optimized = effnet_fast.optimize_for_inference(net, cuda_graphs=cuda_graphs)
            with pytest.warns(UserWarning, match="for 1024 images of 3x224x224: "):
                near(optimized(x), expected)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                near(optimized(x), expected)
                near(optimized(x[:2]), expected[:2])
            del optimized
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_memory_does_not_grow_on_cuda():
    """Once each shape was captured; and the pool of many batch sizes is that of the largest and a little more."""
    optimized = effnet_fast.optimize_for_inference(small().cuda(), torch.bfloat16)
    shapes = [(number, 3, 96, 96) for number in (64, 48, 32, 16, 8, 1)]
    optimized.warmup(shapes[:1])
    one = optimized.memory()
    optimized.warmup(shapes)
    memory = optimized.memory()
    assert memory.graphs - memory.static < 1.5 * one.graphs
    batches = [torch.randn(shape, device="cuda") for shape in shapes]
    for x in batches:
        optimized(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(20):
        for x in batches:
            optimized(x)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert optimized.memory() == memory


@pytest.mark.gpu
def test_streams_wait_for_each_other_on_cuda():
    """For the images that the caller's stream still makes, and for the graph's turn on another stream."""
    net = small().cuda()
    optimized = effnet_fast.optimize_for_inference(net)
    optimized.warmup([(4, 3, 64, 64)])
    streams = [torch.cuda.Stream() for _ in range(3)]
    sources = [torch.randn(4, 3, 64, 64, device="cuda") for _ in range(30)]
    expected = [net(x + 1) for x in sources]
    torch.cuda.synchronize()
    answers = []
    for i, source in enumerate(sources):
        with torch.cuda.stream(streams[i % 3]):
            torch.cuda._sleep(100_000)  # cycles, while which the images are not there yet
            answers.append(optimized(source + 1))
    torch.cuda.synchronize()
    near(answers, expected)


@pytest.mark.gpu
def test_inside_the_callers_own_graph_on_cuda():
    net = small().cuda()
    optimized = effnet_fast.optimize_for_inference(net)
    x, other = (torch.randn(2, 3, 64, 64, device="cuda") for _ in range(2))
    optimized(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = optimized(x)
    x.copy_(other)
    graph.replay()
    near(out, net(other))


@pytest.mark.gpu
def test_inference_mode_does_not_outlive_the_call_on_cuda():
    net = small().cuda()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        inside = optimized(x)
    near(optimized(x), net(x))
    near(inside, net(x))


@pytest.mark.gpu
def test_an_optimized_copy_on_cuda():
    """Its graphs are told; a copy of it, and one that went to the CPU and back, make their own; others' images are refused."""
    net = small().cuda()
    optimized, x = effnet_fast.optimize_for_inference(net), images(2, (64, 64)).cuda()
    expected = net(x)
    near(optimized(x), expected)
    assert "2x3x64x64 NCHW torch.float32: a CUDA graph" in str(optimized) and optimized.memory().graphs > 0
    ran = {(choice.op, choice.backend) for row in effnet_fast.explain(optimized, x) for choice in row.ops}
    assert ran and ("depthwise_conv_bn_act", "reference") not in ran
    with pytest.raises(ValueError, match="x is on cpu and the weights on cuda:0"):
        optimized(x.cpu())
    near(optimized.cpu()(x.cpu()), expected.cpu())
    assert optimized.memory().graphs == 0
    with pytest.raises(ValueError, match="x is on cuda:0 and the weights on cpu"):
        optimized(x)
    near(optimized.cuda()(x), expected)
