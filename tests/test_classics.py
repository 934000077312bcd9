"""MobileNetV1 and V2, MnasNet and the ResNets against torchvision and timm, on the fused kernels, and under the law."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from states import same
from tolerance import assert_2x, assert_2x_of_all, largest
from torch import nn

import effnet_fast
from effnet_fast import interop, weights
from effnet_fast.benchmark import calibrate, images
from effnet_fast.benchmark.roofline import launches
from effnet_fast.cli.model import load_saved
from effnet_fast.models import CLASSICS, build, create_model, efficientnet
from effnet_fast.ops import native
from effnet_fast.scaling import (
    MNASNET,
    MOBILENET_V1,
    MOBILENET_V2,
    RESNET18,
    RESNET18_CIFAR,
    RESNET50,
    BaseNet,
    CompoundScaling,
    Cost,
    StageConfig,
    thresholds,
)
from effnet_fast.scaling.names import names_of
from effnet_fast.training import layers as layers_of

DEPTHWISE = ("mobilenet_v1", "mobilenet_v2", "mnasnet1_0")
FUSED_IN_TRAINING = {"mobilenet_v1": 5, "mobilenet_v2": 11, "mnasnet1_0": 7}  # blocks at 4 images of 64x64, in fp32 on a CPU
PEERS = [name for name in CLASSICS if name != "resnet18_cifar"]
BASES = (MOBILENET_V1, MOBILENET_V2, MNASNET, RESNET18, RESNET50, RESNET18_CIFAR)


def peer(name: str, **arguments) -> nn.Module:
    if name == "mobilenet_v1":
        return timm.create_model("mobilenetv1_100", **arguments)
    return torchvision.models.get_model(name, **arguments)


@pytest.mark.parametrize("name", PEERS)
def test_keys_shapes_and_norms_are_the_peers(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = create_model(name), peer(name)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert list({key: value.shape for key, value in ours.state_dict().items()}.items()) == list(shapes.items())
    norms = [[(m.eps, m.momentum) for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in (ours, theirs)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("name", [*DEPTHWISE, "mnasnet0_5", "resnet18", "resnet34", "resnet50", "resnet101"])
def test_logits_and_features_agree_with_the_peers(name: str) -> None:
    torch.manual_seed(0)
    theirs = calibrate(peer(name), (64, 83))
    ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    double = copy.deepcopy(theirs).double()
    x = images(4, (64, 83))
    with torch.no_grad():
        ref, plain = double(x.double()), theirs(x.contiguous(memory_format=torch.channels_last))
        assert largest(ref[0] - ref[1]) > 0.1 * largest(ref), "the comparison would be vacuous"
        assert_2x(ours(x), plain, ref, "without gradients")
        features = ours.forward_features(x)
    assert features.shape[1] == ours.num_features == ours.config.features
    assert_2x(ours(x).detach(), plain, ref, "with gradients")
    theirs.load_state_dict(ours.state_dict())  # and back, by the peer's own loader


@pytest.mark.skipif(native.REASON is not None, reason="no native kernels")
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_nets_run_on_the_fused_kernels(name: str) -> None:
    model = create_model(name).eval()
    blocks = sum(stage.layers for stage in model.config.stages)
    x = images(4, (64, 64))
    rows = effnet_fast.explain(model, x)
    assert not any(row.plain for row in rows)
    ops = [choice.op for row in rows for choice in row.ops]
    assert {choice.backend for row in rows for choice in row.ops} == {"native"}
    expands = sum(block.expands for block in model.config.blocks())
    head = bool(model.config.head_channels)
    assert (ops.count("depthwise_conv_bn_act"), ops.count("pointwise_conv_bn_act")) == (blocks, blocks + expands + head)
    # In training the stem (MNASNet's first block with it), the blocks with many pixels, which come first, and the head; PyTorch's
    # products are faster on the others.
    trained = effnet_fast.explain(model.train(), x, grad=True)
    first = 1 + FUSED_IN_TRAINING[name]
    assert [row.plain is None for row in trained] == [True] * first + [False] * (len(trained) - first - head) + [True] * head
    assert all("depthwise_conv_stats" in {choice.op for choice in row.ops} for row in trained[1:first])
    assert all("PyTorch's" in row.plain for row in trained if row.plain is not None)
    with effnet_fast.backend("native"):
        assert not any(row.plain for row in effnet_fast.explain(model, x, grad=True))


def smoothed(model: nn.Module) -> nn.Module:
    """Of a million ReLU6 some are so close to a kink that rounding decides on the slope: SiLU in their place."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(module, name, nn.SiLU())
    return model


