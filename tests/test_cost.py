"""The cost model against what PyTorch builds, counts and keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from effnet_fast.models import CLASSICS, FAMILY, config_of, create_model
from effnet_fast.scaling import B0, LITE0, RESNET18, V2_B0, BaseNet, CompoundScaling, Cost, NetConfig, StageConfig, layers

TIMM_NAMES = [name for name in FAMILY if timm.is_model(name)]


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return (create_model if name in CLASSICS else timm.create_model)(name).eval()


def test_only_the_v2_base_nets_go_by_their_tf_names_alone() -> None:
    twins = [name for name in FAMILY if name not in TIMM_NAMES]
    assert twins == [f"efficientnetv2_b{number}" for number in range(4)]
    for name in twins:
        assert Cost.of(FAMILY[name]).parameters == Cost.of(FAMILY[f"tf_{name}"]).parameters


@pytest.mark.parametrize("name", [*TIMM_NAMES, *CLASSICS])
def test_parameters_and_buffers_are_the_built_nets(name: str) -> None:
    net, cost = on_meta(name), Cost.of(config_of(name))
    assert cost.parameters == sum(p.numel() for p in net.parameters())
    net = net.to(torch.bfloat16)
    assert cost.weight_bytes("bf16") == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    # Each parameter is where its name says.
    built = {}
    for key, parameter in net.named_parameters():
        module = key.rpartition(".")[0]
        built[module] = built.get(module, 0) + parameter.numel()
    assert {layer.name: layer.parameters for layer in cost.layers if layer.parameters} == built


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("efficientnet_b0", (224, 224)),
        ("efficientnet_b0", (225, 161)),
        ("efficientnet_b0", (1, 33)),
        ("tf_efficientnet_b0", (225, 161)),
        ("efficientnet_b5", (456, 456)),
        ("efficientnet_lite0", (224, 224)),
        ("efficientnetv2_s", (384, 384)),
        ("efficientnetv2_s", (129, 97)),
        *((name, (97, 130)) for name in CLASSICS),
    ],
)
def test_macs_and_shapes_are_the_flop_counters(name: str, size: tuple[int, int]) -> None:
    net, cost, shapes = on_meta(name), Cost.of(config_of(name), size), {}
    for key, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, x, y, key=key: shapes.update({key: tuple(y.shape[1:])}))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, *size, device="meta"))
    assert cost.flops == counter.get_total_flops()
    assert {layer.name: layer.output_shape for layer in cost.layers if layer.kind in ("conv", "linear")} == shapes
    outputs = [math.prod(shape) for shape in shapes.values() if len(shape) == 3]
    assert cost.activations == sum(outputs)


@pytest.mark.parametrize(
    ("key", "parameters", "gmacs"),
    [
        ("b0", 5_288_548, 0.386),
        ("b1", 7_794_184, 0.687),
        ("b2", 9_109_994, 0.994),
        ("b3", 12_233_232, 1.827),
        ("b4", 19_341_616, 4.394),
        ("b5", 30_389_784, 10.27),
        ("b6", 43_040_704, 19.07),
        ("b7", 66_347_960, 37.75),
        ("b8", 87_413_142, None),
    ],
)
def test_published_figures(key: str, parameters: int, gmacs: float | None) -> None:
    cost = Cost.of(FAMILY[f"efficientnet_{key}"])
    assert cost.parameters == parameters
    assert gmacs is None or float(f"{cost.macs / 1e9:.{len(str(gmacs)) - str(gmacs).index('.') - 1}f}") == gmacs


class PlainBlock(nn.Module):
    """The paper's block as the cost model has it: modules of plain PyTorch, one after the other."""

    def __init__(self, block, activation: type[nn.Module]) -> None:
        super().__init__()
        wide, pad = block.expanded_channels, block.kernel_size // 2
        fused = block.operator == "fused_mbconv"
        main: list[nn.Module] = []
        if fused:
            out = wide if block.expands else block.out_channels
            main += [nn.Conv2d(block.in_channels, out, block.kernel_size, block.stride, pad, bias=False), nn.BatchNorm2d(out)]
            main += [activation()]
        else:
            if block.expands:
                main += [nn.Conv2d(block.in_channels, wide, 1, bias=False), nn.BatchNorm2d(wide), activation()]
            main += [nn.Conv2d(wide, wide, block.kernel_size, block.stride, pad, groups=wide, bias=False), nn.BatchNorm2d(wide)]
            main += [activation()]
        self.main, self.gate, self.project, self.config = nn.Sequential(*main), None, None, block
        if block.se_channels:
            squeeze = (nn.Conv2d(wide, block.se_channels, 1), activation(), nn.Conv2d(block.se_channels, wide, 1), nn.Sigmoid())
            self.gate = nn.Sequential(*squeeze)
        if not fused or block.expands:
            self.project = nn.Sequential(nn.Conv2d(wide, block.out_channels, 1, bias=False), nn.BatchNorm2d(block.out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.main(x)
        if self.gate is not None:
            y = y * self.gate(y.mean((2, 3), keepdim=True))
        if self.project is not None:
            y = self.project(y)
        if self.config.residual:
            if self.config.drop_path and self.training:
                y = y * y.new_full((len(y), 1, 1, 1), 1 / (1 - self.config.drop_path))
            y = y + x
        return y


def plain(config: NetConfig) -> nn.Module:
    activation = {"silu": nn.SiLU, "relu6": nn.ReLU6, "relu": nn.ReLU}[config.activation]
    stem, last = config.stem_channels, config.stages[-1].out_channels
    return nn.Sequential(
        nn.Conv2d(config.in_channels, stem, 3, 2, 1, bias=False),
        nn.BatchNorm2d(stem),
        activation(),
        *(PlainBlock(block, activation) for block in config.blocks()),
        nn.Conv2d(last, config.head_channels, 1, bias=False),
        nn.BatchNorm2d(config.head_channels),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(config.dropout),
        nn.Linear(config.head_channels, config.num_classes),
    ).train()


def saved_elements(net: nn.Module, x: torch.Tensor) -> int:
    known = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (pointer := tensor.untyped_storage().data_ptr()) not in known and tensor.numel():
            seen[pointer] = tensor
        return tensor.detach()  # the result of an op itself would hold the op, and that it, for ever

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = net(x)
    assert y.requires_grad
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in seen.values())


TINY = BaseNet(
    "tiny",
    (
        StageConfig("mbconv", 3, 1, 1, 16, 2, 0.25),
        StageConfig("fused_mbconv", 3, 2, 4, 24, 2),
        StageConfig("fused_mbconv", 3, 1, 1, 24, 2),
        StageConfig("mbconv", 5, 2, 6, 40, 2, 0.25),
    ),
    stem_channels=16,
    head_channels=64,
    resolution=40,
)


@pytest.mark.parametrize(
    ("config", "batch"),
    [
        (B0.scaled(resolution=64), 2),
        (B0.scaled(resolution=37, drop_path=0.0, dropout=0.0), 3),
        (LITE0.scaled(resolution=65), 2),
        (V2_B0.scaled(resolution=33), 2),
        (TINY.scaled(), 4),
        (replace(TINY.scaled(), activation="relu"), 4),
    ],
    ids=["b0", "b0 odd without drop", "lite0", "v2_b0", "tiny", "tiny relu"],
)
def test_saved_elements_are_what_autograd_keeps(config: NetConfig, batch: int) -> None:
    x = torch.randn(batch, config.in_channels, config.resolution, config.resolution)
    assert saved_elements(plain(config), x) == Cost.of(config).saved_elements(batch)


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_b0",
        "tf_efficientnet_b0",
        "efficientnetv2_s",
        "efficientnet_lite0",
        *(name for name in CLASSICS if name != "resnet101"),
    ],
)
def test_saved_elements_of_our_own_nets(name: str) -> None:
    net = create_model(name).train().double()  # which trains as plain PyTorch
    x = torch.randn(2, 3, 67, 65, dtype=torch.float64)
    assert saved_elements(net, x) == Cost.of(net.config, (67, 65)).saved_elements(2)


