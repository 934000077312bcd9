"""The family against timm and torchvision: keys, parameters, logits, features and gradients; and the surface people expect."""

from __future__ import annotations

import copy
import subprocess
import sys

import cases  # noqa: F401  (the table imports the family: a broken row fails here first)
import pytest
import timm
import torch
from plain import without_kinks
from tolerance import assert_2x, assert_2x_of_all, largest

import effnet_fast
from effnet_fast.benchmark import calibrate, images
from effnet_fast.models import CLASSICS, FAMILY, create_model, efficientnet, list_models
from effnet_fast.nn import MBConv
from effnet_fast.scaling.law import CompoundScaling

IN_TIMM = [name for name in FAMILY if not name.startswith("efficientnetv2_b")]


@pytest.mark.parametrize("name", IN_TIMM)
def test_keys_are_timms(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
        features, their_features = create_model(name, features_only=True), timm.create_model(name, features_only=True)
    for a, b in ((ours, theirs), (features, their_features)):
        assert [(k, v.shape) for k, v in a.state_dict().items()] == [(k, v.shape) for k, v in b.state_dict().items()]
    for method in ("channels", "reduction", "module_name"):
        assert getattr(features.feature_info, method)() == getattr(their_features.feature_info, method)()
    norms = [[m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)] for net in (ours, theirs)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("name", ["b0", "b1", "b2", "b3"])
def test_v2_base_differs_from_its_tf_form_in_convention_only(name):
    with torch.device("meta"):
        ours, theirs = create_model(f"efficientnetv2_{name}"), timm.create_model(f"tf_efficientnetv2_{name}")
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [(k, v.shape) for k, v in theirs.state_dict().items()]


PARITY = [
    ("efficientnet_b0", (224, 224)),
    ("efficientnet_b0", (97, 130)),
    ("efficientnet_b4", (65, 96)),
    ("efficientnet_b5", (64, 51)),
    ("tf_efficientnet_b3", (96, 96)),
    ("tf_efficientnet_b3", (75, 98)),
    ("efficientnetv2_s", (64, 81)),
    ("efficientnet_lite0", (224, 224)),
    ("efficientnet_lite0", (49, 70)),
]


@pytest.mark.parametrize(("name", "size"), PARITY, ids=[f"{n}-{h}x{w}" for n, (h, w) in PARITY])
def test_logits_and_features_agree_with_timm(name, size):
    torch.manual_seed(0)
    ours = calibrate(create_model(name), size)
    theirs = timm.create_model(name).eval()
    theirs.load_state_dict(ours.state_dict())
    double = copy.deepcopy(theirs).double()
    x = images(4, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ref = double(x.double())
        assert_2x(ours(x), theirs(x), ref, "logits, fused")
        ours_features, their_features = ours.forward_features(x), theirs.forward_features(x)
        assert_2x(ours_features, their_features, double.forward_features(x.double()), "features")
        maps = ours.forward_intermediates(x, intermediates_only=True)
        refs = double.forward_intermediates(x.double(), intermediates_only=True)
        for a, b, r in zip(maps, theirs.forward_intermediates(x, intermediates_only=True), refs, strict=True):
            assert_2x(a, b, r, "intermediates")
    assert_2x(ours(x).detach(), theirs(x).detach(), ref, "logits, children one by one")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", sorted({name for name, _ in PARITY}))
def test_gradients_agree_with_timm(name, training):
    torch.manual_seed(0)
    smooth = without_kinks(name)
    ours = calibrate(create_model(name, drop_rate=0.0, drop_path_rate=0.0, num_classes=10, **smooth), (65, 52))
    theirs = timm.create_model(name, num_classes=10, **smooth)
    theirs.load_state_dict(ours.state_dict())
    double = copy.deepcopy(theirs).double()
    x = images(4, (65, 52)).contiguous(memory_format=torch.channels_last)
    target = torch.tensor([1, 2, 3, 4])
    grads = []
    for net in (ours, theirs, double):
        net.train(training)
        batch = x.detach().to(next(net.parameters()).dtype).clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(net(batch), target)
        loss.backward()
        grads.append({"x": batch.grad, **{name: p.grad for name, p in net.named_parameters()}})
    assert grads[0].keys() == grads[1].keys()
    assert_2x_of_all(*grads, "gradients")
    assert largest(grads[2]["x"]) > 1e-4
    if training:
        statistics = [
            torch.cat([b.flatten() for n, b in net.named_buffers() if n.endswith(("mean", "var"))])
            for net in (ours, theirs, double)
        ]
        assert_2x(*statistics, "running statistics")


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b4", "efficientnet_b5", "efficientnet_v2_s"])
def test_agrees_with_torchvision(name):
    import torchvision

    from effnet_fast.weights import key_map

    torch.manual_seed(0)
    theirs = calibrate(getattr(torchvision.models, name)(), (64, 83))
    ours = create_model(name.replace("_v2_", "v2_")).eval()
    state = theirs.state_dict()
    ours.load_state_dict({key: state[other] for key, other in key_map(ours.config, "torchvision").items()})
    eps = theirs.features[0][1].eps
    ours.set_weights_convention(bn_eps=eps)
    double = copy.deepcopy(theirs).double()
    x = images(4, (64, 83)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_2x(ours(x), theirs(x), double(x.double()), "logits")
        assert_2x(ours.forward_features(x), theirs.features(x), double.features(x.double()), "features")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype):
    torch.manual_seed(0)
    ours = calibrate(create_model("efficientnet_b0"))
    theirs = timm.create_model("efficientnet_b0").eval()
    theirs.load_state_dict(ours.state_dict())
    x = images(2, (64, 64))
    with torch.no_grad():
        ref = copy.deepcopy(theirs).double()(x.double())
        with torch.autocast("cpu", dtype):
            assert_2x(ours(x), theirs(x), ref, "autocast")
        ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
        assert_2x(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()), "half")


def test_runs_on_the_meta_device():
    with torch.device("meta"), torch.no_grad():
        assert create_model("efficientnet_b7").eval()(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


def test_convention_changes_what_is_given_only():
    model = efficientnet(depth=0.3, width=0.5)
    model.bn1.momentum = 0.01
    model.set_weights_convention(bn_eps=1e-3)
    assert model.bn1.momentum == 0.01 and model.bn1.eps == model.config.bn_eps == 1e-3
    with pytest.raises(ValueError, match="padding is 'valid'"):
        model.set_weights_convention(padding="valid")
    assert model.config.padding == "symmetric"


def test_scripting_is_refused_clearly():
    with pytest.raises(TypeError, match="torch.jit.trace would do"):
        torch.jit.script(efficientnet(depth=0.3, width=0.5))


def test_frozen_batch_norm_inside_training():
    """Norms frozen by eval() inside a training model, without gradients: stochastic depth alone decides."""
    model = efficientnet(depth=1.0, width=0.5, drop_path_rate=0.2).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad(), effnet_fast.backend("native"):
        rows = effnet_fast.explain(model, torch.zeros(2, 3, 32, 32))
    drops = {f"blocks.{b.stage}.{b.layer}" for b in model.config.blocks() if b.residual and b.drop_path}
    assert {row.name for row in rows if any("stats" in choice.op for choice in row.ops)} == drops
    assert not any(row.plain for row in rows)


def test_stochastic_depth_is_per_row_and_linear():
    model = create_model("efficientnet_b0")
    count = sum(stage.layers for stage in model.config.stages)
    rates = [module.drop_path.drop_prob for module in model.modules() if isinstance(module, MBConv)]
    assert rates == pytest.approx([0.2 * index / count for index in range(count)])
    drop = effnet_fast.nn.StochasticDepth(0.25).train()
    torch.manual_seed(0)
    y = drop(torch.ones(4000, 2, 3, 3))
    rows = y.flatten(1)
    assert ((rows == rows[:, :1]).all(1)).all()
    assert set(rows[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert 0.70 < (rows[:, 0] > 0).float().mean() < 0.80


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = create_model("efficientnet_b0")
    assert model.conv_head.weight.std().item() == pytest.approx((2 / 1280) ** 0.5, rel=0.02)
    depthwise = model.blocks[5][1].conv_dw.weight
    assert depthwise.std().item() == pytest.approx((2 / 25) ** 0.5, rel=0.02)
    assert model.classifier.weight.abs().max().item() == pytest.approx(1000**-0.5, rel=0.01)
    assert largest(model.classifier.bias.detach()) == 0 and largest(model.blocks[1][0].se.conv_reduce.bias.detach()) == 0
    assert (model.blocks[1][0].bn3.weight == 1).all()


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0", "efficientnetv2_b0"])
def test_any_input(name):
    torch.manual_seed(0)
    model = calibrate(create_model(name, num_classes=7))
    double = copy.deepcopy(model).double()
    for shape in ((0, 3, 32, 32), (1, 3, 1, 1), (2, 3, 1, 40), (3, 3, 37, 5)):
        x = torch.randn(shape)
        with torch.no_grad():
            y = model(x)
            torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), y)
            reference = double(x.double())
        assert y.shape == (shape[0], 7)
        assert_2x(y, model(x).detach(), reference, f"{shape}")
        assert not shape[0] or largest(reference) > 1e-2, "the comparison would be vacuous"


def test_one_builder_serves_table_and_law():
    law, table = CompoundScaling().at(0).config, FAMILY["efficientnet_b0"]
    assert law.stages == table.stages and law.resolution == table.resolution
    with torch.device("meta"):
        from_law, from_table = efficientnet(phi=0), create_model("efficientnet_b0")
        assert from_law.state_dict().keys() == from_table.state_dict().keys()
        assert sum(p.numel() for p in efficientnet(phi=1).parameters()) == 9_109_994
    for arguments in ({}, {"phi": 1, "depth": 2}):
        with pytest.raises(ValueError, match="phi or some of"):
            efficientnet(**arguments)


def test_surface():
    model = create_model("efficientnet_b0", in_chans=1, num_classes=5, global_pool="avgmax", drop_rate=0.1, bn_momentum=0.01)
    assert model.conv_stem.in_channels == 1 and model.bn1.momentum == 0.01 and model.drop_rate == 0.1
    assert model.get_classifier() is model.classifier and model.classifier.out_features == 5
    x = torch.randn(2, 1, 40, 40)
    assert model.eval()(x).shape == (2, 5)
    features = model.forward_features(x)
    assert features.shape == (2, 1280, 2, 2)
    assert model.forward_head(features, pre_logits=True).shape == (2, 1280)
    torch.testing.assert_close(model.forward_head(features), model(x))
    final, maps = model.forward_intermediates(x, indices=2)
    assert [m.shape[1] for m in maps] == [112, 320] and final.shape == features.shape
    short = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert [tuple(m.shape) for m in short] == [(2, 16, 20, 20), (2, 24, 10, 10)]
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3) and model.config.num_classes == 3
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 1280, 2, 2)
    pattern = model.group_matcher()
    assert set(pattern) == {"stem", "blocks"}
    assert model.default_cfg["input_size"][-1] == 224 and model.default_cfg["classifier"] == "classifier"
    features_only = create_model("efficientnet_b0", features_only=True, out_indices=(1, 3))
    assert [m.shape[1] for m in features_only.eval()(torch.randn(1, 3, 64, 64))] == [24, 112]
    assert features_only.feature_info.channels() == [24, 112] and features_only.feature_info.reduction() == [4, 16]


