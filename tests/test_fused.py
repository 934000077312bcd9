"""In evaluation: fused blocks against timm's, and in networks which blocks are fused, and which run their children and why."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from plain import DTYPES, channels_last
from timm.models import _efficientnet_blocks as timm_blocks
from tolerance import assert_2x, largest

import effnet_fast
from effnet_fast import ops
from effnet_fast.benchmark import calibrate, images
from effnet_fast.models import create_model, efficientnet
from effnet_fast.nn import FusedMBConv, MBConv, SqueezeExcite
from effnet_fast.nn.fused import FusedBlock
from effnet_fast.nn.training import why_not_trained
from effnet_fast.ops import backends, native, triton_backend
from effnet_fast.scaling.config import BlockConfig


def their_block(kind: type, config: BlockConfig, act: type, padding: str) -> torch.nn.Module:
    """timm's block of that configuration, which is plain PyTorch and has the same keys."""
    channels, ratio = (config.in_channels, config.out_channels), config.expanded_channels / config.in_channels
    shared = {"stride": config.stride, "act_layer": act, "pad_type": "same" if padding == "same" else ""}
    if kind is FusedMBConv:
        if config.expands:
            return timm_blocks.EdgeResidual(*channels, config.kernel_size, exp_ratio=ratio, **shared)
        return timm_blocks.ConvBnAct(*channels, config.kernel_size, skip=True, **shared)
    shared |= {"dw_kernel_size": config.kernel_size}
    if config.se_channels:
        shared["se_layer"] = functools.partial(timm_blocks.SqueezeExcite, rd_channels=config.se_channels)
    if config.expands:
        return timm_blocks.InvertedResidual(*channels, exp_ratio=ratio, **shared)
    return timm_blocks.DepthwiseSeparableConv(*channels, **shared)


