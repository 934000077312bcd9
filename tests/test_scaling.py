"""Rounding rules, the law, its thresholds and growth."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_fast import scaling
from effnet_fast.scaling import (
    B0,
    LITE0,
    PUBLISHED,
    V2_B0,
    V2_S,
    BaseNet,
    CompoundScaling,
    Cost,
    NetConfig,
    StageConfig,
    compound_growth,
    multiplier_growth,
    round_channels,
    round_layers,
    thresholds,
)

LAW = CompoundScaling()
BASES = (B0, LITE0, V2_B0, V2_S)
widths = st.floats(0.05, 10)
phis = st.floats(0, 10)


@settings(deadline=None)
@given(channels=st.integers(1, 4096), width=widths, divisor=st.sampled_from([1, 4, 8, 16]))
def test_channels_are_whole_divisors_near_the_exact_width(channels: int, width: float, divisor: int) -> None:
    v1, v2 = round_channels(channels, width, divisor), round_channels(channels, width, divisor, limit=0.0)
    exact = channels * width
    assert v1 % divisor == v2 % divisor == 0 and min(v1, v2) >= divisor
    assert v1 >= 0.9 * exact
    assert v1 in (v2, v2 + divisor)
    assert v2 == divisor or abs(v2 - exact) <= divisor / 2


@settings(deadline=None)
@given(channels=st.integers(1, 4096), width=widths, more=widths, limit=st.sampled_from([0.0, 0.9]))
def test_channels_grow_with_width(channels: int, width: float, more: float, limit: float) -> None:
    low, high = sorted((width, more))
    assert round_channels(channels, low, limit=limit) <= round_channels(channels, high, limit=limit)


@pytest.mark.parametrize(
    ("channels", "width", "limit", "expected"),
    [
        (32, 1.1, 0.9, 32),  # 35.2: to the nearest
        (16, 1.25, 0.9, 24),  # 20: a half goes up
        (10, 1.15, 0.9, 16),  # 11.5: 8 would be below 90 %
        (10, 1.15, 0.0, 8),  # as V2 rounds
        (1, 0.1, 0.9, 8),  # never below a divisor
        (1280, 2.0, 0.9, 2560),
        (16, 1.0, 1.0, 16),  # at the limit is not below it
    ],
)
def test_channel_cases(channels: int, width: float, limit: float, expected: int) -> None:
    assert round_channels(channels, width, limit=limit) == expected


@settings(deadline=None)
@given(layers=st.integers(1, 32), depth=st.floats(0.01, 10))
def test_layers_are_the_ceiling(layers: int, depth: float) -> None:
    assert round_layers(layers, depth) == math.ceil(layers * depth) >= 1


def sizes(config: NetConfig) -> list[int]:
    stages = [n for stage in config.stages for n in (stage.layers, stage.out_channels)]
    return [*stages, config.stem_channels, config.head_channels, config.resolution]


@settings(deadline=None)
@given(phi=phis, more=phis, base=st.sampled_from(BASES))
def test_nets_grow_with_phi(phi: float, more: float, base: BaseNet) -> None:
    low, high = (CompoundScaling(base=base).at(value) for value in sorted((phi, more)))
    assert all(a <= b for a, b in zip(sizes(low.config), sizes(high.config), strict=True))
    assert low.dropout <= high.dropout
    assert {low.drop_path, high.drop_path} == {0.2}


@settings(deadline=None)
@given(phi=phis)
def test_dropout_stays_between_published_neighbours(phi: float) -> None:
    size = phi * math.log2(LAW.constraint.value)
    below = [row.dropout for row in PUBLISHED.values() if row.size <= size]
    above = [row.dropout for row in PUBLISHED.values() if row.size >= size]
    assert max(below) - 1e-12 <= LAW.at(phi).dropout <= min(above, default=0.5) + 1e-12


def test_dropout_of_the_published_sizes() -> None:
    for row in PUBLISHED.values():
        assert LAW.scaled(row.depth, row.width, row.resolution / 224).dropout == pytest.approx(row.dropout, abs=1e-9)
    middle = (PUBLISHED["b1"].size + PUBLISHED["b2"].size) / 2
    assert LAW.scaled(depth=2**middle).dropout == pytest.approx(0.25)
    assert LAW.scaled(0.3, 0.5, 0.5).dropout == 0.2
    assert LAW.at(20).dropout == 0.5


def test_phi_zero_is_the_base() -> None:
    for base in BASES:
        assert CompoundScaling(base=base).at(0).config == base.scaled(dropout=0.2, drop_path=0.2)
    assert LAW.at(-0.0) == LAW.at(0) == LAW.at(np.float32(0))


def test_the_laws_own_points() -> None:
    net = LAW.at(4)
    assert (net.phi, net.depth, net.width, net.resolution) == (4.0, 1.2**4, 1.1**4, 1.15**4)
    assert net.config.resolution == 392
    cost = Cost.of(net.config)
    assert round(cost.parameters / 1e6, 1) == 25.9 and round(cost.macs / 1e9, 2) == 6.32
    assert Cost.of(LAW.at(1).config).parameters == 9_109_994
    assert round(Cost.of(LAW.at(0.01).config).macs / Cost.of(B0.scaled()).macs, 2) == 1.48


@settings(deadline=None)
@given(phi=phis)
def test_table_and_law_make_the_same_kind_of_config(phi: float) -> None:
    net = LAW.at(phi)
    direct = B0.scaled(1.2**phi, 1.1**phi, net.config.resolution, net.config.name, dropout=net.dropout, drop_path=0.2)
    assert net.config == direct
    assert abs(net.config.resolution - 224 * 1.15**phi) <= 0.5
    blocks = list(net.config.blocks())
    assert len(blocks) == sum(stage.layers for stage in net.config.stages)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert all(before.out_channels == after.in_channels for before, after in zip(blocks, blocks[1:], strict=False))


@pytest.mark.parametrize("key", PUBLISHED)
def test_nearest_of_a_published_net_is_itself(key: str) -> None:
    row = PUBLISHED[key]
    net = LAW.scaled(row.depth, row.width, row.resolution / 224)
    assert net.nearest is not None and net.nearest.name == f"efficientnet_{key}" and net.nearest.distance < 1e-12
    table = B0.scaled(row.depth, row.width, row.resolution, net.config.name, dropout=net.dropout, drop_path=0.2)
    assert net.config == table and net.phi is None


def test_nearest_is_a_distance_in_logs() -> None:
    nearest = LAW.scaled(depth=1.1, resolution=240 / 224 * 1.01).nearest
    assert nearest is not None and nearest.name == "efficientnet_b1"
    assert nearest.distance == pytest.approx(math.log(1.01))
    assert CompoundScaling(base=V2_S).at(1).nearest is None


def test_smaller_nets_than_the_base() -> None:
    net = LAW.scaled(0.5, 0.25, 0.5)
    assert [stage.layers for stage in net.config.stages] == [1, 1, 1, 2, 2, 2, 1]
    assert net.config.resolution == 112 and net.config.stem_channels == 8
    assert Cost.of(net.config).parameters < Cost.of(B0.scaled()).parameters / 5
    assert LAW.scaled(1e-9, 1e-9, 1e-9).config.resolution == 1


def test_constraint() -> None:
    value, distance = LAW.constraint
    assert value == pytest.approx(1.2 * 1.21 * 1.3225) and distance == pytest.approx(2 - value)
    assert CompoundScaling(2, 2, 2).constraint == (32, 30)


def test_values_are_frozen_and_hashable() -> None:
    assert len({LAW, CompoundScaling(), CompoundScaling(base=V2_S)}) == 2
    with pytest.raises(FrozenInstanceError):
        LAW.alpha = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        LAW.at(1).depth = 2  # type: ignore[misc]


def test_real_numbers_of_any_kind() -> None:
    assert LAW.at(Fraction(1, 2)) == LAW.at(0.5) == LAW.at(np.float64(0.5))
    assert LAW.at(np.int64(2)) == LAW.at(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, True, False, "1.2", None, 1 + 0j, [1.2], 10**400, -math.inf])
@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "phi", "depth", "width", "resolution", "target_macs", "target_memory"])
def test_nonsense_is_refused_by_name(name: str, bad: object) -> None:
    calls = {"phi": lambda: LAW.at(bad)}  # type: ignore[arg-type]
    calls |= dict.fromkeys(("alpha", "beta", "gamma"), lambda: CompoundScaling(**{name: bad}))  # type: ignore[arg-type]
    calls |= dict.fromkeys(("depth", "width", "resolution"), lambda: LAW.scaled(**{name: bad}))  # type: ignore[arg-type]
    if name.startswith("target"):
        calls[name] = lambda: LAW.phi_for(**{name: bad})  # type: ignore[arg-type]
    expected = "exactly one" if bad is None and name.startswith("target") else f": {name} is "
    with pytest.raises(ValueError, match=expected) as error:
        calls[name]()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CompoundScaling(alpha=0.999999), "alpha is 0.999999; a coefficient from 1 to 100 would do"),
        (lambda: CompoundScaling(gamma=-1.15), "gamma is -1.15"),
        (lambda: CompoundScaling(base="b0"), "base is 'b0'"),
        (lambda: LAW.at(-0.1), "phi is -0.1; a number from 0 to"),
        (lambda: LAW.at(1e6), "phi is 1000000.0; a number from 0 to 25.2585 would do"),
        (lambda: CompoundScaling(beta=1e200), "beta is 1e+200; a coefficient from 1 to 100 would do".replace("+", r"\+")),
        (lambda: CompoundScaling(alpha=50).at(2), "phi is 2.0"),
        (lambda: LAW.phi_for(target_macs=1e6), "depth, width or resolution multipliers below 1 make smaller nets"),
        (lambda: round_channels(math.nan), "round_channels: channels is nan"),
        (lambda: round_channels(8, math.inf), "width inf"),
        (lambda: round_layers(3, math.inf), "round_layers: layers is 3 and depth inf"),
        (lambda: StageConfig("mbconv", True, 1, 6, 24, 2), "kernel_size is True"),
        (lambda: StageConfig("mbconv", 3, 1, 6, 1 << 40, 2), "out_channels is 1099511627776; a whole number from 1"),
        (lambda: B0.scaled(resolution=True), "resolution is True"),
        (lambda: B0.scaled(depth=True), "depth is True"),
        (lambda: replace(B0.scaled(), activation="gelu"), "activation is 'gelu'"),
        (lambda: replace(B0.scaled(), stages=()), "stages is no tuple"),
        (lambda: replace(B0.scaled(), padding="valid"), "padding is 'valid'"),
        (lambda: replace(B0.scaled(), bn_eps=math.nan), "bn_eps is nan"),
        (lambda: Cost.of(None), "layers: config is None; a NetConfig"),
        (lambda: LAW.scaled(depth=0), "depth is 0; a multiplier"),
        (lambda: LAW.scaled(width=-1.0), "width is -1.0"),
        (lambda: LAW.scaled(resolution=380), "resolution is 380; a multiplier of efficientnet_b0's, above 0 and up to 100"),
        (lambda: LAW.phi_for(), "exactly one"),
        (lambda: LAW.phi_for(target_macs=1e9, target_memory=1e9), "exactly one"),
        (lambda: LAW.phi_for(target_memory=1e9, dtype="float32"), "dtype is 'float32'"),
        (lambda: LAW.phi_for(target_memory=1e9, batch=-1), "batch is -1"),
        (lambda: LAW.phi_for(target_macs=1e18), "the largest net of the law"),
        (lambda: CompoundScaling(1, 1, 1).phi_for(target_macs=1e9), "phi changes nothing"),
        (lambda: thresholds(LAW, -1.0), "thresholds: phi_max is -1.0; a number from 0 to 25.2585"),
        (lambda: thresholds("b0"), "law is 'b0'"),
        (lambda: multiplier_growth(depth=0), "depth is 0"),
        (lambda: compound_growth(LAW, math.nan), "phi is nan"),
        (lambda: StageConfig("fused_mbconv", 3, 1, 4, 24, 2, 0.25), "se_ratio is 0.25"),
    ],
)
def test_bad_values_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()


def test_the_largest_phi_can_be_built() -> None:
    assert LAW.at(LAW.max_phi).depth == pytest.approx(100)
    flat = CompoundScaling(1, 1, 1)
    assert flat.at(1e300).config == replace(B0.scaled(dropout=0.2, drop_path=0.2), name=flat.at(1e300).config.name)


def test_infeasible_targets_say_by_how_much() -> None:
    macs = Cost.of(B0.scaled()).macs
    with pytest.raises(ValueError, match=f"already needs {macs:,} MACs, {macs - 100_000_000:,} more"):
        LAW.phi_for(target_macs=1e8)
    memory = Cost.of(LAW.at(0).config).training_memory("bf16", 2).total
    with pytest.raises(ValueError, match=rf"already needs {memory:,} bytes \(training, bf16, batch 2\), 1 more"):
        LAW.phi_for(target_memory=memory - 1, training=True, dtype="bf16", batch=2)


@settings(max_examples=10, deadline=None)
@given(target=st.floats(0.386e9, 40e9))
def test_phi_for_macs_is_the_largest(target: float) -> None:
    phi = LAW.phi_for(target_macs=target)
    assert Cost.of(LAW.at(phi).config).macs <= target < Cost.of(LAW.at(phi + 2e-9).config).macs


@pytest.mark.parametrize("phi", [1, 1.3])
def test_phi_for_takes_a_target_that_is_just_met(phi: float) -> None:
    target = Cost.of(LAW.at(phi).config).macs
    assert LAW.phi_for(target_macs=target) >= phi > LAW.phi_for(target_macs=target - 1)


@pytest.mark.parametrize("training", [False, True])
def test_phi_for_memory_is_the_largest(training: bool) -> None:
    def total(phi: float) -> int:
        cost = Cost.of(LAW.at(phi).config)
        memory = cost.training_memory("bf16", 8, 1) if training else cost.inference_memory("bf16", 8)
        return memory.total

    target = 3 * total(0)
    phi = LAW.phi_for(target_memory=target, training=training, dtype="bf16", batch=8, optimizer_tensors=1)
    assert phi > 0 and total(phi) <= target < total(phi + 2e-9)


def test_a_target_below_the_first_layer_gained_is_the_base() -> None:
    # Just above phi = 0 every stage gains a layer, at 1.48 times the MACs.
    assert LAW.phi_for(target_macs=1.4 * Cost.of(B0.scaled()).macs) == 0


def part_size(config: NetConfig, part: str, quantity: str) -> int:
    if part in ("stem", "head"):
        return int(getattr(config, f"{part}_channels"))
    stage = config.stages[int(part.rpartition(".")[2])]
    return stage.layers if quantity == "layers" else stage.out_channels


@pytest.mark.parametrize("law", [LAW, *BASES[1:], CompoundScaling(1.4, 1.3, 1.0), CompoundScaling(1.0, 1.2, 1.1)])
def test_thresholds_agree_with_the_nets_around_them(law: CompoundScaling | BaseNet) -> None:
    rows = thresholds(law, phi_max=5)
    law = law if isinstance(law, CompoundScaling) else CompoundScaling(base=law)
    assert rows and [row.phi for row in rows] == sorted(row.phi for row in rows)
    state: dict[tuple[str, str], int] = {}
    first = law.at(0).config
    for phi, part, quantity, before, after in rows:
        below = law.at(max(0, phi - 1e-9)).config
        assert part_size(below, part, quantity) == before == state.get((part, quantity), part_size(first, part, quantity))
        assert part_size(law.at(phi + 1e-9).config, part, quantity) == after
        state[part, quantity] = after
    # None is missing: the changes listed lead from the base to the net at the end.
    end = law.at(5).config
    for number, stage in enumerate(first.stages):
        assert state.get((f"blocks.{number}", "layers"), stage.layers) == end.stages[number].layers
        assert state.get((f"blocks.{number}", "channels"), stage.out_channels) == end.stages[number].out_channels
    assert state.get(("stem", "channels"), first.stem_channels) == end.stem_channels
    assert state.get(("head", "channels"), first.head_channels) == end.head_channels


@settings(max_examples=25, deadline=None)
@given(
    channels=st.lists(st.integers(1, 60), min_size=2, max_size=2),
    layers=st.integers(1, 4),
    limit=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_thresholds_of_any_base(channels: list[int], layers: int, limit: float) -> None:
    stages = tuple(StageConfig("mbconv", 3, 2, 6, count, layers, 0.25) for count in channels)
    base = BaseNet("any", stages, stem_channels=12, head_channels=100, resolution=32, round_limit=limit)
    law = CompoundScaling(base=base)
    rows = thresholds(base, 6)
    for phi, part, quantity, before, after in rows:
        assert part_size(law.at(max(0.0, phi - 1e-9)).config, part, quantity) == before
        assert part_size(law.at(phi + 1e-9).config, part, quantity) == after
    end = {(row.part, row.quantity): row.after for row in rows}
    for (part, quantity), after in end.items():
        assert part_size(law.at(6).config, part, quantity) == after


def test_b0_thresholds() -> None:
    rows = thresholds(B0, 4)
    at_zero = [row for row in rows if row.phi == 0]
    assert [(row.part, row.before, row.after) for row in at_zero] == [
        (f"blocks.{number}", stage.layers, stage.layers + 1) for number, stage in enumerate(B0.stages)
    ]
    later = {row[1:]: row.phi for row in rows if row.phi}
    assert later["blocks.3", "layers", 4, 5] == pytest.approx(math.log(4 / 3) / math.log(1.2))
    assert later["blocks.0", "layers", 2, 3] == pytest.approx(math.log(2) / math.log(1.2))
    # 16 becomes 24 at 17.78 = 16 / 0.9, before the half-way 20.
    assert later["blocks.0", "channels", 16, 24] == pytest.approx(math.log(1 / 0.9) / math.log(1.1))
    assert later["stem", "channels", 32, 40] == pytest.approx(math.log(32 / 0.9 / 32) / math.log(1.1))
    assert later["head", "channels", 1280, 1288] == pytest.approx(math.log(1284 / 1280) / math.log(1.1))


def test_lite_ends_do_not_change() -> None:
    rows = thresholds(LITE0, 5)
    assert not [row for row in rows if row.part in ("stem", "head")]
    assert not [row for row in rows if row.quantity == "layers" and row.part in ("blocks.0", "blocks.6")]
    assert [row for row in rows if row.quantity == "channels" and row.part == "blocks.6"]


def test_growth_of_b0() -> None:
    rows = multiplier_growth(B0, depth=2, width=2, resolution=2)
    figures = [tuple(round(value, 2) for value in (row.activations, row.parameters, row.macs)) for row in rows[:3]]
    assert figures == [(1.79, 1.93, 2.03), (2.0, 3.43, 3.76), (4.0, 1.0, 3.99)]
    assert [(row.macs_rule, row.parameters_rule, row.activations_rule) for row in rows] == [
        (2, 2, 2),
        (4, 4, 2),
        (4, 1, 4),
        (32, 8, 16),
    ]
    assert [(row.depth, row.width, row.resolution) for row in rows] == [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]
    memory = [tuple(round(value, 2) for value in (row.peak, row.saved)) for row in rows[:3]]
    assert memory == [(1.0, 1.81), (1.94, 1.99), (4.0, 3.99)]
    assert [(row.peak_rule, row.saved_rule, row.depthwise_rule) for row in rows[:3]] == [(1, 2, 2), (2, 2, 2), (4, 4, 4)]
    # Depthwise layers do not grow with the square of width, and rounding makes 23 blocks of 16 for alpha = 1.2.
    assert rows[1].depthwise == pytest.approx(2, rel=0.01) and rows[1].macs < 4
    assert compound_growth(B0, 1)[-1].layers == 23 / 16
    assert all(row.depthwise is not None and row.pixels == row.resolution**2 for row in rows)
    # Together they nearly multiply: what is left is the ends of the net and rounding.
    assert rows[3].macs == pytest.approx(math.prod(row.macs for row in rows[:3]), rel=0.02)


def test_compound_growth() -> None:
    for law in (LAW, CompoundScaling(base=V2_S)):
        *alone, net = compound_growth(law, 3)
        assert net.macs_rule == 8 and net.label == "phi=3"
        exact = Cost.of(law.at(3).config), Cost.of(law.base.scaled())
        assert net.macs == exact[0].macs / exact[1].macs
        assert net.parameters == exact[0].parameters / exact[1].parameters
        assert [row.macs_rule for row in alone] == pytest.approx([1.2**3, 1.1**6, 1.15**6])
        assert (net.depth, net.width, net.resolution) == (alone[0].depth, alone[1].width, alone[2].resolution)
    assert compound_growth(B0, 0)[-1].macs == 1


NO_TORCH = """
import sys, types
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
package = types.ModuleType("effnet_fast")  # the real one imports torch
package.__path__ = [sys.argv[1]]
sys.modules["effnet_fast"] = package
from effnet_fast.scaling import B0, Cost
print(Cost.of(B0.scaled()).parameters, "torch" in sys.modules)
"""


def test_scaling_needs_no_torch() -> None:
    package = Path(scaling.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", NO_TORCH, package], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["5288548", "False"], done.stderr
