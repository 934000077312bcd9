"""Accelerated blocks one by one: hooks, changed children, and every reason why a block is not taken."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from peers import BLOCKS, block_and_input, outcome, timm, torchvision
from timm.layers import norm_act
from timm.models import _efficientnet_blocks as timm_blocks
from tolerance import assert_2x, assert_2x_of_all, largest
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

import effnet_fast
from effnet_fast.benchmark import images
from effnet_fast.interop import accelerate, restore


def fires(block: nn.Module, x: torch.Tensor, name: str, register: str) -> tuple[int, list[str]]:
    """How often a hook on the child ``name`` fires in one call of ``block``, and the ops that the call uses."""
    calls = []
    handle = getattr(block.get_submodule(name), register)(lambda *_: calls.append(name))
    ops = outcome(block, x)[1]
    handle.remove()
    return len(calls), ops


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_hooks_fire(kind, register):
    plain, x = block_and_input(kind)
    fused = copy.deepcopy(plain)
    accelerate(fused)
    names = [name for name, _ in plain.named_modules()]
    for name in names[1:]:
        expected, got = fires(plain, x, name, register)[0], fires(fused, x, name, register)
        assert got[0] == expected and (expected == 0 or not got[1]), f"{name}: {got}, in the plain block {expected}"
    calls, ops = fires(fused, x, "", register)
    assert calls == 1 and ops, "a hook on the block itself fires, and the block stays fused"
    with torch.no_grad():
        ref64 = copy.deepcopy(plain).double()(x.double())
        assert_2x(fused(x), plain(x), ref64, kind)


@pytest.mark.parametrize("kind", BLOCKS)
def test_at_most_four_ops(kind):
    block, x = block_and_input(kind)
    accelerate(block)
    ops = outcome(block, x)[1]
    assert 1 <= len(ops) <= 4
    if "MBConv" in kind and "Fused" not in kind and "MBConv1" not in kind:
        assert ops == ["pointwise_conv_bn_act", "depthwise_conv_bn_act", "squeeze_excite_gate", "pointwise_conv_bn_act"]


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_forward_keeps_its_signature(kind):
    block, x = block_and_input(kind)
    plain = copy.deepcopy(block)
    accelerate(block)
    keyword = {"timm": "x", "torchvision": "input", "lukemelas": "inputs"}[kind.split()[0]]
    with torch.no_grad():
        assert torch.equal(block(**{keyword: x}), block(x))
        if kind.startswith("lukemelas"):
            assert torch.equal(block(x, drop_connect_rate=0.9), block(x))  # drops in training only
            block.train(), plain.train()
            torch.manual_seed(3)
            expected = plain(x, drop_connect_rate=0.5)
            torch.manual_seed(3)
            assert largest(block(x, drop_connect_rate=0.5) - expected) <= 1e-5 * largest(expected)


def set_child(name: str, make):
    """A change of a block: its child ``name`` becomes ``make(child)``."""

    def change(block: nn.Module) -> None:
        block.set_submodule(name, make(block.get_submodule(name)))

    return change


def set_attribute(name: str, value):
    owner, _, attribute = name.rpartition(".")
    return lambda block: setattr(block.get_submodule(owner), attribute, value)


def conv(*arguments, bias=False, **keywords):
    return lambda old: nn.Conv2d(old.in_channels, old.out_channels, *arguments, bias=bias, **keywords)


class Sniffing(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).abs()


class OwnForward(timm_blocks.InvertedResidual):
    def forward(self, x):
        return super().forward(x) * 2


def subclass(cls: type):
    return lambda block: setattr(block, "__class__", cls)


def same_conv(old):
    return timm.layers.Conv2dSame(old.in_channels, old.out_channels, 1, bias=False)


def spectral(block):
    parametrizations.spectral_norm(block.conv_pw).eval()


def sparse(block):
    prune.l1_unstructured(block.conv_pw, "weight", 0.3)


IR, DS, ER, CBA = "timm InvertedResidual", "timm DepthwiseSeparableConv", "timm EdgeResidual", "timm ConvBnAct"
MB, FMB, LUKE = "torchvision MBConv", "torchvision FusedMBConv", "lukemelas MBConvBlock"
# kind of block, change, reason. The changed block computes something else, which the fused forward must not hide.
REFUSALS = [
    (IR, set_child("bn1", lambda old: norm_act.GroupNormAct(old.num_features, 2)), "a norm is a GroupNormAct"),
    (IR, set_child("bn2", lambda old: timm.layers.EvoNorm2dB0(old.num_features)), "a norm is a EvoNorm2dB0"),
    (IR, set_child("bn1.act", lambda old: nn.Hardswish()), "an activation is Hardswish"),
    (IR, set_child("bn2.drop", lambda old: nn.Threshold(0.1, 0.0)), "a norm drops by Threshold"),
    (IR, set_child("conv_pw", conv(1, bias=True)), "bias-free"),
    (IR, set_child("conv_pw", conv(1, groups=4)), "has 4 groups"),
    (IR, set_child("conv_pwl", conv(3, padding=1)), "a pointwise convolution has kernel size"),
    (IR, set_child("conv_pwl", conv(1, groups=2)), "has 2 groups"),
    (IR, set_child("conv_dw", conv(3, padding=1)), "a depthwise convolution has 1 groups"),
    (IR, set_child("conv_dw", conv(3, padding=2, dilation=2, groups=144)), "undilated"),
    (IR, set_child("conv_dw", conv(3, padding=1, padding_mode="reflect", groups=144)), "zeros as padding"),
    (IR, set_child("conv_dw", conv(3, padding="same", groups=144)), "zeros as padding"),
    (IR, set_child("conv_dw", lambda old: timm.layers.MixedConv2d(144, 144, [3, 5], depthwise=True)), "a MixedConv2d"),
    (IR, set_child("conv_pw", lambda old: Sniffing(old.in_channels, old.out_channels, 1, bias=False)), "a Sniffing"),
    (IR, set_child("conv_pw", lambda old: nn.Sequential(old, nn.Tanh())), "a convolution is a Sequential"),
    (IR, spectral, "a convolution is parametrized"),
    (IR, sparse, "a hook sits on a child"),
    (IR, set_child("se", lambda old: timm.layers.EffectiveSEModule(144)), "the squeeze-excite is a EffectiveSEModule"),
    (IR, set_child("se", lambda old: timm.layers.EcaModule(144)), "the squeeze-excite is a EcaModule"),
    (IR, set_child("se.gate", lambda old: nn.Hardsigmoid()), "a Hardsigmoid, not a sigmoid"),
    (IR, set_child("se.act1", lambda old: nn.GELU()), "an activation is GELU"),
    (IR, set_child("se.conv_reduce", lambda old: nn.Sequential(old, nn.Tanh())), "squeeze-excite was replaced"),
    (IR, set_child("se.conv_expand", lambda old: nn.Conv2d(old.in_channels, 144, 1, groups=2)), "squeeze-excite is Conv2d"),
    (IR, set_child("aa", lambda old: nn.AvgPool2d(3, 1, 1)), "it blurs where it strides, by a AvgPool2d"),
    (IR, set_child("drop_path", lambda old: nn.Tanh()), "the drop-path is a Tanh"),
    (IR, set_child("conv_pw", same_conv), None),  # a SAME 1x1 is a 1x1: taken
    (IR, subclass(OwnForward), "OwnForward has a forward of its own, not InvertedResidual's"),
    (IR, lambda block: block.conv_pw.register_forward_hook(lambda *_: None), "a hook sits on a child"),
    (IR, lambda block: setattr(block.bn1, "forward", lambda x: x), "a hook sits on a child"),
    (IR, lambda block: setattr(block, "forward", lambda x: x), "its forward was replaced on the instance"),
    (ER, set_child("se", lambda old: timm_blocks.SqueezeExcite(192)), "a squeeze-excite follows its dense convolution"),
    (
        IR,
        set_child("conv_dw", lambda old: timm.layers.Conv2dSame(144, 144, (3, 5), groups=144, bias=False)),
        "pads to the same size",
    ),
    (ER, set_child("conv_exp", lambda old: timm.layers.Conv2dSame(48, 192, 2, 3, bias=False)), "pads to the same size over"),
    (CBA, set_child("conv", conv((3, 3), (1, 1), (1, 1), groups=3)), "has 3 groups"),
    (CBA, set_child("bn1.act", lambda old: nn.Mish()), "an activation is Mish"),
    (DS, set_child("conv_pw", conv(1, padding=1)), "pads by"),
    (MB, set_child("block.0", lambda old: nn.Sequential(*old, nn.Tanh())), "a layer is a Sequential"),
    (MB, set_child("block.0.2", lambda old: nn.Tanh()), "an activation is Tanh"),
    (MB, set_child("block.1.1", lambda old: nn.InstanceNorm2d(144)), "a norm is a InstanceNorm2d"),
    (MB, set_child("block.2", lambda old: nn.Identity()), "the squeeze-excite is a Identity"),
    (MB, set_child("block.2.avgpool", lambda old: nn.AdaptiveMaxPool2d(1)), "the pooling of the squeeze-excite is"),
    (MB, set_child("block.2.scale_activation", lambda old: nn.Tanh()), "a Tanh, not a sigmoid"),
    (MB, set_child("block.3.0", conv(3, padding=1)), "a pointwise convolution has kernel size"),
    (MB, set_child("block", lambda old: nn.Sequential(*old, nn.Tanh())), "its layers were replaced"),
    (MB, set_child("stochastic_depth", lambda old: StochasticDepth(0.1, "batch")), "not one by rows"),
    (MB, set_child("stochastic_depth", lambda old: nn.Tanh()), "not one by rows"),
    (FMB, set_child("block", lambda old: nn.Sequential(*old, nn.Tanh())), "its layers were replaced"),
    (FMB, set_child("block.0.0", conv((3, 1), padding=(1, 0))), None),  # an uneven kernel is a dense convolution: taken
    (LUKE, set_child("_swish", lambda old: nn.Tanh()), "the activation is Tanh"),
    (LUKE, set_child("_swish", lambda old: nn.SiLU()), None),
    (LUKE, set_child("_bn1", lambda old: nn.GroupNorm(2, 144)), "a norm is a GroupNorm"),
    (LUKE, set_child("_depthwise_conv.static_padding", lambda old: nn.ReflectionPad2d(1)), "pads by a ReflectionPad2d"),
    (LUKE, set_child("_project_conv.static_padding", lambda old: nn.ZeroPad2d(1)), "pads by"),
    (LUKE, set_attribute("_depthwise_conv.padding", (1, 1)), "pads by"),
    (LUKE, set_child("_se_reduce.static_padding", lambda old: nn.ZeroPad2d(1)), "a convolution of the squeeze-excite pads"),
    (LUKE, set_child("_se_expand", lambda old: nn.Sequential(old, nn.Tanh())), "squeeze-excite was replaced"),
]


@pytest.mark.parametrize(("kind", "change", "reason"), REFUSALS, ids=[f"{kind}: {why}" for kind, _, why in REFUSALS])
def test_changed_blocks(kind, change, reason):
    """A change before acceleration is refused with the reason; after it, the block computes what the changed block computes."""
    plain, x = block_and_input(kind)
    late = copy.deepcopy(plain)
    torch.manual_seed(0)
    change(plain)
    try:
        expected = outcome(plain, x)[0]
    except RuntimeError:  # shapes that no longer fit fail in either block
        expected = None
    if reason is None:
        with torch.no_grad():
            ref64 = copy.deepcopy(plain).double()(x.double())
        accelerate(plain)
        out, ops, _ = outcome(plain, x)
        assert ops
        assert_2x(out, expected, ref64)
        return
    cls = type(plain)
    with pytest.raises(ValueError, match=reason):
        accelerate(plain)
    assert type(plain) is cls

    accelerate(late)
    if "its forward" in reason or "of its own" in reason:  # set over the accelerated class, these hide it by themselves
        return
    torch.manual_seed(0)
    change(late)
    if expected is None:
        with pytest.raises(RuntimeError):
            late(x)
        return
    out, ops, reasons = outcome(late, x)
    assert not ops and torch.equal(out, expected), "the change was hidden"
    assert reasons


def test_other_nets_of_timm():
    """Nets of which only some blocks are understood: the rest is named with the reason."""
    expected = {
        "mobilenetv3_large_100": (3, {"not a sigmoid", "Hardswish"}),
        "mixnet_s": (1, {"MixedConv2d"}),
        "tf_efficientnet_cc_b0_4e": (8, {"CondConvResidual has a forward of its own"}),
        "mobilenetv4_conv_small": (5, {"no adapter for timm.models._efficientnet_blocks.UniversalInvertedResidual"}),
    }
    for name, (taken, reasons) in expected.items():
        model = timm.create_model(name).eval()
        plain, x = copy.deepcopy(model), images(1, (65, 64))
        count = sum(type(module).__module__ == timm_blocks.__name__ and hasattr(module, "drop_path") for module in model.modules())
        report = accelerate(model)
        assert len(report.taken) == taken and len(report.taken) + len(report.skipped) == count, name
        for reason in reasons:
            assert any(reason in given for given in report.skipped.values()) and reason in str(report), (name, reason)
        with torch.no_grad():
            assert_2x(model(x), plain(x), plain.double()(x.double()), name)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"norm_layer": functools.partial(timm.layers.GroupNormAct, num_groups=8)}, "a norm is a GroupNormAct"),
        ({"act_layer": nn.Mish}, "an activation is Mish"),
        ({"aa_layer": timm.layers.BlurPool2d}, "it blurs where it strides, by a BlurPool2d"),
        ({"se_layer": timm.layers.EcaModule}, "the squeeze-excite is a EcaModule"),
    ],
    ids=str,
)
def test_variants_of_timm(arguments, reason):
    model = timm.create_model("efficientnet_b0", num_classes=2, **arguments)
    try:
        skipped = "; ".join(accelerate(model).skipped.values())
    except ValueError as error:
        skipped = str(error)
    assert reason in skipped


def test_space_to_depth_is_refused():
    block = timm_blocks.InvertedResidual(8, 8, 3, stride=2, s2d=1)
    with pytest.raises(ValueError, match="it begins with a space-to-depth convolution"):
        accelerate(block)


def test_a_subclass_with_the_same_forward_is_taken():
    class Mine(timm_blocks.InvertedResidual):
        pass

    block = Mine(8, 8, 3).eval()
    report = accelerate(block)
    assert report.taken == ("Mine",) and isinstance(block, Mine) and type(block).__name__ == "Mine"
    restore(block)
    assert type(block) is Mine


def test_activation_after_the_projection():
    """timm's depthwise separable block may have one (``pw_act``), before the shortcut."""
    block = timm_blocks.DepthwiseSeparableConv(8, 8, 3, pw_act=True, act_layer=nn.ReLU6).eval()
    plain, x = copy.deepcopy(block), images(2, (9, 12), 8)
    accelerate(block)
    out, ops, _ = outcome(block, x)
    with torch.no_grad():
        expected = plain(x)
        assert_2x(out, expected, plain.double()(x.double()))
    assert ops == ["depthwise_conv_bn_act", "pointwise_conv_bn_act"]


