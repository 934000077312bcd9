"""A model of the time that a CUDA kernel takes: its instructions, counted in what nvcc made of it, and its bytes, against an H200.

A roofline says what no kernel beats; this says what THIS kernel should take, so that a measurement far from it shows either a
mistake in the model or something in the kernel that nobody thought of. A launch takes the longest of

    memory    bytes that must move, at the machine's copy bandwidth
    l2        bytes that blocks ask for, halos and repeated weights included, at L2_BYTES;  sm: one multiprocessor's, at SM_BYTES
    requests  to L2 of the depthwise kernel on tensor cores, one a line of 128 bytes and warp instruction, at L2_REQUESTS
    latency   bytes read, when a multiprocessor has no more in flight than its resident blocks ask for ahead, LATENCY each time
    issue     warp instructions, 4 a clock and multiprocessor
    fp32      multiply-adds, multiplications and additions, 4 warp instructions a clock;  half: integers, moves, comparisons and
              conversions, 2;  special: exponentials and reciprocals, half of one
    tensor    mma at MMA_RATE of the dense peak
    lsu       128 bytes of shared memory, or one line of global memory, a clock

on the fullest multiprocessor, blocks being whole, and RAMP for a launch, its first load and its drain. Perfect overlap is assumed.
``counts`` is benchmarks/instructions.json: warp instructions by kernel and part, as tests/sass.py counts them ("shared" is in
128-byte wavefronts, a shuffle being one, "lines" in 128-byte lines, "copies" are cp.async and "stores" like them 16 bytes a lane,
lanes running along a block's channels of one pixel and then on to the next).
What is not the machine's own measured copy bandwidth, clock and number of multiprocessors is an assumption: the constants below.
L2_REQUESTS alone rests on a measurement, of a kernel that stored 32 bytes a request.

On an H200 the depthwise kernel takes 1.3 to 2.5 times what this says and the gate 1.4 to 3.1 times (benchmarks/results/
kernels-cuda.json): the model leaves out latency that too few warps do not hide, of instructions, shared memory and barriers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from effnet_fast.benchmark.roofline import ITEM_BYTES, Launch, Machine
from effnet_fast.ops.depthwise.launch import DIRECT_THREADS, rows_and_pieces, tile

RAMP = 1.5e-6  # seconds
L2_BYTES = 5.5e12  # a second, all multiprocessors together
# A second. 3x3 of 144 channels, 56x56, batch 256, stored 32 bytes a request: 12 million requests in 189 us were 88 % of the peak.
L2_REQUESTS = 7e10
SM_BYTES = 64  # that one multiprocessor takes in a clock
LATENCY, L2_LATENCY = 0.6e-6, 0.3e-6  # seconds of a trip to busy memory, to L2
CLUSTER_BARRIER = 0.5e-6  # seconds from the first block's arrival to the last one's going on
MMA_PEAK, MMA_RATE = 512, 0.62  # multiply-adds a clock and quarter of a multiprocessor, half types; the share that mma.sync reaches
SHARED, REGISTERS, THREADS = 227 * 1024, 65536, 2048  # of a multiprocessor
ARCH = 90  # that the counts are for
_GATE_THREADS = 256
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Counts = Mapping[str, Any]  # of one kernel: its registers, and its parts
Clocks = defaultdict[str, float]  # of the fullest multiprocessor, by what is busy


class Predicted(NamedTuple):
    """Seconds, what takes them, and the times that they are the largest of."""

    seconds: float
    binds: str
    times: dict[str, float]


def predict(launch: Launch, dtype: str, batch: int, machine: Machine, kernels: Mapping[str, Counts]) -> Predicted | None:
    """For the native CUDA kernel of ``launch``; None where there is none. ``kernels``: the counts, by kernel."""
    if launch.op == "depthwise_conv_bn_act":
        return depthwise(launch, dtype, batch, machine, kernels)
    if launch.op == "squeeze_excite_gate":
        return gate(launch, dtype, batch, machine, kernels)
    return None


def least(launch: Launch, dtype: str, batch: int, machine: Machine) -> Predicted:
    """For a kernel whose instructions nobody counted: its roofline, with two uses of a special-function unit an activation, and
    RAMP."""
    limit = launch.bound(machine, dtype, batch, special=2.0)
    return _predicted({limit.binds: limit.seconds}, RAMP)


class _Tensor(NamedTuple):
    """What csrc/depthwise/forward_tensor.cuh's TensorTraits say of a block."""

    threads: int
    stage_rows: int
    in_columns: int
    in_flight: int
    shared: int


