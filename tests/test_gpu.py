"""On an NVIDIA GPU: the native gate, whole nets and accelerated peers, which backend runs what, and the launches that the profiler
sees. What can be, runs on the CPU too, by the same code.

    python -m pytest tests -m gpu                      all that needs a GPU, here and in the other files

and under the sanitizers of CUDA, which see what tests/emulator sees on the CPU, with the GPU's own order of threads:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest tests -m gpu -k "gate or views"
    compute-sanitizer --tool racecheck python -m pytest tests -m gpu -k "gate or views"     (so too synccheck, initcheck)
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import cases
import pytest
import torch
from plain import DTYPES, misaligned, wide
from test_native import gate_arguments as on_cpu
from test_ops import OF_INFERENCE
from tolerance import assert_2x
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import effnet_fast
from effnet_fast import ops
from effnet_fast.benchmark import calibrate, images
from effnet_fast.models import create_model
from effnet_fast.ops import backends, gpu, native, squeeze_excite, triton_backend

GATE = torch.ops.effnet_fast.squeeze_excite_gate
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Of nets; the pool is the plans' of optimize_for_inference.
OPS_OF_BLOCKS = sorted(set(OF_INFERENCE) - {"expand_depthwise_conv_bn_act", "global_average_pool"})


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """With fp32 products as fp32."""
    wanted, before = torch.device(request.param), torch.backends.cudnn.conv.fp32_precision
    reason = native.REASON or (native.why_no_cuda(wanted) if wanted.type == "cuda" else None)
    if reason is not None:
        pytest.skip(reason)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield wanted
    torch.backends.cudnn.conv.fp32_precision = before


def gate_arguments(shape, dtype, device, bias=True, activation="silu", seed=0):
    return [a.to(device) if torch.is_tensor(a) else a for a in on_cpu(*shape, dtype, bias, activation, seed)]


# images, pieces, channels, reduced: few images and many, one slice of the channels and eight, B0's and B7's largest, odd ones.
GATES = [
    (1, 1, 32, 8),
    (1, 196, 32, 8),
    (1, 4, 1152, 48),
    (1, 2, 3840, 160),
    (16, 3, 672, 28),
    (128, 2, 96, 4),
    (130, 1, 1152, 48),
    (70, 1, 3840, 160),
    (2, 3, 37, 5),
    (300, 2, 41, 12),
    (5, 2, 641, 39),
    (1, 1, 20, 1000),
]


def check_gate(shape, dtype, device, bias=True, activation="silu"):
    """Over four draws and 4096 gates at once, or more: the largest error of a few numbers is luck."""
    results = []
    for seed in range(0, 1000 * max(4, -(-4096 // (shape[0] * shape[2]))), 1000):
        arguments = gate_arguments(shape, dtype, device, bias, activation, seed)
        with ops.backend("native", strict=True):
            out = ops.squeeze_excite_gate(*arguments[:-1], activation=activation)
        assert torch.equal(out, GATE.native(*arguments)), "the order of blocks changes the result"
        results.append((out, GATE.reference(*arguments), GATE.reference(*wide(arguments))))
    assert_2x(*(torch.cat(same) for same in zip(*results, strict=True)), f"{shape} {activation}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GATES, ids=str)
def test_gate(shape, dtype, device):
    if device.type == "cpu" and shape[1] > 16:
        pytest.skip("on the CPU depthwise makes 16 pieces at most, and the gate adds them up one by one")
    for bias, activation in ((True, "silu"), (False, "relu"), (True, "identity")):
        check_gate(shape, dtype, device, bias, activation)


@pytest.mark.parametrize(("images", "dtype"), [(1, torch.float32), (16, torch.bfloat16)], ids=str)
def test_gates_of_the_family(images, dtype, device):
    for channels, reduced in cases.gate_shapes():
        check_gate((images, 2, channels, reduced), dtype, device)


@pytest.mark.parametrize("shape", [(1, 2, 1152, 48), (33, 2, 672, 28)], ids=str)
def test_gate_of_misaligned_tensors(shape, device):
    arguments = gate_arguments(shape, torch.bfloat16, device)
    moved = [misaligned(a) if torch.is_tensor(a) else a for a in arguments]
    assert_2x(GATE.native(*moved), GATE.reference(*arguments), GATE.reference(*wide(arguments)))


def test_gate_out_allocates_nothing(device):
    arguments = gate_arguments((3, 2, 1152, 48), torch.float32, device)
    expected, gate = GATE.native(*arguments), torch.full((3, 1152), float("nan"), device=device)
    before = torch.cuda.memory_stats().get("allocation.all.allocated") if device.type == "cuda" else None
    GATE.native_out(*arguments, gate=gate)
    after = torch.cuda.memory_stats().get("allocation.all.allocated") if device.type == "cuda" else None
    assert before == after and torch.equal(gate, expected)


def test_large_gates_are_the_references():
    """Said before any kernel starts, for a GPU; nothing is refused on the CPU."""
    on_gpu, on_cpu = (SimpleNamespace(is_cuda=is_cuda) for is_cuda in (True, False))
    cases = (
        (3840, 160, set()),
        (20952, 1024, set()),
        (20953, 1024, {"native"}),
        (8, 1025, {"triton"}),
        (20951, 1025, {"native", "triton"}),
    )
    for channels, reduced, refused in cases:
        weight = torch.empty(reduced, channels, 1, 1, device="meta")
        assert set(squeeze_excite._unsupported(on_gpu, weight) or ()) == refused
        assert squeeze_excite._unsupported(on_cpu, weight) is None


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, nn.Module]:
    """B0 of ours and of timm, which is pure PyTorch, with the same weights."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    ours, theirs = calibrate(create_model("efficientnet_b0"), (96, 96)), timm.create_model("efficientnet_b0").eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def compare(fused, plain, x, dtype, how, what):
    """Fused against plain in ``dtype``, all of it (how "cast") or by autocast; both nets are on x's device."""
    if how == "cast":
        fused, plain, x = copy.deepcopy(fused).to(dtype), copy.deepcopy(plain).to(dtype), x.to(dtype)
    with torch.no_grad():
        ref64 = copy.deepcopy(plain).double()(x.double())
        with torch.autocast(x.device.type, dtype, enabled=how == "autocast"):
            with backends.tracing() as trace:
                out = fused(x)
            assert any(isinstance(choice, backends.Choice) for choice in trace), "nothing was fused"
            assert_2x(out, plain(x), ref64, what)


