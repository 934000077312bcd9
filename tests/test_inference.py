"""optimize_for_inference: what the frozen copy gives, on the CPU by one native call a batch, and what it refuses."""

from __future__ import annotations

import functools
import threading

import peers
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_2x
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import effnet_fast
from effnet_fast.benchmark import calibrate
from effnet_fast.inference import InferenceModel, optimize
from effnet_fast.inference.plan import NativePlan
from effnet_fast.models import create_model
from effnet_fast.ops import native

OURS = ("efficientnet_b0", "efficientnet_lite0", "tf_efficientnet_b0", "efficientnetv2_s")
PEERS = {
    "timm b0": lambda: timm.create_model("efficientnet_b0"),
    "timm tf_b0": lambda: timm.create_model("tf_efficientnet_b0"),
    "timm tf_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
    "timm tf_v2_b0": lambda: timm.create_model("tf_efficientnetv2_b0"),
    "timm b0 features": lambda: timm.create_model("efficientnet_b0", features_only=True),
    "torchvision b0": lambda: torchvision.models.efficientnet_b0(),
    "lukemelas b0": lambda: peers.lukemelas("efficientnet-b0"),
}
planned = pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))


def leaves(results) -> list[torch.Tensor]:
    return list(results) if isinstance(results, (list, tuple)) else [results]


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return calibrate(create_model("efficientnet_b0", num_classes=10))


@planned
@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_every_net_is_native_calls(name):
    """By the 2x rule against the net itself, for odd sizes, in both layouts, for fewer and for more images than threads."""
    torch.manual_seed(0)
    net = PEERS[name]() if name in PEERS else create_model(name)
    net = calibrate(net.eval(), (47, 66))
    optimized = effnet_fast.optimize_for_inference(net)
    x = torch.randn(5, 3, 47, 66)
    with torch.no_grad():
        plain, exact = leaves(net(x)), leaves(net.double()(x.double()))
    for images in (x, *2 * [x.contiguous(memory_format=torch.channels_last)], x[:1]):
        for made, expected, truth in zip(leaves(optimized(images)), plain, exact, strict=True):
            assert_2x(made, expected[: len(images)], truth[: len(images)], name)
    assert str(optimized).count("one native call") == 2 or ("v2" in name and str(optimized).count("native calls of") == 2)


@planned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    net = small()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        exact, plain = net.double()(x.double()), net.to(dtype)(x.to(dtype))
    assert_2x(effnet_fast.optimize_for_inference(net.float(), dtype)(x), plain, exact)