class Twice(torch.nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        return 2 * self.stage(x)


def test_grad_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = efficientnet(depth=0.5, width=0.5, drop_path_rate=0.0, drop_rate=0.0).train()
    x = torch.randn(2, 3, 48, 48)
    grads = []
    for enable in (False, True):
        net = copy.deepcopy(model)
        net.set_grad_checkpointing(enable)
        net(x).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(grads[0], grads[1])
    # A stage that is no plain Sequential is called, not taken apart.
    model.set_grad_checkpointing()
    model.blocks[2] = Twice(model.blocks[2])
    seen = model(x)
    model.set_grad_checkpointing(False)
    torch.testing.assert_close(seen, model(x))


def test_group_norm_trains_and_infers_unfused():
    model = efficientnet(
        depth=0.5, width=0.5, norm_layer=lambda channels: torch.nn.GroupNorm(4, channels), act_layer=torch.nn.GELU
    ).eval()
    with torch.no_grad():
        rows = effnet_fast.explain(model, torch.randn(1, 3, 32, 32))
    assert all(row.plain for row in rows)


BAD = [
    (lambda: create_model("efficientnet_b9"), ValueError, "unknown model 'efficientnet_b9'; 'efficientnet_b"),
    (lambda: create_model("efficient_net_b0"), ValueError, "'efficientnet_b0' would do"),
    (lambda: create_model("efficientnet_b0", num_clases=3), TypeError, "'num_clases'; 'num_classes'"),
    (lambda: create_model("efficientnet_b0", num_classes=-1), ValueError, "num_classes is -1"),
    (lambda: create_model("efficientnet_b0", in_chans=0), ValueError, "in_channels is 0"),
    (lambda: create_model("efficientnet_b0", drop_path_rate=1.5), ValueError, "drop_path_rate is 1.5"),
    (lambda: create_model("efficientnet_b0", drop_path_rate="a"), ValueError, "drop_path_rate is 'a'"),
    (lambda: create_model("efficientnet_b0", drop_rate=1.5), ValueError, "drop_rate is 1.5"),
    (lambda: create_model("efficientnet_b0", bn_eps=-1), ValueError, "bn_eps is -1"),
    (lambda: create_model("efficientnet_b0", act_layer="relu"), TypeError, "act_layer is 'relu'"),
    (lambda: efficientnet(phi=1, pretrained=True), TypeError, "no weights were trained"),
    (lambda: create_model("efficientnet_b0", output_stride=16), ValueError, "output_stride 16"),
    (lambda: create_model("efficientnet_b0", pad_type="valid"), ValueError, "pad_type is 'valid'"),
    (lambda: create_model("efficientnet_b0", global_pool="sum"), ValueError, "global_pool is 'sum'"),
    (lambda: create_model("efficientnet_b0", global_pool=""), ValueError, "num_classes=0"),
    (lambda: create_model("efficientnet_b0", out_indices=(1,)), TypeError, "features_only=False"),
    (lambda: create_model("efficientnet_b0", features_only=True, drop_rate=0.1), TypeError, "'drop_rate' has no meaning"),
    (lambda: create_model("efficientnet_b0", features_only=True, out_indices=(7,)), ValueError, "within 0 to 4"),
    (lambda: create_model("efficientnet_b0")(torch.zeros(3, 32, 32)), ValueError, "a batch of images"),
    (lambda: create_model("efficientnet_b0")(torch.zeros(1, 4, 32, 32)), ValueError, "has 4 channels; 3"),
    (lambda: create_model("efficientnet_b0")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), TypeError, "torch.uint8"),
    (lambda: create_model("efficientnet_b0")(torch.zeros(1, 3, 0, 32)), ValueError, "at least one pixel"),
    (lambda: efficientnet(phi=-1), ValueError, "phi"),
    (lambda: efficientnet(depth=0), ValueError, "depth"),
]


