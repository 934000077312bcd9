"""Training on an NVIDIA GPU: steps of B0 beside timm's, under autocast and a GradScaler too; what they keep; what runs by default.
What can be, runs on the CPU too, by the same code."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from plain import channels_last
from test_gpu import device  # noqa: F401
from test_trainer import PLAIN, batches, net
from tolerance import assert_2x_of_all
from torch import nn

import effnet_fast
from effnet_fast.benchmark import calibrate, images
from effnet_fast.models import create_model
from effnet_fast.ops import triton_backend
from effnet_fast.training import train

WAYS = [(torch.float32, "all"), (torch.bfloat16, "autocast"), (torch.float16, "autocast")]


def backend_of(device: torch.device) -> str:  # noqa: F811
    if device.type == "cpu":
        return "native"
    if (reason := triton_backend.can_run(torch.empty(1, device=device))) is not None:
        pytest.skip(reason)
    return "triton"


def gradients(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, scaler: torch.amp.GradScaler | None = None) -> dict:
    """Loss, every parameter's gradient and the running statistics after one step's forward and backward."""
    labels = torch.arange(len(x), device=x.device) % 10
    with torch.autocast(x.device.type, dtype, enabled=dtype not in (torch.float32, torch.float64)):
        loss = nn.functional.cross_entropy(model(x).to(torch.promote_types(x.dtype, torch.float32)), labels)
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
    statistics = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {"loss": loss.detach()[None]} | {name: p.grad for name, p in model.named_parameters()} | statistics


@pytest.mark.parametrize(("dtype", "how"), WAYS, ids=str)
def test_a_step_of_b0(dtype, how, device):  # noqa: F811
    """Loss scaled up where halves are fp16: nothing overflows, and gradients are those of the loss."""
    timm, arguments = pytest.importorskip("timm"), {"num_classes": 10, "drop_rate": 0.0, "drop_path_rate": 0.0}
    torch.manual_seed(0)
    ours = calibrate(create_model("efficientnet_b0", **arguments), (64, 64))
    theirs = timm.create_model("efficientnet_b0", **arguments)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(device).train(), theirs.to(device).train()
    x = channels_last(images(8, (64, 64)).to(device))
    scalers = [torch.amp.GradScaler(device.type, init_scale=2.0**8) if dtype == torch.float16 else None for _ in range(2)]
    exact = gradients(copy.deepcopy(theirs).double(), x.double(), torch.float64)
    plain = gradients(theirs, x, dtype, scalers[0])
    with effnet_fast.backend(backend_of(device)):
        rows = effnet_fast.explain(copy.deepcopy(ours), x, grad=True)
        made = gradients(ours, x, dtype, scalers[1])
    assert all(row.plain is None for row in rows)
    assert_2x_of_all(made, plain, exact, f"{dtype}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b1"])
def test_what_a_step_keeps(name):
    """By the allocator, in bf16: at most 40 % of eager PyTorch's."""
    timm, kept = pytest.importorskip("timm"), {}
    x = channels_last(images(16, (224, 224)).cuda())
    for made, backend in ((timm.create_model(name), "reference"), (create_model(name), backend_of(torch.device("cuda")))):
        model = made.cuda().train()
        with effnet_fast.backend(backend), torch.autocast("cuda", torch.bfloat16):
            model(x).sum().backward()  # gradients, workspaces
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            y = model(x)
            torch.cuda.synchronize()
            kept[backend] = torch.cuda.memory_allocated() - before
        del y, model
    assert kept["triton"] <= 0.4 * kept["reference"], kept


@pytest.mark.gpu
def test_what_trains_on_a_gpu():
    """By default plain PyTorch; asked for native kernels the depthwise convolutions are those, the rest is Triton's."""
    backend_of(torch.device("cuda"))
    model, x = create_model("efficientnet_b0").cuda().train(), torch.randn(4, 3, 64, 64, device="cuda")
    assert all("its launches take Python longer" in str(row.plain) for row in effnet_fast.explain(model, x, grad=True)[1:-1])
    with effnet_fast.backend("native"):
        rows = effnet_fast.explain(model, x, grad=True)
    assert {choice.backend for row in rows for choice in row.ops} == {"native", "triton"}
    of_depthwise = {choice.backend for row in rows for choice in row.ops if choice.op == "depthwise_conv_stats"}
    assert all(row.plain is None for row in rows) and of_depthwise == {"native"}


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, "bfloat16", "float16"])
def test_a_cuda_graph_trains_as_kernels_one_by_one_do(amp, device):  # noqa: F811
    """Dropout, stochastic depth and a frozen epoch too; a last batch of another size is no part of an epoch."""
    if device.type == "cpu":
        pytest.skip("a CUDA graph is of a GPU")
    recipe = replace(PLAIN, epochs=3, freeze_epochs=1, grad_accum_steps=2, amp=amp is not None, amp_dtype=amp or "bfloat16")
    start, made, scores = net(drop=0.2).state_dict(), [], []
    for cuda_graph in (False, True):
        model = net(drop=0.2)
        with effnet_fast.backend("native"):
            history = train(model, batches(recipe, 16), replace(recipe, cuda_graph=cuda_graph), device=device)
        scores.append([row["train_loss"] for row in history])
        made.append({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    assert scores[1] == pytest.approx(scores[0], rel=1e-4 if amp is None else 2e-2)
    for name, tensor in made[0].items():
        if tensor.is_floating_point():
            moved = (tensor - start[name]).abs().max()
            assert (made[1][name] - tensor).abs().max() <= (1e-3 if amp is None else 0.1) * moved, name
        else:
            assert torch.equal(made[1][name], tensor), name