WAYS = [
    (torch.float32, "cast"),
    (torch.bfloat16, "cast"),
    (torch.float16, "cast"),
    (torch.bfloat16, "autocast"),
    (torch.float16, "autocast"),
]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("dtype", "how"), WAYS, ids=str)
def test_net(dtype, how, batch, device, nets):
    ours, theirs = (copy.deepcopy(net).to(device) for net in nets)
    x = images(batch, (96, 96)).to(device, memory_format=torch.channels_last)
    compare(ours, theirs, x, dtype, how, "B0")


@pytest.mark.parametrize(("dtype", "how"), WAYS, ids=str)
@pytest.mark.parametrize("name", ["timm b0", "torchvision b0"])
def test_accelerated_peer(name, dtype, how, device):
    peers = pytest.importorskip("peers")
    plain = peers.net(name).to(device)
    fused = copy.deepcopy(plain)
    assert not effnet_fast.accelerate(fused).skipped
    x = images(2, (64, 64)).to(device, memory_format=torch.channels_last)
    compare(fused, plain, x, dtype, how, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_of_a_net(dtype, device, nets):
    if device.type == "cuda":
        if (reason := triton_backend.can_run(torch.empty(1, device=device))) is not None:
            pytest.skip(reason)
        # Of one image the native pointwise kernel takes gated maps alone, and those of many pixels.
        runs = {("depthwise_conv_bn_act", "native"), ("squeeze_excite_gate", "native"), ("pointwise_conv_bn_act", "triton")}
        halves = {("conv_bn_act", "native"), ("pointwise_conv_bn_act", "native")}
        runs |= {("conv_bn_act", "triton")} if dtype == torch.float32 else halves
    else:
        x = torch.empty(1, dtype=dtype)  # of each op the best that takes it; sums are fp32 whatever x is
        chosen = {op: x if op != "squeeze_excite_gate" else x.float() for op in OPS_OF_BLOCKS}
        runs = {(op, next(k.backend for k in backends.kernels(op) if k.can_run(given) is None)) for op, given in chosen.items()}
        assert dtype != torch.float32 or {backend for _, backend in runs} == {"native"}
    model = copy.deepcopy(nets[0]).to(device, dtype)
    rows = effnet_fast.explain(model, images(1, (96, 96)).to(device, dtype))
    assert all(row.plain is None for row in rows)
    assert {(choice.op, choice.backend) for row in rows for choice in row.ops} == runs


class Calls(TorchDispatchMode):
    """Counts the operators that compute: what would be a launch on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(function, device: torch.device) -> list[str]:
    """Of one call, after another that compiles: the GPU's activities by the profiler, or on the CPU the operators."""
    torch.use_deterministic_algorithms(False)  # to fill fresh memory with NaN is a launch too
    with torch.no_grad():
        function()
        if device.type == "cpu":
            with Calls() as calls:
                function()
            return ["an operator"] * calls.count
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return [event.name for event in on_gpu]


def skip_on_cpu_unless_native(dtype, device) -> None:
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("on the CPU some ops in half precision are oneDNN's, of several operators")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 16])
def test_launches_of_b0(batch, dtype, device, nets):
    skip_on_cpu_unless_native(dtype, device)
    model = copy.deepcopy(nets[0]).to(device, dtype)
    x = images(batch, (224, 224) if device.type == "cuda" else (64, 64)).to(device, dtype, memory_format=torch.channels_last)
    seen = launches(lambda: model(x), device)
    assert 65 <= len(seen) <= 70, seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", ["timm b0", "torchvision b0"])