@pytest.mark.parametrize(
    ("key", "eager", "fused", "launches"),
    [
        ("b0", 46_966_304, 13_710_592, 66),
        ("b3", 169_754_432, 49_111_264, 105),
        ("b5", 718_192_720, 205_052_288, 156),
        ("b7", 2_123_466_496, 604_129_280, 219),
    ],
)
def test_traffic_is_the_roofline_models(key: str, eager: int, fused: int, launches: int) -> None:
    """Against a model written apart from this one, which counts maps (H x W) only: elements per image."""
    config = FAMILY[f"efficientnet_{key}"]
    cost = Cost.of(config)
    assert cost.launches == launches
    shapes = (shape for layer in cost.layers for shape in (*layer.input_shapes, layer.output_shape))
    vectors = sum(math.prod(shape) for shape in shapes if shape[1:] in ((), (1, 1)))
    assert sum(layer.eager for layer in cost.layers) == eager + vectors
    # Squeeze and gate are written and read once in each block, the pooled features too, and the logits are written.
    crossing = 4 * sum(block.expanded_channels for block in config.blocks()) + 2 * config.head_channels + config.num_classes
    assert sum(layer.fused for layer in cost.layers) == fused + crossing


def test_fused_form_moves_what_crosses_launches() -> None:
    block = Cost.of(B0.scaled()).by("block")["blocks.1.1"]
    launches = block.by("launch")
    assert [name.rpartition(".")[2] for name in launches] == ["expand", "depthwise", "gate", "project"]
    x, wide = 24 * 56 * 56, 144 * 56 * 56
    expected = {"expand": x + wide, "depthwise": 2 * wide + 144, "gate": 2 * 144, "project": wide + 144 + x + x}
    assert {name.rpartition(".")[2]: sum(layer.fused for layer in part.layers) for name, part in launches.items()} == expected
    weights = 2 * sum(layer.parameters + layer.buffers for layer in block.layers)
    for batch in (0, 1, 5):
        assert block.bytes_moved("bf16", batch, "fused") == 2 * batch * sum(expected.values()) + weights


