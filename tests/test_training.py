"""Fused training: blocks and nets against autograd through plain modules, and what has to compose with it."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from plain import channels_last
from test_fused import BLOCKS, their_block
from tolerance import assert_2x_of_all, largest
from torch import nn
from torch.utils.checkpoint import checkpoint

import effnet_fast
from effnet_fast.nn import FusedMBConv, MBConv
from effnet_fast.ops import backends, native
from effnet_fast.scaling.config import BlockConfig

TRAINED = pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
FP64 = torch.float64
FREEZE = [timm.layers.norm_act.freeze_batch_norm_2d, torchvision.ops.misc.FrozenBatchNorm2d]
PLAIN_MBCONV = (5, 2, 24, 144, 40, 6), (3, 1, 24, 144, 24, 6), (3, 1, 32, 32, 16, 8)


def block_of(kind: type, shape: tuple, act: type = nn.SiLU, padding: str = "symmetric", drop: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    block = kind(BlockConfig(0, 0, 0, "", *shape, drop_path=drop), nn.BatchNorm2d, act, padding)
    for name, tensor in block.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith(("weight", "var")) else -0.5))
    return block.train()


def seen(block: nn.Module, x: torch.Tensor) -> list[str]:
    """The ops that a training step's forward runs, or why it runs the children."""
    with backends.tracing() as trace:
        copy.deepcopy(block)(x)
    return [entry if isinstance(entry, str) else entry.op for entry in trace]


def choices(block: nn.Module, x: torch.Tensor) -> list[str]:
    """The backends of a training step's ops, forward and backward."""
    with backends.tracing() as trace:
        step(copy.deepcopy(block), x)
    return [choice.backend for choice in trace]


def is_fused(block: nn.Module, x: torch.Tensor) -> bool:
    return seen(block, x)[-1] == "norm_act"


def step(block: nn.Module, x: torch.Tensor, run=None) -> dict[str, torch.Tensor]:
    """Result, gradients and statistics after one step, from a seed."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    y = (block if run is None else run)(x)
    torch.manual_seed(6)
    y.backward(torch.randn(y.shape).to(y.dtype))
    made = {"y": y.detach(), "x": x.grad} | {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    return made | {name: buffer.clone() for name, buffer in block.named_buffers() if buffer.is_floating_point()}


def far_from_kinks(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``x``, or others drawn like it, until no ReLU6 of the block is given what rounding may take across a kink."""
    distances: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        distances.append(torch.minimum(args[0].abs(), (args[0] - 6).abs()).min())

    if not isinstance(block.act1, nn.ReLU6):
        return x
    double, close = copy.deepcopy(block).double(), 10 * torch.finfo(x.dtype).eps
    for module in double.modules():
        if isinstance(module, nn.ReLU6):
            module.register_forward_pre_hook(look)
    for _ in range(100):
        distances.clear()
        with torch.no_grad():
            double.forward_children(x.double())
        if min(distances) > close:
            return x
        x = torch.randn_like(x)
    raise AssertionError("no input is far from the kinks")