class Centred(nn.Module):
    """Images less a mean that the module keeps, and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.gain = small(), nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("mean", torch.full((3, 1, 1), 0.1))

    def forward(self, x):
        return self.net((x - self.mean) * self.gain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        Centred,
        lambda: timm.create_model("efficientnet_cc_b0_4e", num_classes=10),
        lambda: timm.create_model("efficientnet_b0", aa_layer="blurpc", num_classes=10),
        lambda: torchvision.models.efficientnet_b0(norm_layer=torchvision.ops.FrozenBatchNorm2d),
    ],
    ids=["buffer", "conditional", "blur", "frozen norms"],
)
def test_half_precision_is_that_of_all_but_norms(build, dtype):
    torch.manual_seed(0)
    net = build().eval()
    net = net if isinstance(net, torchvision.models.EfficientNet) else calibrate(net, (64, 64))  # frozen norms measure nothing
    optimized, x = effnet_fast.optimize_for_inference(net, dtype), torch.randn(2, 3, 64, 64)
    kept = {name.rpartition(".")[0] for name, value in optimized.state_dict().items() if value.dtype == torch.float32}
    assert all(isinstance(optimized.get_submodule(name), nn.BatchNorm2d) for name in kept)
    with torch.no_grad():
        exact, plain = net.double()(x.double()), net.to(dtype)(x.to(dtype))
    assert_2x(optimized(x), plain, exact)


unchanged = functools.cache(small)
SIZES = st.lists(st.tuples(st.integers(32, 70), st.integers(32, 70)), min_size=1, max_size=3)


def calls_of(sizes: list[tuple[int, int]]) -> st.SearchStrategy:
    return st.lists(st.tuples(st.integers(1, 4), st.sampled_from(sizes), st.booleans()), min_size=2, max_size=8)


@planned
@settings(max_examples=12, deadline=None)
@given(SIZES.flatmap(calls_of))
def test_any_order_of_shapes_and_layouts(calls):
    """Again and again: each is planned once, and no call writes over what an earlier one gave."""
    net = unchanged()
    optimized = effnet_fast.optimize_for_inference(net)
    answers, expected = [], []
    for images, size, channels_last in calls:
        x = torch.randn(images, 3, *size)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        answers.append(optimized(x))
        with torch.no_grad():
            expected.append(net(x))
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)
    shapes = [call[1:] for call in calls]
    assert len(optimized._plans) == len({shape for shape in shapes if shape == shapes[0] or shapes.count(shape) > 1})
    assert all(isinstance(plan, NativePlan) for _, plan in optimized._made_plans())


@planned
def test_strided_views_and_other_dtypes_are_taken():
    net = small()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(2, 3, 80, 70)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x[:, :, 5:69, ::2]), net(x[:, :, 5:69, ::2]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(optimized(x[::2].expand(2, -1, -1, -1)), net(x[:1]).expand(2, -1), rtol=1e-4, atol=1e-4)
        assert optimized(x.double()).dtype == torch.float32
    assert optimized(x[:0]).shape == (0, 10)


@planned
@pytest.mark.parametrize("classes", [392, 600, 650, 808])
def test_class_counts_that_leave_an_odd_vector(classes):
    net = small()
    net.classifier = nn.Linear(1280, classes)
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)


@planned
def test_weights_that_are_loaded_into_what_holds_a_copy_are_used():
    holder, other = nn.Sequential(effnet_fast.optimize_for_inference(small())), small(1)
    x = torch.randn(2, 3, 40, 40)
    holder(x)
    holder.load_state_dict({f"0.frozen.{name}": value for name, value in other.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(holder(x), other(x), rtol=1e-4, atol=1e-4)


@planned
def test_others_are_served_while_a_plan_is_made(monkeypatch):
    optimized = effnet_fast.optimize_for_inference(small())
    known, new = torch.randn(1, 3, 40, 40), torch.randn(1, 3, 48, 40)
    optimized(known)
    begun, goes_on = threading.Event(), threading.Event()
    make = InferenceModel._make_plan

    def slow(model, image):
        begun.set()
        assert goes_on.wait(60)
        return make(model, image)

    monkeypatch.setattr(InferenceModel, "_make_plan", slow)
    threads = [threading.Thread(target=optimized, args=(new,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    optimized(known)
    assert str(optimized).count("one native call") == 1
    goes_on.set()
    for thread in threads:
        thread.join()
    assert str(optimized).count("one native call") == 2


@planned
def test_a_classifier_without_bias_is_planned():
    net = small()
    net.classifier = nn.Linear(1280, 7, bias=False)
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)
    assert "one native call" in str(optimized)


@planned
def test_two_convolutions_in_a_row_are_two_kernels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1, bias=False), small()).eval()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)
    assert "one native call" in str(optimized)


class Repeated(nn.Module):
    """Grey as three equal colours."""

    def forward(self, x):
        return x.repeat(1, 3, 1, 1)


class Ending(nn.Module):
    """A net, and something done to its features."""

    def __init__(self, end):
        super().__init__()
        self.net, self.end = small(), end

    def forward(self, x):
        return self.end(self.net.forward_features(x))


@planned
@pytest.mark.parametrize(
    "end",
    [
        lambda y: nn.functional.hardswish(y, inplace=True),
        lambda y: y.add_(1),
        lambda y: y.flatten(2),
        lambda y: y.permute(0, 2, 3, 1),
        lambda y: (y, None)[0].mean((2, 3)).squeeze(),
    ],
    ids=["hardswish_", "add_", "flatten", "permute", "squeeze"],
)
def test_other_ends_are_right_or_run_block_by_block(end):
    net = Ending(end).eval()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)


@planned
def test_autocast_changes_nothing():
    """Neither the answer nor the plan that is kept."""
    optimized, x = effnet_fast.optimize_for_inference(small()), torch.randn(2, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        inside = optimized(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, optimized(x))


@planned
def test_threads_share_a_copy():
    """Of a net whose answers are kept by the caller: none is written over by a later call."""
    net = small()
    optimized = effnet_fast.optimize_for_inference(net)
    batches = [torch.randn(1 + i % 3, 3, 40 + 8 * (i % 2), 40) for i in range(12)]
    with torch.no_grad():
        expected = [net(x) for x in batches]
    answers: dict[int, list[torch.Tensor]] = {}

    def serve(thread: int) -> None:
        answers[thread] = [optimized(x) for x in batches]

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for given_back in answers.values():
        torch.testing.assert_close(given_back, expected, rtol=1e-4, atol=1e-4)


@planned
def test_a_copy_is_frozen():
    net = small()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(1, 3, 40, 40)
    before = optimized(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(optimized(x), before) and torch.equal(optimized(torch.cat([x, x]))[1:], before)
    assert not any(parameter.requires_grad for parameter in optimized.parameters())
    assert optimized.eval() is optimized
    assert not nn.ModuleDict({"teacher": optimized}).train()["teacher"].training and torch.equal(optimized.train()(x), before)


@planned
def test_the_plan_that_was_not_used_for_longest_goes(monkeypatch):
    monkeypatch.setattr(optimize, "PLANS", 2)
    optimized = effnet_fast.optimize_for_inference(small())
    for size in (32, 33, 33, 32, 34, 34):
        optimized(torch.randn(1, 3, size, 32))
    assert "2 plans" in str(optimized) and "3x33x32" not in str(optimized)


@planned
def test_many_shapes_in_turn_are_planned_once(monkeypatch):
    made = []
    make = InferenceModel._make_plan
    monkeypatch.setattr(InferenceModel, "_make_plan", lambda self, x: (made.append(x.shape[2]), make(self, x))[1])
    optimized = effnet_fast.optimize_for_inference(effnet_fast.efficientnet(depth=0.1, width=0.25, num_classes=10))
    for size in [*range(32, 64)] * 2:
        optimized(torch.zeros(1, 3, size, 32))
    assert made == [*range(32, 64)]


@planned
def test_a_shape_that_comes_once_is_not_planned():
    """But the first: to plan takes longer than to run the blocks. At the second call it is, and by a warm-up."""
    net = small()
    optimized = effnet_fast.optimize_for_inference(net)
    sizes = (40, 41, 42, 41, 43)
    for size in sizes:
        x = torch.randn(2, 3, size, 40)
        with torch.no_grad():
            torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)
    assert [shape[1] for (_, shape, _), _ in optimized._made_plans()] == [40, 41]
    optimized.warmup((1, 3, 44, 40))
    assert [shape[1] for (_, shape, _), _ in optimized._made_plans()] == [40, 41, 44]
    with pytest.raises(ValueError, match="at least one pixel"):
        optimized(torch.randn(1, 3, 0, 40))


@planned
def test_plans_of_one_copy_share_their_weights():
    optimized = effnet_fast.optimize_for_inference(small())
    held = []
    for size in (40, 32, 33, 36, 39):
        optimized(torch.randn(1, 3, size, size))
        held.append(optimized.memory().plans)
    assert held == held[:1] * 5 and held[0] > 16e6


@planned
def test_plans_that_threads_make_at_the_same_time_share_their_weights():
    optimized, barrier = effnet_fast.optimize_for_inference(small()), threading.Barrier(3)

    def serve(size: int) -> None:
        barrier.wait()
        for _ in range(2):
            optimized(torch.randn(1, 3, size, 40))

    threads = [threading.Thread(target=serve, args=(size,)) for size in (40, 41, 42)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plans = [plan for _, plan in optimized._made_plans()]
    assert len(plans) == 3 and {plan.held() for plan in plans} == {optimized.memory().plans}
    optimized(torch.randn(1, 3, 43, 40))
    assert all(plan.held() == optimized.memory().plans for plan in plans)


@planned
def test_a_plan_that_gives_another_result_is_not_used(monkeypatch):
    run = NativePlan.__call__
    monkeypatch.setattr(NativePlan, "__call__", lambda plan, images: run(plan, images) + 1)
    net = small()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)
    assert "block by block: its plan gives another result" in str(optimized)


@planned
def test_the_number_of_threads_may_change_between_calls():
    net = small()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(5, 3, 64, 48)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            results += [optimized(x), torch.cat([optimized(image[None]) for image in x])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


class Heads(nn.Module):
    """What reads a part of what the network gives, or lies in it otherwise than an image after the other."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.net = kind, effnet_fast.efficientnet(depth=0.4, width=0.5, num_classes=0)
        self.channels = self.net.num_features
        self.first = nn.Linear(self.channels if kind == "positions" else self.channels // 2, 7)
        self.second = nn.Linear(self.channels - self.channels // 2, 5)

    def forward(self, x):
        features = self.net.forward_features(x)
        if self.kind == "positions":
            return self.first(features.flatten(2).transpose(1, 2))
        pooled = features.mean((2, 3))
        return self.first(pooled[:, : self.channels // 2]), self.second(pooled[:, self.channels // 2 :])


@planned
@pytest.mark.parametrize("kind", ["positions", "halves"])
def test_steps_that_read_a_part_of_an_image_go_from_image_to_image(kind):
    """Others at the end compute several images at once, from whole ones that lie next to one another."""
    torch.manual_seed(0)
    net = calibrate(Heads(kind).eval(), (96, 64))
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(9, 3, 96, 64)
    with torch.no_grad():
        for made, expected in zip(leaves(optimized(x)), leaves(net(x)), strict=True):
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert "one native call" in str(optimized)


class Head(nn.Module):
    """A net, and of what it gives for each image ``head(pooled, features)``, with a linear layer of so many outputs."""

    def __init__(self, head, outputs: int = 4) -> None:
        super().__init__()
        self.net, self.head = small(), head
        self.made, self.reduced = nn.Linear(1280, outputs), nn.Conv2d(1280, 16, 1)

    def forward(self, x):
        features = self.net.forward_features(x)
        return self.head(self, features.mean((2, 3)), features)


@planned
@pytest.mark.parametrize(
    ("head", "outputs"),
    [
        (lambda net, f, y: F.linear(f, net.made(f).view(4, 1280)), 4 * 1280),
        (lambda net, f, y: F.linear(f, net.net.classifier.weight, net.made(f)[0]), 10),
        (lambda net, f, y: f @ net.made(f).view(1280, 4), 4 * 1280),
        (lambda net, f, y: F.conv2d(y, net.made(f).view(4, 1280, 1, 1)), 4 * 1280),
        (lambda net, f, y: F.batch_norm(net.reduced(y), torch.zeros(16), torch.ones(16), net.made(f)[0]), 16),
        (
            lambda net, f, y: effnet_fast.ops.pointwise_conv_bn_act(
                y,
                net.made(f).view(4, 1280, 1, 1),
                effnet_fast.ops.Norm(None, None, torch.zeros(4), torch.ones(4), 0.0),
                activation="identity",
            ).mean((2, 3)),
            4 * 1280,
        ),
    ],
    ids=["linear", "bias", "matmul", "conv", "norm", "op"],
)
def test_weights_that_are_made_of_the_image(head, outputs):
    """Are no constants of a plan."""
    torch.manual_seed(0)
    net = Head(head, outputs).eval()
    optimized = effnet_fast.optimize_for_inference(net)
    for scale in (1, 0.3):
        x = scale * torch.randn(1, 3, 40, 40)
        with torch.no_grad():
            torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)
    assert "is made of the image" in str(optimized) or "kernels, then select, " in str(optimized)


@planned
def test_a_plan_is_held_against_other_images_than_it_was_made_of(monkeypatch):
    """So that what a recording takes for a constant, and is none, comes out."""
    monkeypatch.setattr("effnet_fast.inference.recording.Recording._check_constants", lambda *args: None)
    monkeypatch.setattr("effnet_fast.inference.recording._takes_images", lambda *args: False)
    net = Head(lambda net, f, y: F.linear(f, net.made(f[:1]).view(4, 1280)), 4 * 1280).eval()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(1, 3, 40, 40)
    optimized(x)
    assert "its plan gives another result" in str(optimized)


def _even(f):
    assert len(f) % 2 == 0, "pairs"
    return f


def _halves(f):
    a, b = f.chunk(2)
    return torch.cat([a, b], 1)


@planned
@pytest.mark.parametrize(
    "head",
    [
        lambda net, f, y: net.made(f)[:1],
        lambda net, f, y: net.made(f)[-1:],
        lambda net, f, y: net.made(f)[:2],
        lambda net, f, y: net.made(f[-3:]),
        lambda net, f, y: net.made(f)[0],
        lambda net, f, y: net.made(f).view(1, -1),
        lambda net, f, y: f @ f.t(),
        lambda net, f, y: torch.addmm(net.made(f), f, net.made.weight.t()),
        lambda net, f, y: _even(net.made(f)),
        lambda net, f, y: _halves(net.made(f)),
        lambda net, f, y: (net.made(f), len(f))[: len(f)],
    ],
    ids=["first", "last", "two", "of three", "one", "as one", "matmul", "bias", "even", "halves", "number of results"],
)
@pytest.mark.parametrize("images", [1, 4])
def test_what_is_made_of_a_batch(head, images):
    """Is what the model itself gives, its errors too."""
    torch.manual_seed(0)
    net = Head(head).eval()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(images, 3, 40, 40)
    with torch.no_grad():
        try:
            expected = net(x)
        except Exception as error:
            for _ in range(2):
                with pytest.raises(type(error)):
                    optimized(x)
            return
        for _ in range(2):
            torch.testing.assert_close(optimized(x), expected, rtol=1e-4, atol=1e-4)


class Refusing(TorchDispatchMode):
    """Whatever traces so: a plan has begun when that is refused."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.effnet_fast.plan_begin.default:
            raise RuntimeError(f"{func} is refused")
        return made


@planned
def test_a_plan_that_cannot_be_begun_leaves_the_thread_as_it_was():
    net = small()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(1, 3, 40, 40)
    with torch.no_grad(), pytest.raises(RuntimeError, match="plan_begin.* is refused") as kept, Refusing():
        NativePlan(net, x, optimized.pixels, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)
    assert "one native call" in str(optimized) and kept.tb is not None, "what was begun is not freed with the error"


@pytest.mark.parametrize("name", ["ours", "timm b0", "torchvision b0"])
def test_bad_input_is_named_and_leaves_the_copy_usable(name):
    net = small() if name == "ours" else PEERS[name]().eval()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(1, 3, 40, 40)
    for bad, says in (
        (None, "x is a NoneType"),
        (torch.zeros(3, 40, 40), r"x is \(3, 40, 40\)"),
        (torch.zeros(1, 3, 40, 40, dtype=torch.int32), r"x is \(1, 3, 40, 40\) of torch.int32"),
        (torch.zeros(1, 1, 40, 40), r"x is \(1, 1, 40, 40\)"),
        (torch.zeros(2, 4, 40, 40), r"x is \(2, 4, 40, 40\)"),
        (torch.zeros(1, 40, 40, 3), r"x is \(1, 40, 40, 3\)"),
        (torch.zeros(0, 4, 40, 40), r"x is \(0, 4, 40, 40\)"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"^InferenceModel: {says}.*; a batch of images \[N, 3, H, W\] of .* would do(; the network says: .*)?$",
        ):
            optimized(bad)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)
    assert native.REASON is not None or [shape for (_, shape, _), _ in optimized._made_plans()] == [(3, 40, 40)]


def test_a_net_may_make_colours_of_grey():
    """So images of other channels than its first convolution's are not refused unasked."""
    net = nn.Sequential(Repeated(), small()).eval()
    optimized, x = effnet_fast.optimize_for_inference(net), torch.randn(2, 1, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x), rtol=1e-4, atol=1e-4)


def test_bad_models_are_named():
    with pytest.raises(TypeError, match="model is a str"):
        effnet_fast.optimize_for_inference("efficientnet_b0")
    with pytest.raises(ValueError, match="dtype is torch.float64"):
        effnet_fast.optimize_for_inference(small(), torch.float64)
    for model, where in ((effnet_fast.optimize_for_inference(small()), "model"), (nn.Sequential(nn.ReLU()), r"model\.1")):
        if isinstance(model, nn.Sequential):
            model.append(effnet_fast.optimize_for_inference(small()))
        with pytest.raises(TypeError, match=rf"{where} is an InferenceModel.*; the model that it was made from would do"):
            effnet_fast.optimize_for_inference(model)
    pruned = small()
    prune.l1_unstructured(pruned.classifier, "weight", 0.5)
    with pytest.raises(
        TypeError, match=r"optimize_for_inference: model cannot be copied: .*prune.remove or remove_weight_norm .*would do"
    ):
        effnet_fast.optimize_for_inference(pruned)
    prune.remove(pruned.classifier, "weight")
    effnet_fast.optimize_for_inference(pruned)
    with pytest.raises(ValueError, match="no block of Linear"):
        effnet_fast.optimize_for_inference(nn.Linear(3, 3))
