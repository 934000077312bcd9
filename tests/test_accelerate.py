"""accelerate and restore: peers' nets keep their numbers, their identity and every tool that worked on them."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from peers import BLOCKS, NETS, ONE_EACH, block_and_input, lukemelas, net, outcome, timm, torchvision
from tolerance import assert_2x, assert_2x_of_all, largest
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import effnet_fast
from effnet_fast.benchmark import images
from effnet_fast.interop import accelerate, restore
from effnet_fast.nn.fused import FusedBlock


def accelerated(name: str) -> nn.Module:
    model = net(name)
    accelerate(model)
    return model


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedBlock)}


@pytest.mark.parametrize("size", [(64, 64), (65, 97)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_logits(name, size):
    model, x = net(name), images(2, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ref64, plain = copy.deepcopy(model).double()(x.double()), model(x)
        report = accelerate(model, check=x)
        out = model(x)
    assert_2x(out, plain, ref64, name)
    assert len(report.taken) == NETS[name][1] == len(blocks(model)) and not report.skipped
    assert report.difference == (out.double() - plain.double()).abs().max()
    assert outcome(model, x)[1], "nothing was fused"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_gradients_and_statistics(name, train):
    def step(model, x):
        model.train(train)
        model(x).square().mean().backward()
        return {key: p.grad for key, p in model.named_parameters()} | dict(model.named_buffers())

    plain, fused, x = net(name), accelerated(name), images(4, (65, 64))
    ref64 = step(copy.deepcopy(plain).double(), x.double())
    expected, got = step(plain, x), step(fused, x)
    whole = [key for key, value in got.items() if not value.is_floating_point()]
    assert all(torch.equal(got.pop(key), expected.pop(key)) and ref64.pop(key) is not None for key in whole)
    assert_2x_of_all(got, expected, ref64, name)


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half(name, how):
    plain, fused, x = net(name), accelerated(name), images(2, (64, 65))
    if how == "bfloat16":
        plain, fused, x = plain.bfloat16(), fused.bfloat16(), x.bfloat16()
    with torch.no_grad():
        ref64 = copy.deepcopy(plain).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            assert_2x(fused(x), plain(x), ref64, name)


def test_stochastic_depth_draws_as_before():
    torch.manual_seed(0)
    for model in (
        timm.create_model("efficientnet_b0", drop_path_rate=0.5, num_classes=3),
        torchvision.models.efficientnet_b0(stochastic_depth_prob=0.5, num_classes=3),
        lukemelas("efficientnet-b0", drop_connect_rate=0.5, num_classes=3),
    ):
        plain, x = copy.deepcopy(model).train(), images(2, (33, 32))
        accelerate(model.train())
        for module in (*plain.modules(), *model.modules()):  # frozen statistics: only the drop is random now
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        with torch.no_grad(), effnet_fast.backend("native"):
            torch.manual_seed(7)
            expected = plain(x)
            torch.manual_seed(7)
            assert largest(model(x) - expected) <= 1e-3 * largest(expected)


@pytest.mark.parametrize("name", NETS)
def test_identity_and_restore(name):
    model = net(name)
    own = dict(model.named_modules())
    before = {key: (module, type(module), module.training, repr(module)) for key, module in own.items()}
    state, parameters = model.state_dict(), list(model.named_parameters())
    accelerate(model)
    assert dict(model.named_modules()) == own and list(model.named_parameters()) == parameters
    assert [(k, v.data_ptr()) for k, v in model.state_dict().items()] == [(k, v.data_ptr()) for k, v in state.items()]
    for key, (module, cls, training, text) in before.items():
        assert isinstance(module, cls) and module.training == training and repr(module) == text, key
        got = type(module)
        assert (got.__name__, got.__qualname__, got.__module__) == (cls.__name__, cls.__qualname__, cls.__module__)
        assert "forward" not in module.__dict__
    assert blocks(model)
    restore(model)
    restore(model)  # again: harmless
    assert all(type(module) is cls for module, cls, _, _ in before.values())
    assert not outcome(model, images(1, (32, 32)))[1]


@pytest.mark.parametrize("name", ONE_EACH)
def test_copies_are_accelerated_and_independent(name):
    model, x = accelerated(name), images(1, (64, 64))
    with torch.no_grad():
        expected = model(x)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        ema.update_parameters(model)
        for other in (
            copy.deepcopy(model),
            copy.copy(model),
            *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, 5)),
            torch.load(stream, weights_only=False),
            ema.module,
        ):
            assert torch.equal(other(x), expected) and outcome(other, x)[1]
            assert {type(a) for a in blocks(other).values()} == {type(b) for b in blocks(model).values()}
        other = copy.deepcopy(model)
        restore(other)
        assert blocks(model) and not blocks(other)


def test_a_saved_model_loads_in_a_fresh_process(tmp_path):
    x = images(1, (32, 32))
    for number, name in enumerate(ONE_EACH):
        model = accelerated(name)
        with torch.no_grad():
            torch.save({"model": model, "x": x, "out": model(x)}, tmp_path / f"{number}.pt")
    code = (
        "import sys, torch\n"
        "import effnet_fast.interop\n"
        "assert not {'timm', 'torchvision', 'efficientnet_pytorch'} & set(sys.modules), 'a peer was imported'\n"
        "for path in sys.argv[1:]:\n"
        "    saved = torch.load(path, weights_only=False)\n"
        "    with torch.no_grad(), effnet_fast.ops.backends.tracing() as trace:\n"
        "        out = saved['model'](saved['x'])\n"
        "    assert torch.allclose(out, saved['out'], atol=1e-4) and len(trace) >= 50, len(trace)\n"
        "    print('loaded')\n"
    )
    paths = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.stdout.split() == ["loaded"] * 3, done.stderr


def test_restore_refuses_what_another_tool_made():
    model = accelerated("timm b0")
    block = model.blocks[1][0]
    before = {name: type(module) for name, module in model.named_modules()}
    accelerated_class = type(block)
    block.__class__ = type("Sharded", (accelerated_class,), {})
    with pytest.raises(ValueError, match=r"restore: another tool has made block 'blocks\.1\.0' a Sharded"):
        restore(model)
    block.__class__ = accelerated_class
    assert {name: type(module) for name, module in model.named_modules()} == before
    restore(model)
    assert not blocks(model)


def test_ops_of_a_whole_net():
    """MBConv1 takes three ops and each MBConv6 four: 63 for B0's sixteen blocks."""
    _, ops, reasons = outcome(accelerated("timm b0"), images(1, (64, 64)))
    assert len(ops) == 63 and not reasons