class Peak(fx.Interpreter):
    """Runs a traced net, dropping each value after its last use, and notes the most elements that existed at once."""

    most = 0

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        values = [*self.env.values(), result, self.image]
        storages = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() // 4 for v in values if isinstance(v, torch.Tensor)}
        self.most = max(self.most, sum(storages.values()))
        return result


@pytest.mark.parametrize(
    "config",
    [B0.scaled(), LITE0.scaled(resolution=97), V2_B0.scaled(), TINY.scaled(), TINY.scaled(resolution=1)],
    ids=["b0", "lite0", "v2_b0", "tiny", "tiny at one pixel"],
)
def test_peak_of_inference_is_an_interpreters(config: NetConfig) -> None:
    with torch.device("meta"), torch.no_grad():
        run = Peak(fx.symbolic_trace(plain(config).eval()))
        run.image = torch.empty(2, 3, config.resolution, config.resolution)
        run.run(run.image)
    assert 4 * run.most == Cost.of(config).inference_memory("fp32", 2).activations


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mnasnet1_0", "resnet18", "resnet50", "resnet18_cifar"])
def test_peak_of_inference_of_the_older_nets(name: str) -> None:
    with torch.device("meta"), torch.no_grad():
        run = Peak(fx.symbolic_trace(create_model(name).eval()))
        run.image = torch.empty(2, 3, 97, 97)
        run.run(run.image)
    assert 4 * run.most == Cost.of(CLASSICS[name], 97).inference_memory("fp32", 2).activations


def test_positions_of_a_max_pool_are_of_64_bits() -> None:
    cost = Cost.of(RESNET18.scaled())
    positions = 64 * 56 * 56
    assert [layer.positions for layer in cost.layers if layer.positions] == [positions]
    statistics = sum(layer.statistics for layer in cost.layers)
    kept = 2 * (cost.saved_elements(2) - statistics - 2 * positions) + 4 * statistics + 2 * 8 * positions
    assert cost.training_memory("bf16", 2).activations == kept


def test_a_launch_reads_a_tensor_once() -> None:
    # A fused block without expansion has one launch, whose convolution and shortcut read the same input.
    block = Cost.of(TINY.scaled()).by("block")["blocks.2.1"]
    assert block.launches == 1
    assert sum(layer.fused for layer in block.layers) == 2 * 24 * 10 * 10