def check_step(
    block: nn.Module, x: torch.Tensor, plain=None, run=None, autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Fused steps on a dozen inputs against the children one by one, or against ``plain``, and both in float64.

    A gradient's unit is its largest value of all inputs: of one it may be a small difference of large sums.
    """
    assert is_fused(block, x), seen(block, x)
    x = far_from_kinks(block, x)
    made: list[list[dict[str, torch.Tensor]]] = [[], [], []]
    for _ in range(12):
        ours = copy.deepcopy(block)
        double, theirs = (copy.deepcopy(block if plain is None else plain) for _ in range(2))
        double = double.double()
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            got = step(ours, x)
            expected = step(theirs, x, theirs.forward_children if plain is None else None)
        exact = step(double, x.double(), double.forward_children if plain is None else None)
        for steps, now in zip(made, (got, expected, exact), strict=True):
            steps.append(now)
        x = far_from_kinks(block, torch.randn_like(x))
    assert_2x_of_all(*({name: torch.stack([now[name] for now in steps]) for name in got} for steps in made))
    return got


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native" and native.REASON is not None:
        pytest.skip(native.REASON)
    with effnet_fast.backend(request.param):
        yield request.param


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU6])
@pytest.mark.parametrize(("kind", "shape", "padding"), BLOCKS, ids=str)
def test_a_block_alone(kind, shape, padding, act, backend):
    block = block_of(kind, shape, act, padding)
    plain = their_block(kind, BlockConfig(0, 0, 0, "", *shape, drop_path=0.0), act, padding).train()
    plain.load_state_dict(block.state_dict())
    check_step(block, channels_last(torch.randn(3, shape[2], 13, 16)), plain)


@pytest.mark.parametrize("shape", PLAIN_MBCONV, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["autocast", "of all"])
def test_half_precision(shape, how, dtype, backend):
    block, x = block_of(MBConv, shape), channels_last(torch.randn(4, shape[2], 12, 11))
    block.residual = block.residual and how != "autocast"  # else the shortcut is float32, and children run one by one
    if how == "of all":
        block, x = block.to(dtype), x.to(dtype)
    got = check_step(block, x, autocast=dtype if how == "autocast" else None)
    assert got["y"].dtype == dtype
    assert got["gradient of bn1.weight"].dtype == (dtype if how == "of all" else torch.float32)


def frozen(block, *names):
    for name in names or ("bn1", "bn2", "bn3"):
        getattr(block, name).eval()


def without_gradients(block, *names):
    for name in names:
        for parameter in getattr(block, name).parameters():
            parameter.requires_grad_(False)


CHANGES = {
    "frozen statistics": frozen,
    "one norm frozen": lambda b: frozen(b, "bn2"),
    "frozen weights": lambda b: without_gradients(b, "conv_pw", "conv_dw", "conv_pwl", "bn1"),
    "all but the head of it frozen": lambda b: without_gradients(b, "conv_pw", "bn1", "conv_dw", "bn2", "se", "conv_pwl"),
    "the squeeze-excite frozen": lambda b: without_gradients(b, "se"),
    "a cumulative average": lambda b: [setattr(norm, "momentum", None) for norm in (b.bn1, b.bn2, b.bn3)],
    "momenta that differ": lambda b: [
        setattr(b.bn1, "momentum", 0.3),
        setattr(b.bn2, "momentum", None),
        setattr(b.bn3, "momentum", 1),
    ],
    "no count of batches": lambda b: [setattr(norm, "num_batches_tracked", None) for norm in (b.bn1, b.bn3)],
    "no running statistics": lambda b: setattr(b, "bn2", nn.BatchNorm2d(144, track_running_stats=False)),
    "not affine": lambda b: [setattr(b, name, nn.BatchNorm2d(size, affine=False)) for name, size in (("bn1", 144), ("bn3", 24))],
    "no squeeze-excite": lambda b: setattr(b, "se", nn.Identity()),
    "channels_last weights": lambda b: b.to(memory_format=torch.channels_last),
    "no biases": lambda b: [setattr(conv, "bias", None) for conv in (b.se.conv_reduce, b.se.conv_expand)],
    "stochastic depth": lambda b: setattr(b.drop_path, "drop_prob", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block(change, backend):
    block, x = block_of(MBConv, PLAIN_MBCONV[1]), channels_last(torch.randn(6, 24, 9, 10))
    CHANGES[change](block)
    for _ in range(2):  # a second step: statistics move on
        block.zero_grad()
        assert is_fused(block, x)
        double, plain = copy.deepcopy(block).double(), copy.deepcopy(block)
        got, expected, exact = (
            step(block, x),
            step(plain, x, plain.forward_children),
            step(double, x.double(), double.forward_children),
        )
        absent = {name for name, tensor in expected.items() if tensor is None}
        assert absent == {name for name, tensor in got.items() if tensor is None}
        assert_2x_of_all(*({name: t for name, t in made.items() if name not in absent} for made in (got, expected, exact)), change)
        for (name, a), (_, b) in zip(block.named_buffers(), plain.named_buffers(), strict=True):
            assert a.is_floating_point() or torch.equal(a, b), name
        for parameter in block.parameters():  # as DistributedDataParallel wants them
            assert parameter.grad is None or parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (MBConv, (3, 2, 2, 6, 3, 2)),
        (MBConv, (5, 1, 3, 4, 3, 1)),
        (MBConv, (3, 1, 2, 5, 4, 0)),
        (MBConv, (5, 1, 3, 3, 3, 2)),
        (FusedMBConv, (3, 2, 2, 5, 3, 0)),
    ],
    ids=str,
)
def test_the_references_gradients_are_the_quotients_of_differences(kind, shape, frozen):
    """In fp64, of x and every parameter: no other code's gradient is believed."""
    block = block_of(kind, shape).double()
    for module in block.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = channels_last(torch.randn(2, shape[2], 5, 4, dtype=FP64)).requires_grad_()
    with effnet_fast.backend("reference"):
        assert is_fused(block, x)
        assert torch.autograd.gradcheck(lambda x, *parameters: block(x), (x, *block.parameters()))


def test_an_input_without_gradient(backend):
    block, x = block_of(MBConv, PLAIN_MBCONV[2]), channels_last(torch.randn(2, 32, 8, 8))
    plain = copy.deepcopy(block)
    assert is_fused(block, x)
    block(x).square().sum().backward()
    plain.forward_children(x).square().sum().backward()
    for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * largest(q.grad), msg=name)


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@TRAINED
def test_a_result_without_gradient():
    """As plain PyTorch: there are no gradients, rather than zeros."""
    block, x = block_of(MBConv, PLAIN_MBCONV[2]), torch.randn(2, 32, 8, 8, requires_grad=True)
    assert is_fused(block, x)
    for run in (block, block.forward_children):
        WithoutGradient.apply(run(x)).sum().backward()
        assert x.grad is None and all(p.grad is None for p in block.parameters())


