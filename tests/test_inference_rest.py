"""Networks that end in what no kernel of ours is for: that runs after the plan, on all images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from test_inference import leaves, planned
from torch import nn

import effnet_fast
from effnet_fast.benchmark import calibrate

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


def pooled_and_convolved(net: nn.Module, x: torch.Tensor) -> Any:
    return nn.functional.conv2d(net.forward_features(x).amax((2, 3), keepdim=True), net.conv_head.weight.transpose(0, 1))


UNPLANNED = {
    "before the stem": (lambda net, x: net((x - 0.5) / 0.2), "aten.sub.Tensor is no kernel of ours, and a convolution follows"),
    "a convolution": (pooled_and_convolved, "aten.amax.default is no kernel of ours, and a convolution follows"),
    "a number": (lambda net, x: net(x) * net(x).amax().item(), "aten._local_scalar_dense.default gives Python what depends"),
    "a whole batch": (lambda net, x: net(x) - net(x).mean(0) + torch.arange(len(x))[:, None], "another result than its blocks"),
    "values": (lambda net, x: net(x) * torch.tensor(net(x).amax(1).tolist())[:, None], "tolist gives Python what depends"),
    "as many as are large": (lambda net, x: net(x) * (1 + len((net(x) > 1).nonzero())), "aten.nonzero.default gives Python"),
    "a median": (lambda net, x: net(x).sort(0)[0][(len(x) - 1) // 2 :], "another result than its blocks"),
    "a constant": (lambda net, x: [net(x), torch.ones(3)], "a result does not come of the image"),
}


@pytest.mark.parametrize("name", UNPLANNED)
def test_blocks_run_where_the_rest_cannot_wait(name):
    call, told = UNPLANNED[name]
    net = calibrate(Around(b0(), call).eval(), (40, 48))
    optimized = effnet_fast.optimize_for_inference(net)
    for images in (1, 3):
        x = torch.randn(images, 3, 40, 48)
        with torch.no_grad():
            for a, b in zip(leaves(optimized(x)), leaves(net(x)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert f"block by block: {told}" in str(optimized) or f"block by block: its plan gives {told}" in str(optimized)