@pytest.mark.parametrize("how", ["eval", "timm's frozen", "torchvision's frozen"])
def test_frozen_norms(how):
    if how == "torchvision's frozen":
        block = torchvision.models.efficientnet_b0(norm_layer=FrozenBatchNorm2d, stochastic_depth_prob=0.0).features[2][1]
        x = images(2, (13, 16), 24)
    else:
        block, x = block_and_input("timm InvertedResidual")
        if how == "timm's frozen":
            block = norm_act.freeze_batch_norm_2d(block)
    plain = copy.deepcopy(block)
    accelerate(block)
    for model in (plain, block):
        model.train(how == "eval")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    ref64 = copy.deepcopy(plain).double()
    out, ops, _ = outcome(block, x)
    with torch.no_grad():
        assert_2x(out, plain(x), ref64(x.double()), how)
    assert ops
    grads = []
    for model in (block, plain, ref64):
        of_inputs = []
        for number in range(8):  # of one a small difference of large sums may be lucky
            model.zero_grad()
            model(x.roll(number, 2).to(next(model.parameters()).dtype)).square().sum().backward()
            of_inputs.append({key: p.grad for key, p in model.named_parameters()})
        grads.append({key: torch.stack([made[key] for made in of_inputs]) for key in of_inputs[0]})
    assert_2x_of_all(*grads, how)


def test_own_blocks_are_fused_already():
    model = effnet_fast.create_model("efficientnet_b0", num_classes=2)
    classes = [type(module) for module in model.modules()]
    report = accelerate(model)
    assert len(report.taken) == 16 and [type(module) for module in model.modules()] == classes
    restore(model)
    assert [type(module) for module in model.modules()] == classes