@TRAINED
def test_training_without_gradients_moves_the_statistics():
    block, x = block_of(MBConv, PLAIN_MBCONV[1]), torch.randn(4, 24, 8, 8)
    plain = copy.deepcopy(block)
    assert is_fused(block, x)
    with torch.no_grad():
        y = block(x)
        expected = plain.forward_children(x)
    assert largest(y - expected) <= 1e-5 * largest(expected)
    assert int(block.bn1.num_batches_tracked) == 1
    torch.testing.assert_close(block.bn2.running_var, plain.bn2.running_var, rtol=1e-5, atol=1e-6)


def test_one_value_a_channel_is_pytorchs_error(backend):
    block = block_of(MBConv, PLAIN_MBCONV[2])
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        block(torch.randn(1, 32, 1, 1))
    assert all(torch.equal(buffer, before[name]) for name, buffer in block.named_buffers())


@TRAINED
def test_an_empty_batch_runs_the_children():
    block = block_of(MBConv, PLAIN_MBCONV[2])
    frozen(block, "bn1", "bn2")
    assert "children one by one: the batch is empty" in seen(block, torch.randn(0, 32, 4, 4))
    y = block(torch.randn(0, 32, 4, 4, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 16, 4, 4)


@TRAINED
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    block, x = block_of(MBConv, PLAIN_MBCONV[1], drop=0.5), channels_last(torch.randn(4, 24, 8, 8))
    assert is_fused(block, x)
    alone = step(copy.deepcopy(block), x)
    again = step(block, x, functools.partial(checkpoint, block, use_reentrant=reentrant))
    for name, tensor in alone.items():
        assert torch.equal(tensor, again[name]) or "running" in name, name  # which move twice, as PyTorch's own do


@TRAINED
def test_gradients_are_added_up_and_scaled():
    block, x = block_of(MBConv, PLAIN_MBCONV[1]), channels_last(torch.randn(4, 24, 8, 8))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    once = copy.deepcopy(block)
    assert is_fused(block, x)
    once(x).square().mean().backward()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    for _ in range(2):
        scaler.scale(block(x).square().mean()).backward()
    scaler.unscale_(optimizer)
    for p, q in zip(block.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * q.grad, rtol=1e-4, atol=1e-5 * largest(q.grad))
    scaler.step(optimizer)


@TRAINED
@pytest.mark.parametrize("how", ["norms", "penalty", "parallel"])
def test_gradients_of_two_processes_are_those_of_one(how, tmp_path):
    """SyncBatchNorm's and DistributedDataParallel's over gloo, on halves of a batch, of different sizes."""
    script = Path(__file__).parent / "two_processes.py"
    commands = [[sys.executable, str(script), str(rank), str(tmp_path), how] for rank in range(2)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    said = [worker.communicate(timeout=300)[0].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    assert "stride" not in "".join(said) and "UserWarning" not in "".join(said), said
    exact, plain, ours = torch.load(tmp_path / "0.pt")
    assert_2x_of_all(ours, plain, exact, "gradients and statistics")


def test_a_backward_in_another_thread_runs_where_the_forward_did():
    """As autograd does it on a GPU."""
    block = block_of(MBConv, (3, 1, 16, 32, 16, 4))
    with backends.backend("reference"):
        y = block(torch.randn(2, 16, 6, 5))
    seen: list = []

    def backward() -> None:
        with backends.tracing() as trace:
            y.sum().backward()
        seen.extend(trace)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert {choice.backend for choice in seen} == {"reference"}


@TRAINED
@pytest.mark.parametrize("size", [(9, 10), (8, 8)], ids=str)
def test_compiled_in_one_graph_it_computes_the_same(size):
    """At any size and with SAME padding; a cumulative average, stochastic depth, and gradients."""
    torch._dynamo.reset()
    block = block_of(MBConv, PLAIN_MBCONV[1], padding="same", drop=0.5)
    block.bn2.momentum = None
    eager, compiled = copy.deepcopy(block), torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (6, 4):
        x = channels_last(torch.randn(count, 24, *size))
        expected, got = step(eager, x), step(block, x, compiled)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5 * largest(tensor), msg=name)
        eager.zero_grad(), block.zero_grad()


@TRAINED
def test_compiled_under_autocast_it_computes_the_same():
    """A compiler traces the backward under autocast too; the squeeze-excite's stays fp32."""
    torch._dynamo.reset()
    block = block_of(MBConv, PLAIN_MBCONV[1])
    eager, compiled = copy.deepcopy(block), torch.compile(block, fullgraph=True, backend="aot_eager")
    x = channels_last(torch.randn(4, 24, 9, 8).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert is_fused(block, x)
        expected, got = step(eager, x), step(block, x, compiled)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5 * largest(tensor), msg=name)


@TRAINED
@pytest.mark.parametrize("freeze", FREEZE, ids=["timm", "torchvision"])
def test_frozen_norm_modules_train(freeze):
    """timm's and torchvision's, which say that they are training and have no momentum."""
    if freeze is torchvision.ops.misc.FrozenBatchNorm2d:
        block = torchvision.models.efficientnet_b0(norm_layer=freeze, stochastic_depth_prob=0.0).features[2][1]
    else:
        block = freeze(their_block(MBConv, BlockConfig(0, 0, 0, "", *PLAIN_MBCONV[1], drop_path=0.0), nn.SiLU, "symmetric"))
    plain, x = copy.deepcopy(block), channels_last(torch.randn(3, 24, 9, 8))
    effnet_fast.accelerate(block)
    assert is_fused(block.train(), x)
    exact = copy.deepcopy(plain).train().double()
    assert_2x_of_all(step(block, x), step(plain.train(), x), step(exact, x.double()))


@TRAINED
def test_statistics_that_are_not_tracked_stay():
    block, x = block_of(MBConv, PLAIN_MBCONV[1]), channels_last(torch.randn(3, 24, 9, 8))
    block.bn2.track_running_stats = False
    before = {name: buffer.clone() for name, buffer in block.bn2.named_buffers()}
    check_step(block, x)
    block(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in block.bn2.named_buffers())
    assert int(block.bn1.num_batches_tracked) == 1


@pytest.mark.parametrize(("name", "strides"), [("bn1", (0,)), ("conv_dw", (0, 0, 3, 1)), ("conv_pw", (1, 1, 1, 1))])
def test_a_parameter_whose_elements_share_memory(name, strides, backend):
    """A broadcast one; autograd gives its gradient memory for each."""
    block, x = block_of(MBConv, PLAIN_MBCONV[1]), channels_last(torch.randn(3, 24, 9, 8))
    module = getattr(block, name)
    module.weight = nn.Parameter(torch.linspace(0.5, 1.5, 400).as_strided(module.weight.shape, strides))
    plain, double = copy.deepcopy(block), copy.deepcopy(block).double()  # in memory for each
    assert is_fused(block, x) and module.weight.stride() == strides
    got, expected = step(block, x), step(plain, x, plain.forward_children)
    assert_2x_of_all(got, expected, step(double, x.double(), double.forward_children))


@TRAINED
def test_biases_may_change_before_the_backward_pass():
    """As in eager PyTorch, whose norms and convolutions do not need them there."""
    block, x = block_of(MBConv, PLAIN_MBCONV[1]), channels_last(torch.randn(3, 24, 9, 8))
    same = copy.deepcopy(block)
    y, expected = block(x), same(x)
    with torch.no_grad():
        for bias in (block.bn1.bias, block.bn3.bias, block.se.conv_reduce.bias, block.se.conv_expand.bias):
            bias.zero_()
    for result in (y, expected):
        (result * result.detach()).sum().backward()
    for (name, changed), kept in zip(block.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(changed.grad, kept.grad), name


@TRAINED
@pytest.mark.parametrize("training", [True, False])
def test_a_squeeze_excite_of_several_dtypes(training):
    """Under autocast plain PyTorch takes parameters of any."""
    block, x = block_of(MBConv, PLAIN_MBCONV[1]), channels_last(torch.randn(3, 24, 9, 8))
    block.residual = False  # else the shortcut is float32, and children run one by one
    block.se.conv_reduce.weight.data = block.se.conv_reduce.weight.data.bfloat16()
    block.se.conv_expand.bfloat16()
    if training:
        check_step(block, x, autocast=torch.bfloat16)
        return
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        block.eval()
        torch.testing.assert_close(block(x), block.forward_children(x), rtol=0.05, atol=0.05)


def test_the_reference_runs_on_any_device():
    block = block_of(MBConv, PLAIN_MBCONV[1]).to("meta")
    with effnet_fast.backend("reference"):
        assert block(torch.empty(2, 24, 8, 8, device="meta")).shape == (2, 24, 8, 8)


@pytest.mark.parametrize(("factor", "parameter"), [(1.02, "conv_dw"), (0.0, "conv_pwl"), (-1.0, "bn3")])
def test_a_wrong_gradient_breaks_the_rule(factor, parameter):
    block, x = block_of(MBConv, PLAIN_MBCONV[1]), channels_last(torch.randn(3, 24, 9, 8))
    got, exact = step(block, x), step(copy.deepcopy(block).double(), x.double())
    plain = {name: tensor.clone() for name, tensor in got.items()}
    assert_2x_of_all(got, plain, exact)
    got[f"gradient of {parameter}.weight"] *= factor
    with pytest.raises(AssertionError, match=f"gradient of {parameter}.weight: off by"):
        assert_2x_of_all(got, plain, exact)


@TRAINED
def test_a_norm_that_stands_twice_is_tracked_twice(monkeypatch):
    """One use after the other: a GPU's one launch for all norms would write its buffers twice at once."""

    def lerp_(tensors, *args, lerp_=torch._foreach_lerp_):
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
        lerp_(tensors, *args)

    monkeypatch.setattr(torch, "_foreach_lerp_", lerp_)
    block = block_of(MBConv, PLAIN_MBCONV[1])
    block.bn2 = block.bn1
    fused, x = copy.deepcopy(block), torch.randn(4, 24, 9, 9)
    with effnet_fast.backend("native"):
        assert is_fused(fused, x)
        fused(x)
    block.forward_children(x)
    assert fused.bn1.num_batches_tracked == block.bn1.num_batches_tracked == 2
    torch.testing.assert_close(fused.bn1.running_mean, block.bn1.running_mean)
    torch.testing.assert_close(fused.bn1.running_var, block.bn1.running_var)


@TRAINED
def test_where_no_kernel_is_the_children_run():
    block = block_of(MBConv, PLAIN_MBCONV[0]).double()
    (reason,) = seen(block, torch.randn(2, 24, 9, 9, dtype=torch.float64))
    assert reason.startswith("children one by one: training: ")
    with (
        pytest.raises(RuntimeError, match="training: backend 'native' was asked for strictly and cannot run: no native kernel for"),
        effnet_fast.backend("native", strict=True),
    ):
        block(torch.randn(2, 24, 9, 9, dtype=torch.float64))