def test_compiles_in_one_graph():
    model, x = accelerated("timm b0"), images(2, (65, 64))
    with torch.no_grad():
        expected = model(x)
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert largest(out - expected) <= 1e-5 * largest(expected)


@pytest.mark.parametrize(
    "kind",
    ["timm InvertedResidual same", "timm EdgeResidual", "torchvision MBConv", "torchvision FusedMBConv", "lukemelas MBConvBlock"],
)
def test_blocks_compile_in_one_graph(kind):
    """Inductor for one, aot_eager for the rest, and there with gradients too, where the block's own forward is compiled."""
    torch._dynamo.reset()
    block, x = block_and_input(kind)
    accelerate(block)
    inductor = kind == "torchvision MBConv"
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if inductor else "aot_eager")
    with torch.no_grad():
        expected = block(x)
        assert largest(compiled(x) - expected) <= 1e-5 * largest(expected)
    if not inductor:
        assert largest(compiled(x).detach() - expected) <= 1e-5 * largest(expected)


def test_distributed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = images(2, (33, 32))
        for name in ONE_EACH:
            alone, parallel = accelerated(name).train(), accelerated(name).train()
            alone(x).square().mean().backward()
            DistributedDataParallel(parallel)(x).square().mean().backward()
            for (key, p), q in zip(parallel.named_parameters(), alone.parameters(), strict=True):
                assert p.grad is not None and torch.equal(p.grad, q.grad), f"{name} {key}"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["accelerate, convert", "convert, accelerate"])
@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("timm b0", timm.layers.convert_sync_batchnorm),
        ("timm b0", nn.SyncBatchNorm.convert_sync_batchnorm),  # drops timm's activations: so do the fused blocks then
        ("torchvision b0", nn.SyncBatchNorm.convert_sync_batchnorm),
        ("lukemelas b0", nn.SyncBatchNorm.convert_sync_batchnorm),
    ],
)
def test_synchronised_norms(name, convert, order):
    plain, x = convert(net(name)), images(2, (64, 64))
    model = net(name)
    for step in order.split(", "):
        model = convert(model) if step == "convert" else accelerate(model).model
    out, ops, reasons = outcome(model, x)
    with torch.no_grad():
        assert_2x(out, plain(x), plain.double()(x.double()), name)
    assert len(ops) == 63 and not reasons