@pytest.mark.parametrize("name", DEPTHWISE)
def test_gradients_agree_with_the_peers(name: str) -> None:
    torch.manual_seed(0)
    ours = calibrate(create_model(name, num_classes=10, drop_rate=0.0, act_layer=nn.SiLU), (65, 52))
    theirs = smoothed(peer(name, num_classes=10))
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    theirs.load_state_dict(ours.state_dict())
    double = copy.deepcopy(theirs).double()
    x, target = images(4, (65, 52)).contiguous(memory_format=torch.channels_last), torch.tensor([1, 2, 3, 4])
    grads = []
    for net in (ours, theirs, double):
        net.train()
        with effnet_fast.backend("native" if native.REASON is None else None):
            nn.functional.cross_entropy(net(x.to(next(net.parameters()).dtype)), target).backward()
        grads.append({key: parameter.grad for key, parameter in net.named_parameters()})
    assert_2x_of_all(*grads, "gradients")
    statistics = [
        torch.cat([b.flatten() for n, b in net.named_buffers() if n.endswith(("mean", "var"))]) for net in (ours, theirs, double)
    ]
    assert_2x(*statistics, "running statistics")


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mnasnet0_5", "resnet18", "resnet50"])
def test_the_classifier_begins_as_the_peers(name: str) -> None:
    torch.manual_seed(0)
    ours = create_model(name, num_classes=10)
    for classes in (10, 7):
        found, expected = (net.get_submodule(names_of(ours.config).classifier) for net in (ours, peer(name, num_classes=classes)))
        assert 0.97 < found.weight.std() / expected.weight.std() < 1.03
        assert 0.7 < found.weight.abs().max() / expected.weight.abs().max() < 1.4  # a normal distribution has longer tails
        assert (found.bias.std() > 0) == (expected.bias.std() > 0)
        ours.reset_classifier(7)


def test_a_hook_on_a_child_or_sequence_fires() -> None:
    for name, places in (
        ("mobilenet_v2", ("features", "features.0", "features.0.1", "features.3.conv", "features.3.conv.1", "features.3.conv.1.0")),
        ("mnasnet0_5", ("layers", "layers.1", "layers.3", "layers.9.1.layers", "layers.9.1.layers.3", "layers.15")),
        ("mobilenet_v1", ("blocks.1", "blocks.1.1.bn2")),
    ):
        model, x = calibrate(create_model(name), (33, 33)), images(1, (33, 33))
        with torch.no_grad():
            expected = model(x)
            for place in places:
                fired: list[str] = []
                handle = model.get_submodule(place).register_forward_hook(lambda *_, fired=fired: fired.append("yes"))
                torch.testing.assert_close(model(x), expected)
                handle.remove()
                assert fired == ["yes"], place


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_any_point_of_the_law_is_built_as_it_is_counted(base: BaseNet) -> None:
    law = CompoundScaling(base=base)
    for config in (
        law.at(0).config,
        law.at(2).config,
        law.scaled(depth=2.5, width=0.55, resolution=0.3).config,
        base.scaled(depth=0.3),
    ):
        with torch.device("meta"):
            net = build(config)
        cost, built = Cost.of(config), {}
        for key, parameter in net.named_parameters():
            place = key.rpartition(".")[0]
            built[place] = built.get(place, 0) + parameter.numel()
        assert {layer.name: layer.parameters for layer in cost.layers if layer.parameters} == built
        assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == weights.layouts.shapes(config)
        assert len(cost.by("name")) == len(cost.layers)
        assert config.drop_path == 0 and config.dropout == base.dropout
        with torch.device("meta"), torch.no_grad():
            side = config.resolution
            features = net.eval().forward_features(torch.empty(1, 3, side, side))
        assert tuple(features.shape[2:]) == cost.layers[-2].input_shapes[0][1:]
    rows = thresholds(base, 3)
    for row in rows:
        below, above = (law.at(max(0.0, row.phi + step)).config for step in (-1e-9, 1e-9))
        for config, value in ((below, row.before), (above, row.after)):
            if row.part in ("stem", "head"):
                assert getattr(config, f"{row.part}_channels") == value
            else:
                stage = config.stages[int(row.part.rpartition(".")[2])]
                assert (stage.layers if row.quantity == "layers" else stage.out_channels) == value
    assert any(row.part == "head" for row in rows) == (base is MOBILENET_V2)


