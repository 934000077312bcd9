"""Gradients of gradients, and gradients in batches, through blocks that train fused: they are plain PyTorch's."""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext

import pytest
import timm
import torch
from plain import channels_last
from test_training import CHANGES, PLAIN_MBCONV, TRAINED, block_of, is_fused
from tolerance import assert_2x, assert_2x_of_all
from torch import nn
from torch.utils.checkpoint import checkpoint

import effnet_fast
from effnet_fast.models import create_model
from effnet_fast.nn import FusedMBConv, MBConv

pytestmark = TRAINED
BLOCKS = (MBConv, (3, 1, 8, 16, 8, 2)), (MBConv, (5, 2, 6, 12, 9, 0)), (FusedMBConv, (3, 1, 5, 10, 5, 0))


@pytest.fixture(autouse=True)
def native():
    with effnet_fast.backend("native"):
        yield


def given(block: nn.Module, *, size: tuple[int, int] = (5, 6)) -> torch.Tensor:
    child = block.conv_pw if isinstance(block, MBConv) else block.conv_exp
    return channels_last(torch.randn(3, child.in_channels, *size))


def loss(y: torch.Tensor) -> torch.Tensor:
    """Of which a norm does not take the gradient away, as it does of ``y.square().sum()``."""
    return (y.sin() + y.tanh().square()).sum()


def penalised(block: nn.Module, x: torch.Tensor, run=None) -> dict[str, torch.Tensor]:
    """What a penalty on every gradient changes, from a seed."""
    block.zero_grad()
    x, parameters = x.clone().requires_grad_(), [p for p in block.parameters() if p.requires_grad]
    torch.manual_seed(5)
    y = (block if run is None else run)(x)
    first = torch.autograd.grad(loss(y), [x, *parameters], create_graph=True)
    second = torch.autograd.grad(sum(g.square().mean() for g in first), [x, *parameters])
    names = ["x", *(name for name, p in block.named_parameters() if p.requires_grad)]
    made = {f"{order} of {name}": g for order, gs in (("1", first), ("2", second)) for name, g in zip(names, gs, strict=True)}
    return made | {name: buffer.clone() for name, buffer in block.named_buffers() if buffer.is_floating_point()}


@pytest.mark.parametrize("change", CHANGES)
def test_a_penalty_on_gradients(change):
    """And statistics move once, and images that stochastic depth drops are the same ones."""
    block = block_of(MBConv, PLAIN_MBCONV[1])
    CHANGES[change](block)
    x, plain, double = given(block), copy.deepcopy(block), copy.deepcopy(block).double()
    assert is_fused(block, x)
    got = penalised(block, x)
    expected, exact = penalised(plain, x, plain.forward_children), penalised(double, x.double(), double.forward_children)
    assert_2x_of_all(got, expected, exact, change)
    for (name, a), b in zip(block.named_buffers(), plain.buffers(), strict=True):
        assert a.is_floating_point() or torch.equal(a, b), name


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("kind", "shape"), BLOCKS, ids=str)
def test_second_derivatives_are_the_quotients_of_differences(kind, shape, frozen, drop):
    """In fp64, of x and every parameter: no other code's is believed."""
    block = block_of(kind, tuple(size if size < 4 else (size + 1) // 2 for size in shape), drop=drop).double()
    for module in block.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = given(block, size=(3, 4)).double().requires_grad_()

    def run(x, *parameters):
        torch.manual_seed(1)
        return block(x)

    with effnet_fast.backend("reference"):
        assert is_fused(block, x)
        assert torch.autograd.gradgradcheck(run, (x, *block.parameters()), fast_mode=True)


functional = torch.autograd.functional


def hessian_vector_product(run, x, parameters):
    """As PyHessian's."""
    first = torch.autograd.grad(loss(run(x)), parameters, create_graph=True)
    return torch.cat([g.flatten() for g in torch.autograd.grad(first, parameters, [torch.ones_like(p) for p in parameters])])


def twice_backward(run, x, parameters):
    x = x.clone().requires_grad_()
    loss(run(x)).backward(create_graph=True)
    of_x, x.grad = x.grad, None
    for parameter in parameters:
        parameter.grad = None
    of_x.square().sum().backward()
    return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in parameters)])


def in_a_batch(run, x, parameters, **options):
    x = x.clone().requires_grad_()
    y = run(x)
    several = torch.arange(2 * y.numel(), dtype=y.dtype).sin().view(2, *y.shape)
    made = torch.autograd.grad(y, [x, *parameters], several, is_grads_batched=True, **options)
    return torch.cat([g.flatten() for g in made])


def under_vmap(run, x, parameters):
    x = x.clone().requires_grad_()
    y = run(x)
    seeds = torch.stack([y.detach().cos(), y.detach().sin()])
    made = torch.func.vmap(lambda seed: torch.autograd.grad(y, [x, *parameters], seed, retain_graph=True))(seeds)
    return torch.cat([t.flatten() for t in made])


WAYS = {
    "torch.func.vmap": under_vmap,
    "a Hessian-vector product": hessian_vector_product,
    "backward() twice": twice_backward,
    "functional.hvp": lambda run, x, _: functional.hvp(lambda x: loss(run(x)), x, x.cos())[1],
    "functional.hessian": lambda run, x, _: functional.hessian(lambda x: loss(run(x)), x[:1, :, :3, :3]),
    "functional.hessian, vectorized": lambda run, x, _: functional.hessian(lambda x: loss(run(x)), x[:1], vectorize=True),
    "functional.jacobian, vectorized": lambda run, x, _: functional.jacobian(lambda x: run(x).mean((2, 3)), x, vectorize=True),
    "a batch of gradients": in_a_batch,
    "a batch of gradients, to be differentiated": lambda *args: in_a_batch(*args, create_graph=True),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "shape"), BLOCKS, ids=str)
