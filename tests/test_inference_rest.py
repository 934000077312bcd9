"""Networks with what no kernel of ours is for: that runs before, after or between native calls, on all images."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from test_inference import leaves, planned
from tolerance import assert_2x
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

import effnet_fast
from effnet_fast import create_model
from effnet_fast.benchmark import calibrate
from effnet_fast.inference.plan import NativePlan

pytestmark = planned


class Around(nn.Module):
    """A network, and what else is done with its images or its result."""

    def __init__(self, net: nn.Module, call: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.net, x)


def b0(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("efficientnet_b0", num_classes=10, **arguments)


def with_classifier(classifier: nn.Module) -> nn.Module:
    net = b0()
    net.classifier = classifier
    return net


def both_results(net: nn.Module, x: torch.Tensor) -> Any:
    """Logits of the plan, and what is made of them later, whole numbers too."""
    logits = net(x)
    return [logits, *logits.softmax(-1).topk(3)]


def branches(net: nn.Module, x: torch.Tensor) -> Any:
    """A linear layer of the plan comes after an operator that waits for the plan, and does not read what that makes."""
    pooled = net.global_pool(net.forward_features(x))
    return [torch.sigmoid(pooled), net.classifier(pooled)]


RESTS = {
    "relu": (lambda: with_classifier(nn.Sequential(nn.Linear(1280, 64), nn.ReLU(), nn.Linear(64, 10))), "relu, addmm"),
    "in place": (lambda: with_classifier(nn.Sequential(nn.Linear(1280, 64), nn.ReLU(True), nn.Linear(64, 10))), "relu_, addmm"),
    "norm": (
        lambda: with_classifier(nn.Sequential(nn.LayerNorm(1280), nn.Dropout(), nn.Linear(1280, 10))),
        "native_layer_norm, addmm",
    ),
    "maximum": (lambda: b0(global_pool="max"), "adaptive_max_pool2d, view, addmm"),
    "mean and maximum": (lambda: b0(global_pool="catavgmax"), "adaptive_max_pool2d, cat, view, addmm"),
    "map": (lambda: Around(b0(), lambda net, x: nn.functional.hardswish(net.forward_features(x)).mean((2, 3))), "hardswish, mean"),
    "softmax": (lambda: Around(b0(), lambda net, x: net(x).softmax(-1)), "_softmax"),
    "over the batch": (lambda: Around(b0(), lambda net, x: net(x).softmax(0)), "_softmax"),
    "of two images": (lambda: Around(b0(), lambda net, x: net(x)[:2].relu()), "slice, relu"),
    "two results": (lambda: Around(b0(), both_results), "_softmax, topk"),
    "branches": (lambda: Around(b0(), branches), "sigmoid"),
}


@pytest.mark.parametrize("name", RESTS)
def test_what_follows_the_plan(name):
    make, told = RESTS[name]
    net = calibrate(make().eval(), (40, 48))
    optimized = effnet_fast.optimize_for_inference(net)
    for images in (1, 3, 2):
        x = torch.randn(images, 3, 40, 48)
        with torch.no_grad():
            expected = leaves(net(x))
            given = leaves(optimized(x))
        assert [(t.shape, t.dtype) for t in given] == [(t.shape, t.dtype) for t in expected]
        for a, b in zip(given, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    (line,) = [line for line in str(optimized).splitlines() if "3x40x48" in line]
    assert "one native call of" in line and f"kernels, then {told};" in line
    kept = leaves(given)[0].clone()
    optimized(torch.randn(2, 3, 40, 48))
    assert torch.equal(leaves(given)[0], kept), "the caller's result was written over"


def channel_by_channel(net: nn.Module, x: torch.Tensor) -> Any:
    """As torchvision's Inception prepares images; the network's own are read again at the end."""
    prepared = [channel[:, None] * scale + 0.1 for channel, scale in zip(x.unbind(1), (0.4, 0.5, 0.6), strict=True)]
    return net(torch.cat(prepared, 1)) + x.mean((1, 2, 3))[:, None]


def with_hardswish(net: nn.Module) -> nn.Module:
    net.bn1.act = nn.Hardswish(inplace=True)
    return net


def pooled_and_convolved(net: nn.Module, x: torch.Tensor) -> Any:
    return nn.functional.conv2d(net.forward_features(x).amax((2, 3), keepdim=True), net.conv_head.weight.transpose(0, 1))


def attended(net: nn.Module, x: torch.Tensor) -> Any:
    """What a kernel made is read by operators, by kernels of its own native call and of the next one."""
    x = net.bn1(net.conv_stem(x))
    for block in net.blocks:
        y = block(x)
        x = y * torch.sigmoid(y.amax(1, keepdim=True)) if y.shape[1] == 40 else y
    return net.forward_head(net.bn2(net.conv_head(x)))


def written_in_place(net: nn.Module, x: torch.Tensor) -> Any:
    stem = net.bn1(net.conv_stem(x))
    return net.forward_head(net.bn2(net.conv_head(net.blocks(stem.mul_(0.5).clamp_(max=1.0)))))


def views(net: nn.Module, x: torch.Tensor) -> Any:
    """Of what kernels make, which is a result too, and read by kernels; some channels of it are read by an operator."""
    features = net.forward_features(x)
    return [features.transpose(2, 3), features, features[:, :40].tanh(), net.forward_head(features)]


def cosines(net: nn.Module, x: torch.Tensor) -> Any:
    """As of ArcFace."""
    return nn.functional.linear(nn.functional.normalize(net(x)), nn.functional.normalize(net.classifier.weight[:3, :10]))


class Decoder(nn.Module):
    """On the features of a network: upsampling and a skip connection before each convolution."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.encoder = timm.create_model("efficientnet_b0", features_only=True, out_indices=(0, 1, 2))
        few, more, most = self.encoder.feature_info.channels()
        norms = [nn.BatchNorm2d(channels) if norm else nn.Identity() for channels in (32, 16)]
        self.first = nn.Sequential(nn.Conv2d(most + more, 32, 3, padding=1), norms[0], nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(32 + few, 16, 3, padding=1), norms[1], nn.ReLU(inplace=True))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        few, more, most = self.encoder(x)
        y = self.first(torch.cat([nn.functional.interpolate(most, more.shape[2:]), more], 1))
        y = self.second(torch.cat([nn.functional.interpolate(y, few.shape[2:], mode="bilinear"), few], 1))
        return [self.head(y), most]