def test_published_sizes() -> None:
    """ResNet-18 for ten classes: 11.18 M with the 7x7 stem, 11.17 M with the 3x3 one; 1.8 G is the cost at 224 pixels."""
    seven, three = RESNET18.scaled(num_classes=10), CLASSICS["resnet18_cifar"]
    assert [round(Cost.of(config).parameters / 1e6, 2) for config in (seven, three)] == [11.18, 11.17]
    assert round(Cost.of(seven).macs / 1e9, 1) == 1.8 and round(Cost.of(three).macs / 1e9, 2) == 0.56
    assert [CompoundScaling(base=RESNET18_CIFAR).at(phi).config.resolution for phi in (0, 1, 2)] == [32, 37, 42]
    assert [Cost.of(CLASSICS[f"resnet{number}"]).parameters for number in (18, 34, 50, 101)] == [
        11_689_512,
        21_797_672,
        25_557_032,
        44_549_160,
    ]
    narrow = MOBILENET_V2.scaled(width=0.5)
    assert (narrow.head_channels, MOBILENET_V2.scaled(width=1.4).head_channels, MNASNET.scaled(width=2).head_channels) == (
        1280,
        1792,
        1280,
    )


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mnasnet0_5", "resnet18", "resnet50", "resnet18_cifar"])
def test_surface(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, in_chans=1, num_classes=5, global_pool="avgmax", drop_rate=0.1, drop_path_rate=0.2, bn_eps=1e-3)
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3} and model.drop_rate == 0.1
    x = images(2, (40, 40), channels=1)
    assert model.eval()(x).shape == (2, 5) and model.get_classifier().out_features == 5
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    numbers = layers_of(model)
    assert set(numbers.values()) == set(range(max(numbers.values()) + 1)) and numbers[next(iter(numbers))] == 0
    last = [key for key, number in numbers.items() if number == max(numbers.values())]
    assert [model.get_parameter(key).shape[0] for key in last] == [5, 5]
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3) and model.config.num_classes == 3
    model.set_weights_convention(bn_eps=1e-4)
    assert model.config.bn_eps == 1e-4
    for child in model.modules():
        if isinstance(child, effnet_fast.nn.StochasticDepth):
            child.drop_prob = 0.0
    model.drop_rate, grads = 0.0, []
    for enable in (False, True):
        net = copy.deepcopy(model).train()
        net.set_grad_checkpointing(enable)
        net(x).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(grads[0], grads[1])
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", [*DEPTHWISE, "resnet18_cifar"])
def test_serving(name: str) -> None:
    torch.manual_seed(0)  # of some weights calibrate says that their logits hardly tell images apart
    model, x = calibrate(create_model(name), (64, 64)), images(2, (64, 64))
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        expected, plain = double(x.double()), model(x)
        serving = effnet_fast.optimize_for_inference(model)
        assert_2x(serving(x), plain, expected, "serving")
        told = (
            "run block by block" if native.REASON else "one native call" if name in DEPTHWISE else "native calls of 7 kernels, and "
        )
        assert told in str(serving)
        half = effnet_fast.optimize_for_inference(model, torch.bfloat16)(x)
        bf16 = copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16())
        assert_2x(half, bf16, expected, "serving in half precision")
        pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(serving(pixels), model((pixels / 255 - mean) / std), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mnasnet0_5", "resnet18_cifar"])
def test_compiling_and_export(name: str) -> None:
    torch.manual_seed(0)  # of some weights calibrate says that their logits hardly tell images apart
    model, x = calibrate(create_model(name), (32, 32)), images(2, (32, 32))
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), plain)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), plain, rtol=1e-3, atol=1e-4)