def _tensor(kernel: int, stride: int, columns: int, channels: int) -> _Tensor:
    groups, live = channels // 16, -(-kernel // stride)
    in_columns = (columns - 1) * stride + kernel
    stage = live * stride * 2 * groups * (32 // columns * in_columns | 1) * 16
    stages, threads = (3 if 3 * stage <= 72 * 1024 else 2), 64 * groups
    norm, weight, out = 8 * channels, (kernel**2 + 1) * (2 * channels + 16), live * 64 * channels
    stays = stages * stage + (norm if (kernel, groups) == (3, 3) or (kernel, stride) == (5, 1) else 0)
    rows = stays + (2 * out if stays + 2 * out <= 99 * 1024 else out)
    return _Tensor(threads, live * stride, in_columns, (stages - 1) * stage, max(rows, stages * stage + norm + weight))


def _lines(channels: int, width: int) -> float:
    """128-byte lines that a warp's copy or store touches on average: 16 bytes a lane, width / 8 lanes a pixel of ``channels``
    halves."""
    chunks, pixels, touched, warps = width // 8, 32, 0, 0
    for first in range(0, channels, width):
        for lane in range(0, chunks * pixels, 32):
            places = [(i // chunks * channels, first + i % chunks * 8) for i in range(lane, lane + 32)]
            touched += len({(pixel + c) // 64 for pixel, c in places if c < channels})
            warps += 1
    return touched / warps


def depthwise(launch: Launch, dtype: str, batch: int, machine: Machine, kernels: Mapping[str, Counts]) -> Predicted:
    """Of csrc/depthwise/forward.cuh, with SiLU; fp16 has bf16's counts, though its SiLU takes 3 instructions more."""
    d = dict(launch.shape)
    k, s, channels, height = d["kernel"], d["stride"], d["c"], d["h"]
    out, across = -(-height // s), -(-d["w"] // s)
    t, live = tile(_DTYPES[dtype], channels, across), -(-k // s)
    segment, pieces = rows_and_pieces(_DTYPES[dtype], batch, channels, out, across, machine.multiprocessors)
    strips, item = -(-across // t.columns), ITEM_BYTES[dtype]
    if t.threads:
        width, threads, shared = t.channels, DIRECT_THREADS, 4 * DIRECT_THREADS * t.channels * k * k
        counts = kernels[f"direct k{k} s{s} {t.columns}x{width}"]
        stage_rows, in_columns = live * s, (t.columns - 1) * s + k
        in_flight = in_columns * width * item * threads
        blocks = -(-batch * strips * (channels // width) // threads)
    else:
        width = t.channels if (k, s) == (3, 1) else 48
        threads, stage_rows, in_columns, in_flight, shared = _tensor(k, s, t.columns, width)
        counts = kernels[f"tensor k{k} s{s} {t.columns}x{width}"]
        blocks = -(-channels // width) * strips * -(-batch // t.images)
    lines = 0.0 if t.threads else _lines(channels, width)
    clocks: Clocks = defaultdict(float)
    rows_read, requests, segments, pad = 0, 0.0, -(-out // segment), k // 2
    columns_read = min(strips * in_columns, d["w"] + (strips - 1) * (k - s))
    for part in range(segments):
        rows_out = min(segment, out - part * segment)
        rows_in, first = (rows_out - 1) * s + k, part * segment * s - pad
        real = min(rows_in, height - first) - max(0, -first)
        rows_read += real
        if not t.threads:
            columns = real * columns_read + rows_out * across  # copied and stored
            requests += blocks / strips * t.images * columns * width / 256 * lines
        times = {"once": 1, "rows": real / stage_rows, "finish": rows_out / live, "pass": -(-rows_in // stage_rows)}
        if t.threads:
            times["weight"] = min(channels // width, threads) * width * k * k / threads
        for name, count in times.items():
            _add(clocks, counts[name], count * threads / 32, lines)
    full = -(-blocks * segments // machine.multiprocessors)  # blocks of average weight
    spent = {name: number * full / segments / machine.clock for name, number in clocks.items()}
    x, y = batch * channels * height * d["w"] * item, batch * channels * out * across * item
    sums, weights = 4 * batch * pieces * channels * d["squeeze"], k * k * channels * item
    halo = batch * rows_read * columns_read * channels * item
    again = blocks * segments * k * k * width * item
    resident = min(full, _resident(counts["registers"], threads, shared))
    spent |= {
        "memory": (x + y + sums + weights) / machine.copy,
        "l2": (halo + y + sums + again) / L2_BYTES,
        "requests": requests / L2_REQUESTS,
        "latency": halo * LATENCY / (in_flight * resident * min(machine.multiprocessors, blocks * segments)),
    }
    return _predicted(spent, RAMP)


class GatePlan(NamedTuple):
    """How csrc/squeeze_excite/gate.cuh cuts a launch on a GPU with clusters: images of a block, what its Plan says, whether weights
    are staged in shared memory, and how many bytes of that a block takes."""

    images: int
    slices: int
    units: int
    channels: int
    squeeze_shift: int
    reduce_shift: int
    expand_shift: int
    staged: int
    shared: int

    @property
    def rows(self) -> int:
        """Of a fully connected layer, that a lane works on at once."""
        return 1 if self.images == 1 else 4


def gate_plan(batch: int, channels: int, reduced: int, item: int, multiprocessors: int) -> GatePlan:
    """What gate.cuh's launch_gate and make_plan choose."""
    elements = 2 * channels * reduced

    def clocks(plan: GatePlan) -> int:
        groups = -(-batch // plan.images)
        turns = -(-groups * plan.slices // multiprocessors)
        block = turns * elements * item // plan.slices // (64 if plan.staged else 16)
        fetched = max(block, groups * elements * item // (21 * multiprocessors))
        products = turns * elements * plan.images // plan.slices // (20 if plan.images == 1 else 80)
        return fetched + products + (600 + 50 * plan.slices) * (plan.slices > 1)

    plans = [_gate_plan(images, slices, channels, reduced, item) for slices in (1, 2, 4, 8) for images in (1, 4)]
    return min((plan for plan in plans if plan.shared <= 96 << 10), key=clocks)


def _gate_plan(images: int, slices: int, channels: int, reduced: int, item: int) -> GatePlan:
    plan = GatePlan(images, slices, -(-reduced // slices), -(-channels // slices // 8) * 8, 0, 0, 0, 0, 0)
    stride, shift = -(-channels // 4) * 4, 0
    while 4 << shift < stride and 1 << shift < _GATE_THREADS:
        shift += 1

    def lanes(rows: int, inner: int) -> int:
        at_once = {shift: (_GATE_THREADS >> shift) * plan.rows for shift in (5, 4, 3, 2)}
        return min(at_once, key=lambda shift: (-(-inner // (4 << shift)) + 1) * -(-rows // at_once[shift]))

    floats = (_GATE_THREADS >> max(shift, 5)) * images * stride + images * -(-reduced // 4) * 4
    biases = -(-(plan.units + plan.channels) // 4) * 4
    weights = -(-plan.units * channels // 8) * 8 + -(-plan.channels * reduced // 8) * 8
    with_weights = 4 * (floats + biases) + item * weights
    staged = with_weights <= 96 << 10
    return plan._replace(
        squeeze_shift=shift,
        reduce_shift=lanes(plan.units, channels),
        expand_shift=lanes(plan.channels, reduced),
        staged=int(staged),
        shared=with_weights if staged else 4 * floats,
    )


def gate(launch: Launch, dtype: str, batch: int, machine: Machine, kernels: Mapping[str, Counts]) -> Predicted:
    """Of csrc/squeeze_excite/gate.cuh, for the partial sums that the depthwise kernel hands over; its fp16 has bf16's counts.

    "latency" is the chain of trips to L2 that a block makes: its partial sums, as many at a time as are unrolled, its weights where
    they are not staged meanwhile, and the barrier of a cluster. "sm" is what the blocks of a multiprocessor read. That a cluster
    must fit one part of the GPU, and what instructions cost that no earlier launch has fetched, is left out.
    """
    d, item, processors = dict(launch.shape), ITEM_BYTES[dtype], machine.multiprocessors
    channels, reduced = d["c"], d["reduced"]
    pieces = rows_and_pieces(_DTYPES[dtype], batch, channels, d["h"], d["w"], processors)[1]
    plan = gate_plan(batch, channels, reduced, item, processors)
    counts = kernels[f"gate {plan.images} {'fp32' if dtype == 'fp32' else 'bf16'}"]
    groups, warps = -(-batch // plan.images), _GATE_THREADS // 32
    columns, each = -(-channels // (4 << plan.squeeze_shift)), -(-pieces // (_GATE_THREADS >> plan.squeeze_shift))
    passes = Counter(once=warps, piece=warps * columns * each * plan.images, mean=-(-plan.images * channels // 32))
    trips = columns * -(-each // (8 if plan.images == 1 else 2))
    for rows, inner, shift in ((plan.units, channels, plan.reduce_shift), (plan.channels, reduced, plan.expand_shift)):
        row_groups, along = -(-rows // ((32 >> shift) * plan.rows)), -(-inner // (4 << shift))
        passes += Counter({"row": row_groups, "scalars" if inner % 4 else "vectors": row_groups * along})
        if not plan.staged:
            trips += -(-row_groups // warps) * -(-along // (4 if plan.images == 1 else 1))
    clocks: Clocks = defaultdict(float)
    for name, number in passes.items():
        _add(clocks, counts[name], number, 128)  # a copy is of whole lines
    full = -(-groups * plan.slices // processors)
    turns = -(-full // min(full, _resident(counts["registers"], _GATE_THREADS, plan.shared)))
    sums, weights, made = 4 * batch * pieces * channels, 2 * channels * reduced * item, 4 * batch * channels
    read = 4 * plan.images * channels * pieces + (plan.units * channels + plan.channels * reduced) * item
    spent = {pipe: number * full / machine.clock for pipe, number in clocks.items()}
    spent |= {
        "memory": (sums + weights + made) / machine.copy,
        "l2": (sums * plan.slices + groups * weights + made) / L2_BYTES,
        "sm": read * full / SM_BYTES / machine.clock,
        "latency": turns * (trips * L2_LATENCY + CLUSTER_BARRIER * (plan.slices > 1)),
    }
    return _predicted(spent, RAMP)


def _add(clocks: Clocks, part: Mapping[str, int], times: float, lines: float) -> None:
    """Clocks of a multiprocessor that ``times`` warps' passes over a part keep each pipe busy. ``lines``: of a copy or store."""
    issued = Counter(part)
    clocks["issue"] += times * issued["issue"] / 4
    clocks["fp32"] += times * issued["fp32"] / 4
    clocks["half"] += times * issued["half"] / 2
    clocks["special"] += times * issued["special"] * 2
    clocks["tensor"] += times * (issued["k8"] * 1024 + issued["k16"] * 2048) / (4 * MMA_PEAK * MMA_RATE)
    moved = issued["copies"] + issued["stores"]
    clocks["lsu"] += times * (issued["shared"] + issued["lines"] + moved * lines)


def _resident(registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds."""
    warps = REGISTERS // 4 // (32 * -(-registers // 8) * 8)  # of a quarter, which has registers of its own
    of_registers = 4 * warps // (threads // 32)
    return max(1, min(of_registers, SHARED // (shared + 1024), THREADS // threads, 32))


def _predicted(times: dict[str, float], ramp: float) -> Predicted:
    binds = max(times, key=times.__getitem__)
    return Predicted(times[binds] + ramp, binds, times)
