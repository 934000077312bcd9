"""What the frozen copy is apart from its answers: copied, saved, moved, warmed up, explained and measured; and what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_graphs import StandIn
from test_inference import PEERS, planned, small
from torch import nn

import effnet_fast
from effnet_fast.inference import optimize
from effnet_fast.ops import native


@pytest.fixture
def optimized() -> optimize.InferenceModel:
    return effnet_fast.optimize_for_inference(small())


def saved(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
@pytest.mark.parametrize("name", ["ours", "timm b0"])
def test_a_copy_makes_its_own_plans(name, copied):
    optimized = effnet_fast.optimize_for_inference(small() if name == "ours" else PEERS[name]().eval(), torch.bfloat16)
    x = torch.randn(2, 3, 40, 40)
    before = optimized(x)
    other = copied(optimized)
    assert "0 plans" in str(other) and "1 plans" in str(optimized) and other.dtype == torch.bfloat16
    assert torch.equal(other(x), before)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert torch.equal(optimized(x), before)


def test_weights_that_are_loaded_are_used(optimized):
    x = torch.randn(2, 3, 40, 40)
    before = optimized(x)
    other = effnet_fast.optimize_for_inference(small(seed=1))
    optimized.load_state_dict(other.state_dict())
    assert not torch.allclose(before, other(x)) and torch.equal(optimized(x), other(x))


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
@pytest.mark.parametrize("part", ["frozen", "frozen.blocks", "frozen.classifier"])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_into_a_part_are_used(optimized, copied, part, assign):
    x, original = torch.randn(2, 3, 40, 40), optimized
    before = optimized(x)
    optimized = copied(optimized)
    optimized(x)
    net, other = nn.ModuleDict({"frozen": small()}), nn.ModuleDict({"frozen": small(seed=1)})
    for model in (optimized, net):
        model.get_submodule(part).load_state_dict(other.get_submodule(part).state_dict(), assign=assign)
    net = net["frozen"]
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)
    assert native.REASON is not None or "one native call" in str(optimized)
    assert optimized is original or torch.equal(original(x), before)


def test_weights_that_are_lent_are_used(optimized):
    x, other = torch.randn(2, 3, 40, 40), small(seed=1)
    before = optimized(x)
    lent = {f"frozen.{name}": value for name, value in other.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(torch.func.functional_call(optimized, lent, (x,)), other(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(optimized(x), before)


def test_modules_of_a_copy_know_of_it_only_to_tell_of_loads():
    """They are copied and kept without it, and it goes when nobody has it."""
    optimized, x = effnet_fast.optimize_for_inference(small()), torch.randn(1, 3, 40, 40)
    before = optimized(x)
    frozen = optimized.frozen
    assert len(pickle.dumps(frozen.classifier)) < 100_000
    again = effnet_fast.optimize_for_inference(pickle.loads(pickle.dumps(copy.deepcopy(frozen))))
    torch.testing.assert_close(again(x), before)
    shallow = copy.copy(optimized)
    optimized.frozen.load_state_dict(small(seed=1).state_dict())
    assert torch.equal(shallow(x), optimized(x)) and not torch.equal(shallow(x), before)
    gone = weakref.ref(again)
    gc.disable()
    try:
        del again
        assert gone() is None
    finally:
        gc.enable()


@planned
def test_a_call_that_is_interrupted_leaves_the_shape_to_the_next(optimized):
    class Interrupted:
        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *_):
            pass

    planning, optimized._planning = optimized._planning, Interrupted()
    x = torch.randn(1, 3, 40, 40)
    with pytest.raises(KeyboardInterrupt):
        optimized(x)
    optimized._planning = planning
    assert optimized(x).isfinite().all() and "one native call" in str(optimized)


@planned
def test_a_hook_may_call_the_copy():
    """While it is planned, on images of another shape."""
    optimized, x, seen = effnet_fast.optimize_for_inference(small()), torch.randn(1, 3, 40, 40), []

    def call(module, args):
        if args[0].shape[2:] == (40, 40):
            seen.append(optimized(torch.zeros(1, 3, 32, 32)))

    hook = optimized.frozen.register_forward_pre_hook(call)
    made = optimized(x)
    hook.remove()
    torch.testing.assert_close(made, small().eval()(x), rtol=1e-4, atol=1e-4)
    assert seen


@planned
def test_a_move_leaves_plans_behind(optimized):
    x = torch.randn(1, 3, 40, 40)
    before = optimized(x)
    assert optimized.memory().plans > 0
    assert optimized.to("cpu") is optimized and optimized.memory().plans == 0
    assert torch.equal(optimized(x), before)
    assert optimized.to("meta").device.type == "meta"
    with pytest.raises(ValueError, match="x is on cpu and the weights on meta; x.to\\('meta'\\) would do"):
        optimized(x)


@pytest.mark.parametrize("change", [nn.Module.half, lambda model: model.to(torch.bfloat16), nn.Module.double])
def test_another_dtype_is_refused(optimized, change):
    with pytest.raises(TypeError, match=r"computes in torch.float32 .*; optimize_for_inference\(model, torch\.\w+\) would do"):
        change(optimized)
    assert optimized.float()(torch.zeros(1, 3, 40, 40)).dtype == torch.float32


def test_images_elsewhere_are_refused(optimized):
    with pytest.raises(ValueError, match="x is on meta and the weights on cpu"):
        optimized(torch.zeros(1, 3, 40, 40, device="meta"))


def test_a_copy_says_of_itself_what_its_net_does(optimized):
    features = effnet_fast.optimize_for_inference(PEERS["timm b0 features"]().eval())
    assert features.feature_info.channels() == features.frozen.feature_info.channels()
    assert optimized.num_classes == 10 and optimized.default_cfg == optimized.frozen.default_cfg
    assert pickle.loads(pickle.dumps(optimized)).num_classes == 10
    for name in ("forward_features", "blocks", "_modules_of_none", "no_such_thing"):
        with pytest.raises(AttributeError, match=f"'InferenceModel' object has no attribute '{name}'"):
            getattr(optimized, name)


def test_a_gradient_is_refused_where_it_would_be_lost(optimized):
    x = torch.randn(1, 3, 40, 40, requires_grad=True)
    with pytest.raises(ValueError, match="asks for a gradient.*x.detach"):
        optimized(x)
    with torch.no_grad():
        assert torch.equal(optimized(x), optimized(x.detach()))


def test_images_over_memory_are_refused(optimized):
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        optimized(torch.zeros(1, 3, 1, 1).expand(1, 3, 1_000_000, 1_000_000))
    assert optimized(torch.zeros(1, 3, 40, 40)).shape == (1, 10)


def test_inference_mode_does_not_outlive_the_call(optimized):
    x = torch.randn(1, 3, 40, 40)
    with torch.inference_mode():
        inside = optimized(x)
    assert not inside.is_inference() and torch.equal(optimized(x), inside)


@planned
def test_warm_up_makes_the_plans(optimized):
    optimized.warmup([(1, 3, 40, 40), (4, 3, 32, 48)])
    optimized.warmup([(2, 3, 64, 64)], torch.bfloat16, torch.channels_last)
    told = str(optimized)
    assert "3 plans" in told and all(
        f"{shape} of torch.float32: one native call" in told for shape in ("3x40x40", "3x32x48", "3x64x64")
    )
    optimized.warmup((1, 3, 40, 40))
    optimized(torch.randn(3, 3, 40, 40))
    optimized(torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert "3 plans" in str(optimized)


@planned
@pytest.mark.parametrize("images", [1, 7])
def test_a_call_allocates_its_result_and_nothing_else(optimized, images):
    x = torch.randn(images, 3, 40, 40)
    optimized(x)
    before = optimized.memory()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = optimized(x)
    told = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert told == [result.nbytes] and optimized.memory() == before


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ([(1, 3, 40, 40), (3, 40, 40)], r"a shape is \(3, 40, 40\); four numbers > 0"),
        ([(1, 3, 40, 40), (0, 3, 40, 40)], r"a shape is \(0, 3, 40, 40\)"),
        ([(1, 3, 40, 40), (1, 3, 40, 40.0)], r"a shape is \(1, 3, 40, 40.0\)"),
        ([(1, 4, 40, 40)], r"the network does not take \(1, 4, 40, 40\): "),
        ([(1, 3, 1_000_000, 1_000_000)], r"does not take \(1, 3, 1000000, 1000000\): .*can't allocate"),
        ([(1, 3, 32, size) for size in range(32, 289)], "there are 257 shapes; 256"),
    ],
)
def test_bad_shapes_to_warm_up_for_are_named(optimized, shapes, says):
    with pytest.raises(ValueError, match=says):
        optimized.warmup(shapes)
    assert "3x40x40" not in str(optimized), "nothing is planned before all shapes are looked at"
    assert optimized(torch.zeros(1, 3, 40, 40)).shape == (1, 10)


def test_memory_is_that_of_the_weights_and_the_plans(optimized):
    weights = sum(t.nbytes for t in (*optimized.parameters(), *optimized.buffers()))
    assert optimized.memory() == (weights, 0, 0, 0)
    optimized(torch.zeros(1, 3, 40, 40))
    assert native.REASON is not None or 0.9 * weights < optimized.memory().plans < 2 * weights
    assert f"holds {weights / 1e6:.1f} MB of weights" in str(optimized)


@planned
@pytest.mark.parametrize("name", ["ours", "torchvision b0"])
def test_each_layer_is_explained(name):
    """The stem and the head too, of a peer's; the same before there is a plan and after, and without changing the answer. Block by
    block another backend would be faster for so many images."""
    net = small() if name == "ours" else PEERS[name]().eval()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(256, 3, 40, 40)
    rows = effnet_fast.explain(optimized, x)
    assert [rows[0].name, rows[-1].name] == ["stem", "head"] and len(rows) == 18
    assert [choice.op for choice in rows[0].ops] == ["conv_bn_act"]
    assert rows[-1].ops[0].op == "pointwise_conv_bn_act"
    assert {choice.backend for row in rows for choice in row.ops} == {"native"}
    assert effnet_fast.explain(optimized, x) == rows
    before = optimized(x)
    with effnet_fast.ops.backends.tracing():
        torch.testing.assert_close(optimized(x), before, rtol=1e-4, atol=1e-4)


def test_what_runs_block_by_block_is_explained_so():
    net = small()
    net.act2 = nn.Hardswish()
    rows = effnet_fast.explain(effnet_fast.optimize_for_inference(net), torch.randn(2, 3, 40, 40))
    assert len(rows) == 18 and "an activation is Hardswish" in str(rows[-1])


@pytest.fixture
def as_on_cuda(monkeypatch):
    """A CPU's images take the way of a GPU's, to a pool that stands in for CUDA's. Tells whether the caller captures."""
    caller = SimpleNamespace(captures=False)
    monkeypatch.setattr(optimize.InferenceModel, "_on_cpu", optimize.InferenceModel._on_cuda)
    monkeypatch.setattr(optimize, "CudaPool", lambda device: StandIn())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: caller.captures)
    return caller