def test_checkpoints(tmp_path) -> None:
    for name in ("mobilenet_v1", "mobilenet_v2", "mnasnet0_5", "resnet18_cifar"):
        torch.manual_seed(1)
        model = create_model(name, num_classes=3)
        weights.save_checkpoint(model, tmp_path / "mine.pth", classes=list("abc"))
        loaded, classes = load_saved(tmp_path / "mine.pth")
        assert type(loaded) is type(model) and loaded.config == model.config and classes == list("abc")
        assert same(loaded.state_dict(), model.state_dict())
        interop.convert(tmp_path / "mine.pth", tmp_path / "again.pth", "timm" if name == "mobilenet_v1" else "torchvision")
        assert same(weights.read(tmp_path / "again.pth").state_dict, model.state_dict())
    theirs = peer("resnet18")
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    ours = create_model("resnet18", pretrained=tmp_path / "resnet18.pth", num_classes=7, in_chans=1)
    torch.testing.assert_close(ours.conv1.weight.detach(), theirs.conv1.weight.detach().sum(1, keepdim=True))
    assert torch.equal(ours.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight) and ours.fc.out_features == 7
    rule = weights.preprocessing_of(create_model("resnet18"))
    assert (rule.crop, rule.resize, rule.interpolation) == (224, 256, "bilinear")  # torchvision's
    assert weights.preprocessing_of(create_model("resnet18_cifar")).crop_pct == 1


MBCONV = StageConfig("mbconv", 3, 1, 6, 24, 2)
BAD = [
    (lambda: create_model("resnet18", features_only=True), "features_only is True; False would do"),
    (lambda: create_model("mobilenet_v2", pad_type="same"), "padding is 'same' in mobilenet_v2; 'symmetric' would do"),
    (lambda: create_model("mnasnet0_5").set_weights_convention(padding="same"), "padding is 'same' in mnasnet"),
    (lambda: create_model("resnet20"), "unknown model 'resnet20'; 'resnet"),
    (lambda: create_model("resnet18", pretrained=True), "resnet18 has no pretrained weights; the path of a checkpoint would do"),
    (lambda: create_model("resnet18", global_pool="sum"), "ResNet: global_pool is 'sum'"),
    (lambda: create_model("mobilenet_v2")(torch.zeros(1, 4, 8, 8)), "MobileNetV2: the input has 4 channels; 3"),
    (lambda: StageConfig("separable", 3, 1, 2, 24, 2), "expand_ratio is 2; separable does not expand, so 1 would do"),
    (lambda: StageConfig("bottleneck", 3, 1, 4, 30, 2), "out_channels is 30; a multiple of expand_ratio, 4,"),
    (lambda: StageConfig("basic", 3, 1, 1, 24, 2, 0.25), "basic has no squeeze-excite"),
    (
        lambda: replace(RESNET18.scaled(), stages=(MBCONV,)),
        "a stage of resnet is .*'mbconv'.*basic or bottleneck",
    ),
    (lambda: replace(RESNET18.scaled(), family="vgg"), "family is 'vgg'; one of 'efficientnet', 'mobilenet_v2'"),
    (lambda: replace(RESNET18.scaled(), head_channels=1280), "head_channels is 1280 in resnet"),
    (lambda: replace(RESNET18.scaled(), stem_stride=4), "stem_stride is 4 in resnet; 1 or 2 would do"),
    (lambda: replace(MNASNET, stages=MNASNET.stages[1:]).scaled(), "expand_ratio of the first stage is 3 in mnasnet; 1 would do"),
    (lambda: replace(MOBILENET_V2.scaled(), stem_pool=True), "stem_pool is True in mobilenet_v2; False would do"),
    (lambda: launches(RESNET18.scaled()), "config is resnet18's; an EfficientNet's would do"),
    (lambda: weights.key_map(RESNET18.scaled(), "lukemelas"), "layout 'torchvision' would do"),
]


@pytest.mark.parametrize(("call", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input(call, says: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=says):
        call()


def test_the_laws_builder_takes_any_base() -> None:
    model = efficientnet(phi=1, law=CompoundScaling(base=RESNET18_CIFAR), num_classes=10)
    assert type(model).__name__ == "ResNet" and model.config.resolution == 37 and model.fc.out_features == 10
