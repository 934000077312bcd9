"""What sees the model as a graph: torch.compile, torch.export, both ONNX exporters, jit.trace, fx, torch.func."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import fx

import effnet_fast
from effnet_fast.benchmark import calibrate, images
from effnet_fast.inference import optimize_for_inference
from effnet_fast.models import EfficientNet, create_model, efficientnet
from effnet_fast.nn import MBConv
from effnet_fast.scaling.config import BaseNet, StageConfig

X, OTHER = (2, 3, 48, 40), (3, 3, 65, 51)


def small(padding: str = "", **arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return calibrate(efficientnet(depth=0.1, width=0.25, num_classes=10, pad_type=padding, **arguments), (48, 40))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def dynamic():
    batch, height, width = (
        torch.export.Dim(name, min=low, max=high) for name, low, high in (("b", 1, 64), ("h", 33, 512), ("w", 33, 512))
    )
    return {"x": {0: batch, 2: height, 3: width}}


@pytest.mark.parametrize("padding", ["", "same"])
def test_trace_and_fx_with_other_sizes(padding):
    model, other = small(padding), images(*_split(OTHER))
    with torch.no_grad():
        want = model(other)
        torch.testing.assert_close(torch.jit.trace(model, images(*_split(X)))(other), want)
        torch.testing.assert_close(fx.symbolic_trace(model)(other), want)
    training = fx.symbolic_trace(copy.deepcopy(model).train())
    assert training(other).requires_grad


def _split(shape):
    return shape[0], shape[2:]


@pytest.mark.parametrize("padding", ["", "same"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_is_plain_aten_and_dynamic(padding, strict):
    model, other = small(padding), images(*_split(OTHER))
    program = torch.export.export(model, (images(*_split(X)),), dynamic_shapes=dynamic(), strict=strict)
    assert not any("effnet_fast" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(other), model(other))


def test_a_frozen_copy_is_traced_and_exported_as_its_net_is():
    model, other = small(), images(*_split(OTHER))
    frozen = optimize_for_inference(model)
    with torch.no_grad():
        want = model(other)
        torch.testing.assert_close(torch.jit.trace(frozen, images(*_split(X)))(other), want)
        torch.testing.assert_close(torch.func.vmap(lambda image: frozen(image[None])[0])(other), want)
        for strict in (False, True):
            program = torch.export.export(frozen, (images(*_split(X)),), dynamic_shapes=(dynamic()["x"],), strict=strict)
            assert not any("effnet_fast" in str(node.target) for node in program.graph.nodes)
            torch.testing.assert_close(program.module()(other), want)
    torch.testing.assert_close(frozen(other), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0"])
def test_export_of_a_whole_net(name):
    model = calibrate(create_model(name))
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 64),), dynamic_shapes={"x": {0: torch.export.Dim("b", min=1, max=64)}}
    )
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("padding", ["", "same"])
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_onnx(padding, exporter, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path, x = small(padding), str(tmp_path / "net.onnx"), images(*_split(X))
    if exporter == "dynamo":
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=dynamic(), verbose=False)
    else:
        axes = {"x": {0: "b", 2: "h", 3: "w"}}
        torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session, other = onnxruntime.InferenceSession(path), images(*_split(OTHER))
    (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(other).detach(), rtol=1e-4, atol=1e-4)


def captured(model, x):
    """The graph that torch.compile(fullgraph=True) hands to a backend, and its result."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    out = torch.compile(model, fullgraph=True, backend=backend)(x)
    assert len(graphs) == 1
    return graphs[0], out


@pytest.mark.parametrize("padding", ["", "same"])
def test_compile_sees_one_graph(padding):
    """Kernels are ops of the graph; the reference is plain PyTorch in it, which a compiler can fuse."""
    model, x = small(padding), images(*_split(X))
    with torch.no_grad():
        graph, out = captured(model, x)
        rows = effnet_fast.explain(model, x)
        torch.testing.assert_close(out, model(x))
    calls = [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("effnet_fast.")]
    kernels = [choice for row in rows for choice in row.ops if choice.backend != "reference"]
    assert len(calls) == len(kernels) and not any(call.endswith(".reference") for call in calls)
    assert sum(len(row.ops) for row in rows) > 20


def tiny(padding: str) -> torch.nn.Module:
    """A block of each kind: dynamic shapes make the compiler slow in proportion to depth."""
    stages = (
        StageConfig("mbconv", 3, 1, 1, 8, 1, 0.25),
        StageConfig("fused_mbconv", 3, 2, 4, 16, 1),
        StageConfig("mbconv", 5, 2, 6, 16, 2, 0.25),
    )
    config = BaseNet("tiny", stages, stem_channels=8, head_channels=32, resolution=64).scaled(padding=padding)
    return EfficientNet(replace(config, drop_path=0.0, dropout=0.0, num_classes=5)).eval()


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_compile_trains_and_infers_at_dynamic_sizes(padding):
    torch.manual_seed(0)
    model = tiny(padding)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in (X, OTHER):
        x = images(*_split(shape))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        grads = []
        for net in (compiled, model):
            model.zero_grad()
            net(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(*grads)


def test_compile_in_training_mode():
    model, x = small().train(), images(*_split(X))
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compile_of_whole_nets_is_one_graph():
    for name in ("efficientnet_b0", "efficientnetv2_s"):
        torch.compiler.reset()
        model, x = calibrate(create_model(name)), images(1, (64, 64))
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_inductor_on_a_block():
    torch.manual_seed(0)
    block = next(b for b in create_model("efficientnet_b0").modules() if isinstance(b, MBConv) and b.residual).eval()
    x = torch.randn(2, block.conv_pw.in_channels, 14, 14).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


def test_compile_with_autocast_and_a_request():
    model, x = small(), images(*_split(X))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), effnet_fast.backend("reference", strict=True):
        graph, out = captured(model, x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, model(x))
    assert not any("effnet_fast" in str(node.target) for node in graph.graph.nodes)


def test_torch_func():
    model, x = small(drop_path_rate=0.0), images(*_split(X))
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(torch.func.vmap(lambda image: model(image[None])[0])(x), want)
    parameters = dict(model.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    torch.testing.assert_close(grads, {name: p.grad for name, p in parameters.items()})


def test_deepcopy_and_state_dict_round_trip(tmp_path):
    model, x = small(), images(*_split(X))
    torch.save(model, tmp_path / "net.pt")
    with torch.no_grad():
        for net in (copy.deepcopy(model), torch.load(tmp_path / "net.pt", weights_only=False)):
            torch.testing.assert_close(net(x), model(x))