@pytest.mark.parametrize("name", ["ours", "timm b0"])
def test_graphs_of_a_copy(name, as_on_cuda):
    """They are told, counted and explained; a copy makes its own; and in the caller's own capture there is none."""
    net = small() if name == "ours" else PEERS[name]().eval()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        made = optimized(x)
    with torch.no_grad():
        torch.testing.assert_close(made, net(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(optimized(x), made)
    assert "2x3x40x40 NCHW torch.float32: a CUDA graph" in str(optimized)
    assert optimized.memory().graphs == optimized.memory().static == x.nbytes + made.nbytes
    rows = effnet_fast.explain(optimized, x)
    assert [rows[0].name, rows[-1].name] == ["stem", "head"] and all(row.plain is None for row in rows)

    other = copy.deepcopy(optimized)
    as_on_cuda.captures = True
    torch.testing.assert_close(other(x), made)
    assert other.memory().graphs == 0
    as_on_cuda.captures = False
    other.warmup([(2, 3, 40, 40), (1, 3, 40, 40)])
    assert len(str(other).splitlines()) == 5 and other.memory().graphs > optimized.memory().graphs
    assert other(x[:0]).shape == (0, made.shape[1])


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_copy_without_memory_for_a_batch(cuda_graphs, as_on_cuda, monkeypatch):
    """Runs in pieces, and without graphs too."""
    net = small()
    optimized, x = effnet_fast.optimize_for_inference(net, cuda_graphs=cuda_graphs), torch.randn(5, 3, 40, 40)
    forward = optimized.frozen.forward

    def scarce(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x)

    monkeypatch.setattr(optimized.frozen, "forward", scarce)
    with torch.no_grad(), pytest.warns(UserWarning, match="for 5 images of 3x40x40: 3 run at a time"):
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)
    assert str(optimized).count("a CUDA graph") == (2 if cuda_graphs else 0)