def test_launches_of_a_peers_blocks(name, batch, dtype, device):
    skip_on_cpu_unless_native(dtype, device)
    model = pytest.importorskip("peers").net(name).to(device, dtype)
    effnet_fast.accelerate(model)
    side = 112 if device.type == "cuda" else 32
    x = images(batch, (side, side), 32).to(device, dtype, memory_format=torch.channels_last)
    blocks = model.blocks if name.startswith("timm") else model.features[1:-1]
    seen = launches(lambda: blocks(x), device)
    assert len(seen) == 63, seen


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 16])
def test_a_net_in_a_cuda_graph(batch, nets):
    model = copy.deepcopy(nets[0]).to("cuda", torch.bfloat16)
    first, second = (images(batch, (96, 96), seed=seed).to("cuda", torch.bfloat16) for seed in (1, 2))
    with torch.no_grad():
        expected, x = model(second), first.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for _ in range(3):
            x.copy_(second)
            graph.replay()
            assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("architecture", "runs"),
    [
        ("sm_80", {(8, 0), (8, 6), (8, 9)}),
        ("sm_86", {(8, 6), (8, 9)}),
        ("sm_90", {(9, 0)}),
        ("sm_90a", {(9, 0)}),
        ("sm_100", {(10, 0), (10, 3)}),
        ("sm_100a", {(10, 0)}),
        ("sm_100f", {(10, 0), (10, 3)}),
        ("compute_80", {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)}),
        ("compute_90a", {(9, 0)}),
        ("compute_100", {(10, 0), (10, 3), (12, 0)}),
        ("", set()),
    ],
)
def test_architectures(architecture, runs):
    known = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)}
    assert {capability for capability in known if gpu.runs_on(architecture, capability)} == runs


def test_a_gpu_that_the_kernels_are_not_for_is_refused(monkeypatch):
    monkeypatch.setattr(native, "REASON", None)
    monkeypatch.setattr(native, "CUDA_KERNELS", True)
    monkeypatch.setattr(native, "CUDA_ARCHITECTURES", "sm_90,compute_100")
    monkeypatch.setattr(triton_backend, "REASON", None)
    monkeypatch.setattr(triton_backend, "_DEVICE", "cuda")
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    expected = {
        (9, 0): ({None}, {None}),
        (8, 0): ({"the compiled module has CUDA kernels for sm_90,compute_100; this GPU is sm_80"}, {None}),
        (7, 5): (
            {"the compiled module has CUDA kernels for sm_90,compute_100; this GPU is sm_75"},
            {"this GPU is sm_75; the Triton kernels need sm_80"},
        ),
    }
    for capability, reasons in expected.items():
        monkeypatch.setattr(gpu, "_capability", lambda index, of=capability: of)
        table = backends.reasons("cuda")
        on_gpu = {table["native"][op] for op in ("depthwise_conv_bn_act", "squeeze_excite_gate")}
        assert (on_gpu, {table["triton"][op] for op in OPS_OF_BLOCKS}) == reasons


@pytest.mark.gpu
def test_the_module_is_for_this_gpu():
    if native.REASON is not None or not native.CUDA_KERNELS:
        pytest.skip(native.REASON or "the compiled module was built without CUDA kernels")
    assert native.why_no_cuda(torch.device("cuda")) is None