@pytest.mark.parametrize("name", ["normalised", "padded", "other order"])
def test_bytes_that_an_operator_reads_before_the_stem(name):
    make, _ = BETWEEN[name]
    net = calibrate(make().eval(), (40, 48))
    optimized = effnet_fast.optimize_for_inference(net)
    for images in (1, 3):
        x = torch.randint(0, 256, (images, 40, 48, 3), dtype=torch.uint8)
        values = (x.permute(0, 3, 1, 2).double() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
            [0.229, 0.224, 0.225]
        )[:, None, None]
        with torch.no_grad():
            exact, plain = copy.deepcopy(net).double()(values), net(values.float())
        assert_2x(optimized(x), plain, exact, name)
    assert "normalised, " in str(optimized)


def written_through_another(net: nn.Module, x: torch.Tensor) -> Any:
    stem = net.bn1(net.conv_stem(x))
    stem.view(stem.shape).mul_(0.5)
    return net.forward_head(net.bn2(net.conv_head(net.blocks(stem))))


def saturated(net: nn.Module, x: torch.Tensor) -> Any:
    """What an operator made is read by kernels, and written through another tensor, and read again."""
    y = nn.functional.gelu(net.bn1(net.conv_stem(x)))
    before = net.blocks[0](y)
    y.detach().clamp_(max=0.5)
    return before + net.blocks[0](y)