def test_each_way_to_ask(kind, shape, way):
    block = block_of(kind, shape)
    x, double = given(block), copy.deepcopy(block).double()
    assert is_fused(block, x)
    got, expected, exact = (
        WAYS[way](run, t, list(of.parameters()))
        for run, t, of in (
            (block, x, block),
            (block.forward_children, x, block),
            (double.forward_children, x.double(), double),
        )
    )
    assert exact.abs().max() > 0.01
    assert_2x(got, expected, exact, way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["autocast", "of all"])
def test_half_precision(how, dtype):
    block = block_of(MBConv, PLAIN_MBCONV[1])
    block.residual = how != "autocast"  # else the shortcut is float32, and children run one by one
    x, double = given(block), copy.deepcopy(block).double()
    if how == "of all":
        block, x = block.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        assert is_fused(block, x)
        got, expected = penalised(copy.deepcopy(block), x), penalised(block, x, block.forward_children)
    exact = penalised(double, x.double(), double.forward_children)
    assert_2x_of_all(got, expected, exact)


def test_a_bias_that_changed_since():
    """Is not looked at again, as in plain PyTorch, however it was changed."""
    block = block_of(MBConv, PLAIN_MBCONV[1])
    x, double = given(block), copy.deepcopy(block).double()
    assert is_fused(block, x)

    def changed(of, run, x):
        x = x.clone().requires_grad_()
        y, bias = run(x), of.bn2.bias
        before = bias.detach().clone()
        bias.data.add_(1.0)
        with torch.no_grad():
            of.bn1.bias.mul_(1.0)
        (first,) = torch.autograd.grad(loss(y), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        bias.data.copy_(before)
        return second

    got, expected = changed(block, block, x), changed(block, block.forward_children, x)
    assert_2x(got, expected, changed(double, double.forward_children, x.double()))


def test_weights_that_are_made_of_others_are_freed():
    """With the graph, and in a checkpoint at once."""
    block = block_of(MBConv, PLAIN_MBCONV[1])
    x = given(block).requires_grad_()
    assert is_fused(block, x)

    def run(x):
        weight = block.conv_pw.weight * 1
        seen.append(weakref.ref(weight))
        return torch.func.functional_call(block, {"conv_pw.weight": weight}, (x,))

    for call in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        seen: list[weakref.ref] = []
        y = loss(call(x))
        assert (seen[0]() is None) == (call is not run)
        y.backward()
        assert all(weight() is None for weight in seen)


def test_checkpointing():
    block = block_of(MBConv, PLAIN_MBCONV[1], drop=0.5)
    x, again = given(block), copy.deepcopy(block)
    assert is_fused(block, x)
    expected, got = penalised(block, x), penalised(again, x, lambda x: checkpoint(again, x, use_reentrant=False))
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]) or "running" in name, name  # which move twice, as PyTorch's own do


def test_weights_that_are_made_of_each_other():
    """A block that runs on its own result, with weights that a gradient step made: no path to a parameter is counted twice."""
    block = block_of(MBConv, PLAIN_MBCONV[1])
    x, double = given(block), copy.deepcopy(block).double()
    assert is_fused(block, x)

    class Plain(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block.forward_children(x)

    def learned(model: nn.Module, prefix: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
        names = [name for name, _ in model.named_parameters()]
        before = dict(model.named_parameters())
        loss = model(model(x)).square().mean()
        steps = torch.autograd.grad(loss, list(before.values()), create_graph=True)
        after = {name: p - 0.1 * step for (name, p), step in zip(before.items(), steps, strict=True)}

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, after, (x,))

        gradients = torch.autograd.grad(run(run(x)).square().mean(), list(before.values()))
        return {name.removeprefix(prefix): g for name, g in zip(names, gradients, strict=True)}

    expected, exact = (learned(Plain(of), "block.", t) for of, t in ((copy.deepcopy(block), x), (double, x.double())))
    assert_2x_of_all(learned(block, "", x), expected, exact)


def test_what_changed_in_place_is_refused():
    """A bias of the squeeze-excite too, which a first derivative does not need."""
    block = block_of(MBConv, PLAIN_MBCONV[1])
    x = given(block).requires_grad_()
    for changed in (block.se.conv_reduce.bias, block.bn2.weight, block.conv_dw.weight):
        y = block(x)
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="in.?place"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("request_native", [True, False])
def test_feature_maps_of_whole_nets(request_native):
    """Gradient penalties reach every parameter of ours and of an accelerated net, whichever blocks are fused."""
    torch.manual_seed(0)
    theirs = timm.create_model("efficientnet_b0", features_only=True, drop_path_rate=0.0).train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.8)
    ours = create_model("efficientnet_b0", features_only=True, drop_path_rate=0.0).train()
    ours.load_state_dict(theirs.state_dict())
    fast = copy.deepcopy(theirs)
    effnet_fast.accelerate(fast)
    x = torch.randn(4, 3, 64, 64)

    def penalty(model: nn.Module) -> dict[str, torch.Tensor]:
        images = x.to(next(model.parameters()).dtype).requires_grad_()
        with nullcontext() if request_native else effnet_fast.ops.backends.asking(None, False):
            features = model(images)
            (g,) = torch.autograd.grad(sum(loss(f) for f in features), images, create_graph=True)
            g.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected, exact = penalty(copy.deepcopy(theirs)), penalty(copy.deepcopy(theirs).double())
    for model in (ours, fast):
        assert_2x(penalty(model), expected, exact)