@pytest.mark.parametrize("kind", BLOCKS)
def test_tracers_see_plain_operators(kind):
    block, x = block_and_input(kind)
    plain = copy.deepcopy(block)
    accelerate(block)
    with torch.no_grad():
        expected = plain(x)
        traced = torch.jit.trace(block, x)
        assert "effnet_fast" not in str(traced.inlined_graph) and torch.equal(traced(x), expected)
        if kind.startswith("lukemelas"):  # its activation is an autograd function, which export takes in another mode only
            block._swish = nn.SiLU()
        program = torch.export.export(block, (x,))
        assert "effnet_fast" not in str(program.graph)
        assert largest(program.module()(x) - expected) <= 1e-5 * largest(expected)


def test_feature_extractors_by_fx():
    x = images(1, (64, 64))
    for name, tools, node in (
        ("timm b0", timm.layers, "blocks.3.1.conv_pw"),
        ("torchvision b0", torchvision.models.feature_extraction, "features.4.1.block.0"),
    ):
        plain, fused = net(name), accelerated(name)
        assert tools.get_graph_node_names(fused) == tools.get_graph_node_names(plain)
        expected, got = (tools.create_feature_extractor(model, {node: "out"})(x)["out"] for model in (plain, fused))
        assert torch.equal(got, expected)


def test_report():
    model = timm.create_model("efficientnet_b0", num_classes=2).eval()
    model.blocks[1][0].bn1.act = nn.GELU()
    model.blocks[2][1].bn1.act = nn.GELU()
    report = accelerate(model, check=images(1, (32, 32)))
    lines = str(report).splitlines()
    assert lines[0] == "EfficientNet: 14 of 16 blocks are fused"
    assert lines[1].startswith("  blocks.1.0, blocks.2.1: an activation is GELU")
    assert lines[2].startswith("  largest difference of the outputs: ") and repr(report) == str(report)
    assert report.model is model and list(report.skipped) == ["blocks.1.0", "blocks.2.1"]
    again = accelerate(model)
    assert (again.taken, again.skipped, again.difference) == (report.taken, report.skipped, None)


def test_check_takes_structures_and_keeps_modes():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net("timm b0")

        def forward(self, x):
            y = self.net.forward_features(x)
            return {"features": [y, (y.mean(), None)], "name": "pyramid"}

    model = Pyramid().train()
    model.net.bn1.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    report = accelerate(model, check=images(1, (33, 32)))
    assert 0 < report.difference < 1e-4
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("failing_call", [1, 2], ids=["before", "after"])
def test_a_failing_check_leaves_the_model_as_it_was(failing_call):
    model = net("timm b0")
    classes = [type(module) for module in model.modules()]
    calls = iter(range(1, 3))

    def fail(*_):
        if next(calls) == failing_call:
            raise ArithmeticError("failed")

    model.classifier.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="failed"):
        accelerate(model, check=images(1, (32, 32)))
    assert [type(module) for module in model.modules()] == classes


class NoTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net("timm b0")

    def forward(self, x):
        return "no tensor"


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), ValueError, "accelerate: no block of Linear can be fused:\n  it has no block of timm, torch"),
        (lambda: timm.create_model("resnet10t"), ValueError, "it has no block"),
        (lambda: "efficientnet_b0", TypeError, "accelerate: model is a str; a torch.nn.Module would do"),
        (lambda: torch.compile(net("timm b0")), TypeError, "accelerate: model is compiled; accelerating before torch.compile"),
        (lambda: nn.Sequential(torch.compile(nn.Linear(2, 2))), TypeError, "accelerate: model.0 is compiled"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), TypeError, "accelerate: model is a ScriptModule; the model that it was"),
        (NoTensor, TypeError, "accelerate: check needs a model that returns a tensor"),
    ],
)
def test_refused_models(model, error, message):
    with pytest.raises(error, match=message):
        accelerate(model(), check=images(1, (32, 32)))


def test_scripting_asks_for_restore():
    model = accelerated("timm lite0")
    with pytest.raises(TypeError, match=r"torch.jit.script cannot .* effnet_fast.restore\(model\) first"):
        torch.jit.script(model)
    restore(model)
    torch.jit.script(model.blocks[1][0])


def test_public_names():
    assert effnet_fast.accelerate is accelerate and effnet_fast.restore is restore