# kernel, stride, channels in, expanded, out, and of the squeeze-excite.
BLOCKS = [
    (MBConv, (3, 1, 24, 144, 24, 6), "symmetric"),
    (MBConv, (5, 2, 24, 144, 40, 6), "symmetric"),
    (MBConv, (3, 2, 24, 144, 40, 6), "same"),
    (MBConv, (5, 1, 40, 200, 24, 0), "symmetric"),
    (MBConv, (3, 1, 32, 32, 16, 8), "symmetric"),
    (MBConv, (5, 1, 13, 13, 13, 3), "same"),
    (FusedMBConv, (3, 1, 24, 96, 24, 0), "symmetric"),
    (FusedMBConv, (3, 2, 24, 96, 48, 0), "same"),
    (FusedMBConv, (3, 1, 24, 24, 24, 0), "symmetric"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", [torch.nn.SiLU, torch.nn.ReLU6])
@pytest.mark.parametrize(("kind", "shape", "padding"), BLOCKS, ids=str)
def test_a_block_alone(kind, shape, padding, act, dtype):
    torch.manual_seed(0)
    config = BlockConfig(0, 0, 0, "", *shape, drop_path=0.0)
    ours, theirs = kind(config, torch.nn.BatchNorm2d, act, padding).eval(), their_block(kind, config, act, padding).eval()
    for name, tensor in theirs.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith(("weight", "var")) else -0.5))
    ours.load_state_dict(theirs.state_dict())
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), channels_last(torch.randn(2, config.in_channels, 13, 16).to(dtype))
    with torch.no_grad(), backends.tracing() as trace:
        y = ours(x)
        assert [choice.op for choice in trace] == [
            *["pointwise_conv_bn_act"] * (kind is MBConv and config.expands),
            *["depthwise_conv_bn_act"] * (kind is MBConv),
            *["squeeze_excite_gate"] * (config.se_channels > 0),
            *["conv_bn_act"] * (kind is FusedMBConv),
            *["pointwise_conv_bn_act"] * (kind is MBConv or config.expands),
        ]
        assert_2x(y, theirs(x), copy.deepcopy(theirs).double()(x.double()), str(config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squeeze_excite_alone(dtype):
    """The module, which is plain; fused it is a part of MBConv."""
    torch.manual_seed(0)
    theirs = timm_blocks.SqueezeExcite(40, rd_channels=9, act_layer=torch.nn.SiLU).to(dtype)
    ours, x = SqueezeExcite(40, 9, torch.nn.SiLU).to(dtype), channels_last(torch.randn(3, 40, 7, 6).to(dtype))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert_2x(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()))


def test_every_block_is_fused_in_eval_and_in_training():
    model = efficientnet(depth=0.5, width=0.5).eval()
    x = torch.zeros(1, 3, 32, 32)
    rows = effnet_fast.explain(model, x)
    assert all(row.plain is None for row in rows)
    assert [row.name for row in rows] == [
        "stem",
        *(name for name, module in model.named_modules() if isinstance(module, FusedBlock)),
        "head",
    ]
    assert {choice.op for row in rows for choice in row.ops} == {
        "conv_bn_act",
        "depthwise_conv_bn_act",
        "pointwise_conv_bn_act",
        "squeeze_excite_gate",
    }
    assert "native" in str(rows) and f"triton: {triton_backend.can_run(x)}" in str(rows)
    for mode in (model, model.train()):
        with effnet_fast.backend("native"):
            rows = effnet_fast.explain(mode, torch.zeros(2, 3, 64, 64), grad=True)
        assert all(row.plain is None and row.ops[-1].op == "norm_act" for row in rows)
        assert {choice.op for row in rows for choice in row.ops} == {
            "conv_stats",
            "depthwise_conv_stats",
            "pointwise_conv_stats",
            "norm_vectors",
            "norm_act_mean",
            "norm_act",
            "squeeze_excite_gate",
        }
    with pytest.raises(ValueError, match="accelerate"):
        effnet_fast.explain(torch.nn.Conv2d(3, 3, 1), x)


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
@pytest.mark.parametrize(
    ("name", "dtype", "size", "batch", "plain"),
    [
        ("efficientnet_b0", torch.float32, 224, 6, {"6.0": "512 channels around a 3x3"}),
        ("efficientnet_b0", torch.float32, 64, 4, {"5.1": "16 pixels of 1152 channels", "5.3": "16 pixels", "6.0": "16 pixels"}),
        ("efficientnet_b0", torch.bfloat16, 224, 6, dict.fromkeys(("3.1", "3.2", "6.0"), "torch.bfloat16: PyTorch's products")),
        ("efficientnetv2_s", torch.float32, 384, 2, {"5.1": "512 channels around a 3x3"}),
    ],
)
def test_training_leaves_to_pytorch_what_it_does_faster(name, dtype, size, batch, plain):
    model, size, reasons = create_model(name).train().to(dtype), (size + 1) // 2, {}
    for block in model.config.blocks():
        key, x = f"{block.stage}.{block.layer}", torch.empty(1, dtype=dtype).expand(batch, block.in_channels, size, size)
        reasons[key] = why_not_trained(model.get_submodule(f"blocks.{key}").parts(), x)
        size = (size + block.stride - 1) // block.stride
    for key, says in plain.items():
        assert says in str(reasons[key]), key
    assert reasons["0.0"] is None
    with effnet_fast.backend("native"):
        assert why_not_trained(model.get_submodule("blocks.5.1").parts(), x) is None


def test_launches_of_b0():
    model = create_model("efficientnet_b0").eval()
    with torch.no_grad():
        rows = effnet_fast.explain(model, torch.zeros(1, 3, 64, 64))
    assert sum(len(row.ops) for row in rows) == 65  # 1 stem, 3 + 15 * 4 for the blocks, 1 head


def _hook(module=None, args=None, output=None):
    _hook.calls += 1


def _circular(x, weight, bias):
    return torch.nn.functional.conv2d(x.roll(1, 2), weight, bias)


class Circular(torch.nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.roll(1, 2), weight, bias)


SURGERY = {
    "hook on a convolution": lambda b: b.conv_dw.register_forward_hook(_hook),
    "hook on a norm": lambda b: b.bn2.register_forward_pre_hook(_hook),
    "hook inside the squeeze-excite": lambda b: b.se.conv_reduce.register_forward_hook(_hook),
    "hook on the drop path": lambda b: b.drop_path.register_forward_hook(_hook),
    "group norm": lambda b: setattr(b, "bn2", torch.nn.GroupNorm(4, b.bn2.num_features)),
    "another activation": lambda b: setattr(b, "act2", torch.nn.GELU()),
    "another drop path": lambda b: setattr(b, "drop_path", torch.nn.Dropout(0.5)),
    "a convolution computing otherwise": lambda b: setattr(b.conv_pw, "_conv_forward", _circular),
    "another class's _conv_forward": lambda b: setattr(b.conv_dw, "__class__", Circular),
    "a stride that is a number": lambda b: setattr(b.conv_dw, "stride", 1),
    "a parametrized bias": lambda b: torch.nn.utils.parametrize.register_parametrization(b.se.conv_reduce, "bias", torch.nn.Tanh()),
    "a wrapped convolution": lambda b: setattr(b, "conv_dw", torch.nn.Sequential(b.conv_dw)),
    "relu in one place": lambda b: setattr(b, "act1", torch.nn.ReLU()),
    "another squeeze-excite": lambda b: setattr(b, "se", torch.nn.Dropout(0.5)),
    "another gate": lambda b: setattr(b.se, "gate", torch.nn.Hardsigmoid()),
    "a biased convolution": lambda b: setattr(b, "conv_pw", torch.nn.Conv2d(b.conv_pw.in_channels, b.conv_pw.out_channels, 1)),
    "a dilated convolution": lambda b: setattr(
        b, "conv_dw", torch.nn.Conv2d(b.bn1.num_features, b.bn1.num_features, 3, padding=2, dilation=2, groups=b.bn1.num_features)
    ),
    "weight normalisation": lambda b: torch.nn.utils.parametrizations.weight_norm(b.conv_pwl),
}


@pytest.mark.parametrize("what", SURGERY)
def test_a_changed_block_runs_its_children(what):
    torch.manual_seed(0)
    model = efficientnet(depth=1.0, width=0.5).eval()
    block = model.blocks[1][1]
    assert isinstance(block, MBConv)
    _hook.calls = 0
    SURGERY[what](block)
    block.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        rows = {row.name: row for row in effnet_fast.explain(model, x)}
        assert rows["blocks.1.1"].plain and rows["blocks.1.0"].plain is None
        if what.startswith("hook"):
            assert _hook.calls == 1 and "hook" in rows["blocks.1.1"].plain


def test_global_hooks_fire_for_every_child():
    from torch.nn.modules.module import register_module_forward_hook

    model = efficientnet(depth=0.5, width=0.5).eval()
    called = []
    handle = register_module_forward_hook(lambda module, args, output: called.append(module))
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))
    finally:
        handle.remove()
    unused = {block.drop_path for block in model.modules() if isinstance(block, MBConv) and not block.residual}
    assert set(called) == set(model.modules()) - unused