def test_peak_of_inference() -> None:
    # B0's largest pair is the expansion of 16 channels to 96 at 112 x 112 and its norm's output; the caller holds the image.
    cost = Cost.of(B0.scaled())
    assert cost.inference_memory("fp32", 1).activations == 4 * (2 * 96 * 112 * 112 + 3 * 224 * 224)
    add = next(layer for layer in cost.layers if layer.name == "blocks.1.1.bn2")
    # A residual block holds its shortcut as well.
    assert add.live == 2 * 144 * 56 * 56 + 24 * 56 * 56 + 3 * 224 * 224


def test_memory_adds_up() -> None:
    cost = Cost.of(B0.scaled())
    for dtype, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        memory = cost.training_memory(dtype, 3, optimizer_tensors=2)
        assert memory.gradients == size * cost.parameters
        assert memory.optimizer == 2 * memory.gradients
        assert memory.total == memory.weights + 3 * memory.gradients + memory.activations
    statistics = sum(layer.statistics for layer in cost.layers)
    assert cost.training_memory("bf16", 2).activations == 2 * (cost.saved_elements(2) - statistics) + 4 * statistics
    assert cost.training_memory("fp32", 2).activations == 4 * cost.saved_elements(2)
    empty = cost.inference_memory("fp32", 0)
    assert empty.activations == 0 and empty.total == cost.weight_bytes("fp32")


def test_parts_sum_to_the_net() -> None:
    cost = Cost.of(FAMILY["efficientnet_b3"])
    for key in ("stage", "block", "launch", "name"):
        parts = cost.by(key)
        for quantity in ("parameters", "macs", "activations"):
            assert sum(getattr(part, quantity) for part in parts.values()) == getattr(cost, quantity)
        assert sum(part.bytes_moved("bf16", 4, "fused") for part in parts.values()) == cost.bytes_moved("bf16", 4, "fused")
        assert sum(part.saved_elements(4) for part in parts.values()) == cost.saved_elements(4)
        assert max(part.inference_memory().activations for part in parts.values()) == cost.inference_memory().activations
    assert list(cost.by("stage")) == ["stem", *(f"blocks.{i}" for i in range(7)), "head"]
    assert len(cost.by("name")) == len(cost.layers)


def test_features_only_and_other_classes() -> None:
    config = B0.scaled(num_classes=0)
    assert layers(config)[-1].name == "global_pool"
    assert Cost.of(B0.scaled()).parameters - Cost.of(config).parameters == 1281 * 1000
    gray = Cost.of(B0.scaled(in_channels=1))
    assert Cost.of(B0.scaled()).parameters - gray.parameters == 2 * 32 * 9


def test_a_law_point_is_counted_like_a_published_one() -> None:
    assert Cost.of(CompoundScaling().at(0).config).macs == Cost.of(FAMILY["efficientnet_b0"]).macs


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda c: layers(B0.scaled(), 0), "resolution is 0"),
        (lambda c: layers(B0.scaled(), (224,)), r"resolution is \(224,\)"),
        (lambda c: layers(B0.scaled(), (224, 1.5)), "resolution is"),
        (lambda c: layers(B0.scaled(), True), "resolution is True"),
        (lambda c: layers(B0.scaled(), "224"), "resolution is '224'"),
        (lambda c: c.inference_memory("float32"), "dtype is 'float32'; one of fp32, bf16, fp16"),
        (lambda c: c.training_memory(torch.float32), "dtype is torch.float32"),
        (lambda c: c.training_memory(optimizer_tensors=-1), "optimizer_tensors is -1"),
        (lambda c: c.bytes_moved(batch=-1), "batch is -1"),
        (lambda c: c.bytes_moved(batch=1.0), "batch is 1.0"),
        (lambda c: c.bytes_moved(form="l3"), "form is 'l3'"),
        (lambda c: c.saved_elements(None), "batch is None"),
        (lambda c: c.by("macs"), "key is 'macs'"),
    ],
)
def test_bad_input_is_refused(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(Cost.of(B0.scaled()))
