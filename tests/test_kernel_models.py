"""The models of times: the roofline of nets and kernels, and that of our CUDA kernels' instructions."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from test_benchmarks import ROOT, one_of

from benchmarks import findings, run
from effnet_fast.benchmark import kernel_time, machine
from effnet_fast.benchmark.roofline import (
    H200,
    LEVELS,
    Launch,
    bound,
    launches,
    op_launches,
)
from effnet_fast.models import FAMILY
from effnet_fast.scaling import Cost

# Per image, bf16: GMAC dense and depthwise, SiLU (M), MB moved, kernels and H200's bound in us at batch 256, for LI, L1, L2, L3.
MODEL = {
    "b0": (".351 .035 6.2", "59 42 27 14", "164 124 66 51", "13.8 9.9 6.5 4.1"),
    "b1": (".625 .060 9.8", "97 73 45 24", "232 179 93 72", "22.6 17.1 10.6 7.1"),
    "b2": (".912 .080 12.4", "123 92 57 31", "232 179 93 72", "28.9 21.8 13.6 9.1"),
    "b3": ("1.69 .133 21.4", "212 159 98 53", "262 203 105 81", "49.7 37.5 23.4 15.6"),
    "b4": ("4.09 .299 44.7", "442 335 204 112", "322 251 129 99", "104 79.7 49.1 33.5"),
    "b5": ("9.65 .610 88.7", "888 686 410 230", "390 306 156 120", "211 165 100 70.5"),
    "b6": ("18.0 1.05 150", "1506 1167 695 390", "450 354 180 138", "359 282 172 123"),
    "b7": ("35.9 1.86 259", "2617 2050 1208 689", "548 433 219 168", "629 500 303 222"),
}


def rounds_to(value: float, printed: str) -> bool:
    """To half of the last digit and a little: the figures were rounded to four digits first."""
    digits = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.56 * 10**-digits


@pytest.mark.parametrize("net", MODEL)
def test_roofline_of_the_family(net):
    config, (counts, *levels) = FAMILY[f"efficientnet_{net}"], MODEL[net]
    rows = {level: launches(config, level) for level in LEVELS}
    depthwise = sum(row.taps for row in rows["L2"] if row.op == "depthwise_conv_bn_act")
    dense, activated = (sum(getattr(row, name) for row in rows["L2"]) for name in ("dense", "activated"))
    for value, printed in zip((dense / 1e9, depthwise / 1e9, activated / 1e6), counts.split(), strict=True):
        assert rounds_to(value, printed)
    for number, level in enumerate(LEVELS):
        moved, count, limit = (column.split()[number] for column in levels)
        assert rounds_to(sum(row.elements for row in rows[level]) * 2 / 1e6, moved)
        assert sum(row.kernels for row in rows[level]) == int(count)
        assert rounds_to(bound(rows[level], H200, "bf16", 256) / 256 * 1e6, limit)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b7", "efficientnetv2_s", "efficientnet_lite2"])
def test_roofline_agrees_with_the_cost_model(name):
    """Launch by launch: two counts of what crosses between fused kernels, and of the multiply-adds."""
    costs = Cost.of(FAMILY[name]).by("launch")
    rows = [row for row in op_launches(FAMILY[name]) if row.name != "head"]
    assert [row.name for row in rows] == [launch for launch in costs if launch not in ("head", "classifier")]
    for row in rows:
        assert row.elements + row.vectors == sum(layer.fused for layer in costs[row.name].layers), row.name
        assert row.flops(1) == costs[row.name].flops, row.name


def test_bound_names_what_binds():
    machine = replace(H200, copy=1e9, dense={"bf16": 2e9}, lanes=1e9, special=1e9)
    launch = Launch("one", elements=1000)
    assert launch.bound(machine, "bf16", 2) == (4e-6, "memory")
    assert replace(launch, dense=9000).bound(machine, "bf16", 2) == (18e-6, "dense")
    assert replace(launch, lanes=9000).bound(machine, "bf16", 1) == (9e-6, "lanes")
    assert replace(launch, activated=9000).bound(machine, "bf16", 1, special=2.0) == (18e-6, "special")
    with pytest.raises(ValueError, match="level is 'L9'"):
        launches(FAMILY["efficientnet_b0"], "L9")


COUNTS = json.loads(run.INSTRUCTIONS.read_text())["kernels"]


def modelled(net, op, dtype="bf16", batch=128, counts=COUNTS, on=H200):
    rows = {row.shape: row for row in op_launches(FAMILY[f"efficientnet_{net}"]) if row.op == op}
    return [(row, kernel_time.predict(row, dtype, batch, on, counts)) for row in rows.values()]


def test_the_model_gives_the_figures_of_the_depthwise_kernels_note():
    note = (ROOT / "csrc" / "depthwise" / "forward.cuh").read_text()
    stated = re.search(r"batch of 128 bf16 images runs at (\d+) % \(B0\) and (\d+) % \(B5\)", note)
    for net, percent in zip(("b0", "b5"), stated.groups(), strict=True):
        shares = [row.elements * 128 * 2 / H200.copy / time.seconds for row, time in modelled(net, "depthwise_conv_bn_act")]
        assert findings.geomean(shares) == pytest.approx(int(percent) / 100, abs=0.005)


# Says how gate.cuh cuts the launches of standard input, instead of starting them.
GATE_PLANS = r"""
#include <cstdio>
#include "common/cluster.h"
namespace effnet_fast {
template <int G, typename P, typename Plan>
void tell(unsigned blocks, int, int slices, long bytes, void*, const P& p, const Plan& plan) {
  std::printf("%d %d %d %d ", G, slices, plan.units, plan.channels);
  std::printf("%d %d %d ", plan.squeeze_shift, plan.reduce_shift, plan.expand_shift);
  std::printf("%d %ld\n", plan.reduce_elements > 0, bytes);
  if (blocks != (p.batch + G - 1) / G * slices || 1 << plan.slices_shift != slices) std::printf("a grid of %u blocks\n", blocks);
}
}
#define launch_cluster(kernel_of_type, and_images, ...) tell<G>(__VA_ARGS__)
#include "squeeze_excite/gate.cuh"
int main() {
  effnet_fast::squeeze_excite::GateParams p{};
  for (int item, multiprocessors; std::scanf("%ld %d %d %d %d", &p.batch, &p.channels, &p.reduced, &item, &multiprocessors) == 5;) {
    using namespace effnet_fast;
    if (item == 4) squeeze_excite::launch_gate<float>(p, multiprocessors, 8, nullptr);
    else squeeze_excite::launch_gate<bf16>(p, multiprocessors, 8, nullptr);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on PATH")
def test_the_models_gate_plan_is_the_kernels(tmp_path):
    rows = [dict(row.shape) for net in FAMILY for row in op_launches(FAMILY[net]) if row.op == "squeeze_excite_gate"]
    sizes = {(row["c"], row["reduced"]) for row in rows}
    sizes |= {(37, 5), (3200, 20), (20, 1000), (9000, 2000), (641, 39)}
    asked = [(n, c, r, item, m) for n in (1, 3, 16, 128) for c, r in sorted(sizes) for item in (2, 4) for m in (1, 20, 132)]
    (tmp_path / "plans.cpp").write_text(GATE_PLANS)
    command = ["g++", "-std=c++20", "-w", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}", "plans.cpp", "-o", "plans"]
    subprocess.run(command, cwd=tmp_path, check=True)
    text = "\n".join(" ".join(map(str, row)) for row in asked)
    told = subprocess.run([tmp_path / "plans"], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [" ".join(map(str, kernel_time.gate_plan(*row))) for row in asked]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", ["depthwise_conv_bn_act", "squeeze_excite_gate"])
def test_the_model_of_kernel_times(op, dtype):
    """Every launch of the family has one, it is never below the roofline, and more work never takes less time."""
    slow = {
        name: {part: {pipe: 50 * n for pipe, n in held.items()} if isinstance(held, dict) else held for part, held in row.items()}
        for name, row in COUNTS.items()
    }
    for net in ("b0", "b4", "b7"):
        for batch in (1, 128):
            for row, time in modelled(net, op, dtype, batch):
                assert time.seconds > row.bound(H200, dtype, batch).seconds and time.binds in time.times, row
                if op == "depthwise_conv_bn_act":  # a gate of one image adds up more partial sums
                    assert kernel_time.predict(row, dtype, 16 * batch, H200, COUNTS).seconds >= time.seconds
                more = kernel_time.predict(row, dtype, batch, H200, slow)
                assert more.seconds >= time.seconds and more.times["issue"] == pytest.approx(50 * time.times["issue"])
                starved = kernel_time.predict(row, dtype, batch, replace(H200, copy=1e9), COUNTS)
                assert starved.binds == "memory" or op == "squeeze_excite_gate"


def test_the_model_stands_beside_the_measurement():
    case = one_of("kernels", "depthwise c96 112x112 k3s2 n1")
    row = {"entrants": {name: {"status": "skipped"} for name in ("ours native", "ours triton", "eager nchw")}}
    run._add_model(row, case, H200, COUNTS)
    native, triton, eager = row["entrants"].values()
    assert native["model_us"] > triton["model_us"] > 1e6 * case.launch.bound(H200, "fp32", 1).seconds and len(eager) == 1
    gpu = {"gpu": {"capability": "9.0"}}
    assert run._counts("kernels", "cuda", gpu)[0] == COUNTS
    assert run._counts("kernels", "cuda", {"gpu": {"capability": "8.0"}})[0] is None


def test_a_cpus_bound_knows_its_multiply_adds():
    """Those of a 5x5 depthwise convolution in cache are slower than its bytes; what a GPU's lanes do beside them is not counted."""
    measured = machine.measure("cpu", "bf16")
    assert math.isfinite(measured.lanes)
    launch = next(row for row in op_launches(FAMILY["efficientnet_b0"]) if dict(row.shape).get("kernel") == 5)
    assert launch.bound(replace(measured, copy=1e15), "bf16", 1) == (launch.taps / measured.lanes, "lanes")
    assert 0 < launch.taps < launch.lanes