class Tokens(nn.Module):
    """A linear layer of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = b0(), nn.Linear(1280, 7)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.net.forward_features(x).flatten(2).transpose(1, 2)).mean(1)


BETWEEN = {
    "normalised": (lambda: Around(b0(), lambda net, x: net((x - 0.5) / 0.2)), "sub, div, then one native call of 52 kernels;"),
    "one channel": (lambda: Around(b0(), lambda net, x: net(x[:, :1].repeat(1, 3, 1, 1))), "slice, repeat, then one native call"),
    "one channel, no copy": (lambda: Around(b0(), lambda net, x: net(x[:, :1].expand(-1, 3, -1, -1))), "expand, clone, then one"),
    "other order": (
        lambda: Around(b0(), lambda net, x: net(x.flip(1)).softmax(-1)),
        "flip, then one native call of 52 kernels, then _",
    ),
    "resized": (lambda: Around(b0(), lambda net, x: net(nn.functional.interpolate(x, (32, 32)))), "upsample_nearest2d, then one"),
    "channel by channel": (
        lambda: Around(b0(), channel_by_channel),
        "cat, then one native call of 52 kernels, then mean",
    ),
    "another activation": (lambda: with_hardswish(b0()), "2 native calls of 52 kernels, and hardswish_"),
    "two networks": (
        lambda: Around(b0(), lambda net, x: net(x) + net(x * 2).relu()),
        "2 native calls of 104 kernels, and mul, relu, add",
    ),
    "a convolution": (lambda: Around(b0(), pooled_and_convolved), "2 native calls of 51 kernels, and amax"),
    "views": (lambda: Around(b0(), views), "one native call of 52 kernels, then slice, tanh, transpose;"),
    "cosines": (lambda: Around(b0(), cosines), "linalg_vector_norm, clamp_min, expand, div, mm;"),
    "padded": (lambda: Around(b0(), lambda net, x: net(nn.functional.pad(x, (3, 4, 5, 6)) + 1)), "constant_pad_nd, add, then one"),
    "attention": (lambda: Around(b0(), attended), "2 native calls of"),
    "in place": (lambda: Around(b0(), written_in_place), "2 native calls of 52 kernels, and mul_, clamp_"),
    "decoder": (Decoder, "upsample_nearest2d, cat"),
    "decoder without norms": (lambda: Decoder(False), "upsample_nearest2d, cat"),
    "tokens": (lambda: Tokens(), "one native call of 51 kernels, then mean;"),
    "some of the images": (lambda: Around(b0(), lambda net, x: net(x[:7] * 2)), "slice, mul, then one native call"),
    "saturated": (lambda: Around(b0(), saturated), "gelu, detach, clamp_"),
    "dilated": (lambda: b0(output_stride=8), "convolution, native_batch_norm"),
    "blur pooling": (lambda: b0(aa_layer="blur"), "reflection_pad2d"),
    "GELU": (lambda: create_model("efficientnet_b0", num_classes=10, act_layer=nn.GELU), "gelu"),
    "group norm": (lambda: create_model("efficientnet_b0", num_classes=10, norm_layer=partial(nn.GroupNorm, 4)), "group_norm"),
    "MobileNetV3": (lambda: timm.create_model("mobilenetv3_small_100", num_classes=10), "hardswish_"),
    "MixNet": (lambda: timm.create_model("mixnet_s", num_classes=10), "split_with_sizes"),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_runs_between_native_calls(name, dtype):
    """By the 2x rule against the network itself."""
    torch.manual_seed(0)
    make, told = BETWEEN[name]
    net = calibrate(make().eval(), (40, 48))
    optimized = effnet_fast.optimize_for_inference(net, dtype)
    x = torch.randn(5, 3, 40, 48) * torch.tensor([1, 0.5, 1.2, 0.8, 1.1])[:, None, None, None]
    x += torch.tensor([0, 0.3, -0.2, 0.1, -0.3])[:, None, None, None]
    with torch.no_grad():
        exact = leaves(copy.deepcopy(net).double()(x.double()))
        plain = leaves(copy.deepcopy(net).to(dtype)(x.to(dtype)))
        for images in (1, 5, 2):
            before = x.clone()
            for made, expected, truth in zip(leaves(optimized(x[:images])), plain, exact, strict=True):
                assert made.dtype == dtype
                assert_2x(made, expected[:images], truth[:images], name)
            assert torch.equal(x, before), "the caller's images were written to"
    (line,) = [line for line in str(optimized).splitlines() if "3x40x48" in line]
    assert told in line


UNPLANNED = {
    "a number": (lambda net, x: net(x) * net(x).amax().item(), "aten._local_scalar_dense.default gives Python what depends"),
    "a number, before": (lambda net, x: net(x / x.amax().item()), "aten._local_scalar_dense.default gives Python what depends"),
    "a whole batch": (lambda net, x: net(x) - net(x).mean(0) + torch.arange(len(x))[:, None], "another result than its blocks"),
    "values": (lambda net, x: net(x) * torch.tensor(net(x).amax(1).tolist())[:, None], "tolist gives Python what depends"),
    "as many as are large": (lambda net, x: net(x) * (1 + len((net(x) > 1).nonzero())), "aten.nonzero.default gives Python"),
    "a median": (lambda net, x: net(x).sort(0)[0][(len(x) - 1) // 2 :], "another result than its blocks"),
    "noise": (lambda net, x: net(x + 1e-9 * torch.rand(3, 1, 1)), "aten.rand.default would give the same each time"),
    "instance norm": (lambda net, x: net(nn.functional.instance_norm(x)), "takes statistics of a batch"),
    "values, packed": (lambda net, x: net(x) * (torch.tensor([x.amax() > 12.0]) + 1.0), "tensor gives Python what depends"),
    "written to a constant": (lambda net, x: net(torch.zeros(x.shape, dtype=x.dtype).add_(x)), "writes what comes of the image"),
    "a constant": (lambda net, x: [net(x), torch.ones(3)], "a result does not come of the image"),
    "through another": (written_through_another, "reads what was written through another tensor"),
}


@pytest.mark.parametrize("name", UNPLANNED)
def test_blocks_run_where_the_rest_cannot_wait(name):
    call, told = UNPLANNED[name]
    net = calibrate(Around(b0(), call).eval(), (40, 48))
    optimized = effnet_fast.optimize_for_inference(net)
    for images in (1, 3):
        x = torch.randn(images, 3, 40, 48)
        with torch.no_grad():
            exact = leaves(copy.deepcopy(net).double()(x.double()))
            for made, plain, truth in zip(leaves(optimized(x)), leaves(net(x)), exact, strict=True):
                assert_2x(made, plain, truth.double(), name)
    (line,) = [line for line in str(optimized).splitlines() if "3x40x48" in line]
    assert "block by block" in line and told in line


def test_a_plan_that_does_not_suit_a_batch_gives_way(monkeypatch):
    net = calibrate(b0().eval(), (40, 48))
    optimized = effnet_fast.optimize_for_inference(net)
    run = NativePlan.__call__

    def of_few(plan: NativePlan, images: torch.Tensor) -> Any:
        if len(images) > 5:
            raise ValueError("five at most")
        return run(plan, images)

    monkeypatch.setattr(NativePlan, "__call__", of_few)
    for images, way in ((5, "one native call"), (6, "block by block: with 6 images ValueError: five"), (3, "block by block")):
        x = torch.randn(images, 3, 40, 48)
        with torch.no_grad():
            torch.testing.assert_close(optimized(x), net(x), rtol=1e-3, atol=1e-3)
        assert way in str(optimized)


def test_a_hook_that_calls_the_copy_while_it_is_planned():
    """It is told no plan, which it would wait for; the network runs block by block."""
    optimized, x, answers = effnet_fast.optimize_for_inference(b0().eval()), torch.randn(1, 3, 40, 48), []
    inside = threading.Lock()

    def call(*_: Any) -> None:
        if inside.acquire(blocking=False):
            try:
                answers.append(optimized(x))
            finally:
                inside.release()

    optimized.frozen.conv_stem.register_forward_hook(call)
    for _ in range(2):
        torch.testing.assert_close(optimized(x), answers[-1], rtol=1e-4, atol=1e-4)
    assert "block by block" in str(optimized)


def test_a_trace_does_not_see_a_plan_that_is_collected_meanwhile():
    optimized, x = effnet_fast.optimize_for_inference(b0().eval()), torch.randn(1, 3, 40, 48)
    optimized(x)
    numbers = optimized._made_plans()[0][1]._plans
    copies = [optimized]
    copies.append(copies)  # a cycle: only the garbage collector frees it
    del optimized

    def traced(x: torch.Tensor) -> torch.Tensor:
        copies.clear()
        gc.collect()
        return x + 1

    graph = make_fx(traced)(x).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]
    with pytest.raises(RuntimeError, match="there is none of number"):
        torch.ops.effnet_fast.plan_held(numbers[0])


def test_a_recording_keeps_no_activations():
    """But those that operators read later: a plan is made in the memory that a pass takes."""
    kept: list[StorageWeakRef] = []
    alive: list[int] = []

    def look(module: nn.Module, given: Any, made: torch.Tensor) -> None:
        kept.append(StorageWeakRef(made.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in kept))

    net = create_model("efficientnet_b0", num_classes=10).eval()
    for stage in net.blocks:
        for block in stage:
            block.register_forward_hook(look)
    plan = NativePlan(net, torch.randn(1, 3, 40, 40), torch.ones(2, 3), torch.float32)
    assert plan.size.calls == 1 and len(alive) == 16 and max(alive) <= 3