@pytest.mark.parametrize(("call", "error", "says"), BAD, ids=[says for _, _, says in BAD])
def test_bad_input(call, error, says):
    with torch.device("meta"), pytest.raises(error, match=says):
        call()


def test_list_models():
    assert list_models("tf_*_b?")[0] == "tf_efficientnet_b0"
    assert len(FAMILY) == 46 and not FAMILY.keys() & CLASSICS.keys()
    assert list_models() == sorted([*FAMILY, *CLASSICS])
    assert list_models("nothing*") == []
    assert effnet_fast.efficientnet_b5.__name__ == "efficientnet_b5"
    with torch.device("meta"):
        model = effnet_fast.efficientnet_b5(num_classes=10)
    assert model.config.resolution == 456 and model.classifier.out_features == 10


def test_public_names():
    """Each is there, and listed, before anything has been imported; torch comes with the first of them."""
    code = """
import sys, effnet_fast
assert "torch" not in sys.modules
assert set(effnet_fast.__all__) | {"ops", "weights", "__version__"} <= set(dir(effnet_fast))
assert effnet_fast.weights.SOURCES and effnet_fast.ops.backend is effnet_fast.backend
for name in effnet_fast.__all__:
    assert getattr(effnet_fast, name).__name__ == name
from effnet_fast import *
assert create_model is effnet_fast.create_model
assert not hasattr(effnet_fast, "efficientnet_b8")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