@pytest.mark.parametrize("pad_type", ["", "same"])
def test_another_stem_may_stand_in_its_place(pad_type):
    """The idiom of everyone with grey images, and of those who wrap: its channels and its zeros are its own."""
    torch.manual_seed(0)
    model = efficientnet(depth=0.5, width=0.5, num_classes=3, pad_type=pad_type).eval()
    channels = model.conv_stem.out_channels
    model.conv_stem = torch.nn.Conv2d(1, channels, 3, 2, 1, bias=False)
    assert model.forward_stem(torch.randn(2, 1, 33, 33)).shape[2:] == (17, 17)
    model.conv_stem = torch.nn.Sequential(torch.nn.Conv2d(5, 3, 1), torch.nn.Conv2d(3, channels, 3, 2, bias=False))
    model.set_weights_convention(padding="same")
    with torch.no_grad():
        assert model(torch.randn(2, 5, 32, 32)).shape == (2, 3)


def test_autocast_leaves_the_shortcut_as_it_is():
    """A block with float32 images adds them as they are, and gives float32."""
    block = create_model("efficientnet_b0").eval().blocks[1][1]
    x = torch.randn(2, 24, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with backends.tracing() as trace:
            y = block(x)
        expected = block.forward_children(x)
    assert y.dtype == expected.dtype == torch.float32 and torch.equal(y, expected)
    assert "the shortcut is torch.float32" in str(trace[0])


def test_forward_mode_derivative_is_not_lost():
    import torch.autograd.forward_ad as forward_ad

    model, x = calibrate(efficientnet(depth=0.3, width=0.5)).requires_grad_(False), images(1, (48, 48))
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(got, torch.func.jvp(model, (x,), (tangent,))[1])
    assert largest(got) > 1e-3


def test_data_parallel_replicas_are_fused_and_right():
    """A replica's parameters are plain attributes."""
    model, x = calibrate(efficientnet(depth=0.3, width=0.5)), images(2, (48, 48))
    block = model.blocks[1][0]
    replica = block._replicate_for_data_parallel()
    for name, child in block.named_children():
        setattr(replica, name, _replicated(child))
    with torch.no_grad():
        y = model.blocks[0](model.forward_stem(x))
        assert not isinstance(replica.parts(), str), replica.parts()
        torch.testing.assert_close(replica(y), block(y))


def _replicated(module: torch.nn.Module) -> torch.nn.Module:
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach())
    for name, child in module.named_children():
        setattr(replica, name, _replicated(child))
    return replica


def test_hooks_on_blocks_and_stages_fire_in_the_fused_path():
    model = efficientnet(depth=0.5, width=0.5).eval()
    _hook.calls = -2
    for module in (model.blocks[2][0], model.blocks[2], model.blocks):
        module.register_forward_hook(_hook)
    with torch.no_grad():
        assert effnet_fast.explain(model, torch.zeros(1, 3, 32, 32))[3].plain is None
    assert _hook.calls == 1


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_stem_takes_either_layout_as_it_is(backend, monkeypatch):
    """No copy of the image comes before the fused stem; its output is channels_last, as are all that follow."""
    reason = backends.reasons()[backend]["conv_bn_act"]
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    model, given = create_model("efficientnet_b0").eval(), []
    fused = ops.conv_bn_act
    monkeypatch.setattr(ops, "conv_bn_act", lambda x, *args, **kwargs: given.append(x) or fused(x, *args, **kwargs))
    x = images(2, (33, 32))
    with torch.no_grad(), effnet_fast.backend(backend, strict=True):
        stems = [model.forward_stem(view) for view in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, 1:])]
    assert given[0] is x and len(given) == 3
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in stems)
    torch.testing.assert_close(stems[0], stems[1])


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0"])
@pytest.mark.parametrize("act", [torch.nn.SiLU, torch.nn.PReLU])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_stem_and_head_are_channels_last_in_every_case(training, act, name):
    model = create_model(name, act_layer=act).train(training)
    for x in (torch.randn(2, 3, 33, 32), torch.randn(2, 33, 32, 3).permute(0, 3, 1, 2)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert model.forward_stem(x).is_contiguous(memory_format=torch.channels_last)
                assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)
