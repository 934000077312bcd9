"""The least time a network or a kernel can take: bytes and operations per launch, from a ``NetConfig``, against a machine's rates.

A network is a sequence of launches that depends on how far it is fused:

    LI   what inductor does: convolutions alone, norm + activation one pointwise kernel, the pool and the gate read again
    L1   convolution + norm + activation one kernel; pool, the two layers of squeeze-excite, scaling and addition apart
    L2   expand | depthwise + squeeze | gate | project: what effnet_fast runs
    L3   expand + depthwise + squeeze in one kernel: the expanded tensor never leaves the chip. On CUDA where native kernels are
         asked for strictly; on the CPU the inference plan does it in bands

The bound of a launch is the largest of four times: bytes over copy bandwidth, dense multiply-adds over the matrix units' rate,
lane instructions over the vector units' (on a CPU the multiply-adds of the taps alone), exponentials over the special-function
units'. A net's bound is the sum over its launches. The taps of a depthwise convolution count as lane instructions in every dtype:
the half-precision kernel for CUDA, which leaves them to the matrix units, could come below the bound where lanes bind (5x5).
Partial sums are as few as can be, one a channel and image; kernels make more.
Vectors of one number a channel (partial sums, gates, pooled features) are left out at LI, L1 and L3, where their form is open, and
wherever ``vectors=False``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from effnet_fast.scaling.config import BlockConfig, NetConfig

ITEM_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
LEVELS = ("LI", "L1", "L2", "L3")
EXPAND_DEPTHWISE = "expand_depthwise_conv_bn_act"  # the op that L3 has in place of two
# Lane instructions (a fused multiply-add is one) beside the taps: of a depthwise output (unpack, shift, activation, pack, sum), and
# of an activation and a shift in the epilogue of a matrix product.
DEPTHWISE_LANES, ACTIVATION_LANES = 8, 4


@dataclass(frozen=True)
class Machine:
    """Rates per second. ``dense``: FLOP/s of matrix products by arithmetic; ``lanes``: fp32 lane instructions, of a CPU fp32
    multiply-adds; ``special``: exponentials or reciprocals. ``shared``: bytes of fast memory that a block of threads can hold, for
    L3's tiles. Of a GPU: ``multiprocessors``, 0 for a CPU, and their ``clock`` in Hz."""

    name: str
    copy: float
    dense: dict[str, float]
    lanes: float = math.inf
    special: float = math.inf
    shared: int = 227 * 1024
    multiprocessors: int = 0
    clock: float = 0.0


#: 132 SMs at 1.98 GHz. Copy and bf16 rates are those seen on one card, the others the data sheet's; a benchmark measures its own.
H200 = Machine(
    name="H200 (modelled)",
    copy=4.3e12,
    dense={"bf16": 790e12, "fp16": 790e12, "tf32": 395e12, "fp32": 67e12},
    lanes=132 * 128 * 1.98e9,
    special=132 * 16 * 1.98e9,
    multiprocessors=132,
    clock=1.98e9,
)


class Bound(NamedTuple):
    """Seconds, and what takes them: "memory", "dense", "lanes" or "special"."""

    seconds: float
    binds: str


@dataclass(frozen=True)
class Launch:
    """One kernel, or ``kernels`` alike. Counts are per image, ``weights`` per launch.

    op          the op of effnet_fast.ops that is this launch, or "" where it has none
    shape       what the op's arguments follow from: see :func:`conv`, :func:`depthwise`, :func:`gate`, :func:`pointwise`
    elements    of activations, read and written
    vectors     fp32 numbers read and written that are one a channel: partial sums, gates
    weights     elements read once
    dense       multiply-adds that matrix units can do
    taps        those that lanes do: a depthwise convolution's, a gate's (too few of these to count as its lanes)
    lanes       a GPU's lane instructions, the taps' included
    activated   evaluations of the activation
    """

    name: str
    op: str = ""
    shape: tuple[tuple[str, int], ...] = ()
    elements: int = 0
    vectors: int = 0
    weights: int = 0
    dense: float = 0
    taps: int = 0
    lanes: float = 0
    activated: float = 0
    kernels: int = 1

    def bytes(self, dtype: str, batch: int, vectors: bool = True) -> int:
        moved = (batch * self.elements + self.weights) * ITEM_BYTES[dtype]
        return moved + batch * self.vectors * 4 if vectors else moved

    def flops(self, batch: int) -> int:
        """Two per multiply-add, as if nothing were computed twice."""
        return round(2 * batch * (self.dense + self.taps))

    def bound(self, machine: Machine, dtype: str, batch: int, special: float = 1.0, vectors: bool = True) -> Bound:
        """``special``: uses of a special-function unit an activation takes (1 for tanh, 1.5 for a shared reciprocal, 2 plain)."""
        times = {
            "memory": self.bytes(dtype, batch, vectors) / machine.copy,
            "dense": 2 * batch * self.dense / machine.dense[dtype],
            "lanes": batch * (self.lanes if machine.multiprocessors else self.taps) / machine.lanes,
            "special": batch * special * self.activated / machine.special,
        }
        binds = max(times, key=times.__getitem__)
        return Bound(times[binds], binds)


class Size(NamedTuple):
    """Height and width."""

    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def strided(self, stride: int) -> Size:
        return Size(-(-self.height // stride), -(-self.width // stride))


def conv(name: str, inputs: int, outputs: int, size: Size, kernel: int, stride: int, activation: bool, residual: bool) -> Launch:
    """A dense k x k convolution with its epilogue; the ``residual`` of a block that is this convolution alone is its own input."""
    after, read, made = size.strided(stride), inputs * size.pixels, outputs * size.strided(stride).pixels
    weights = inputs * outputs * kernel**2
    return Launch(
        name,
        "conv_bn_act",
        _shape(c=inputs, k=outputs, h=size.height, w=size.width, kernel=kernel, stride=stride, act=activation, residual=residual),
        elements=read + made,
        weights=weights,
        dense=weights * after.pixels,
        lanes=made * (1 + ACTIVATION_LANES * activation),
        activated=made * activation,
    )


def depthwise(name: str, channels: int, size: Size, kernel: int, stride: int, activation: bool, squeeze: bool) -> Launch:
    """A depthwise convolution with its epilogue and, with ``squeeze``, one partial sum a channel."""
    made = channels * size.strided(stride).pixels
    return Launch(
        name,
        "depthwise_conv_bn_act",
        _shape(c=channels, h=size.height, w=size.width, kernel=kernel, stride=stride, act=activation, squeeze=squeeze),
        elements=channels * size.pixels + made,
        vectors=channels * squeeze,
        weights=channels * kernel**2,
        taps=made * kernel**2,
        lanes=made * (kernel**2 + DEPTHWISE_LANES),
        activated=made * activation,
    )


def gate(name: str, channels: int, reduced: int, size: Size) -> Launch:
    """Both layers of a squeeze-excite over ``channels`` of ``size``, of which at least one sum a channel comes in. Its
    multiply-adds are far from binding."""
    shape = _shape(c=channels, reduced=reduced, h=size.height, w=size.width)
    macs = 2 * channels * reduced
    return Launch(name, "squeeze_excite_gate", shape, vectors=2 * channels, weights=macs, taps=macs)


def pointwise(name: str, inputs: int, outputs: int, size: Size, activation: bool, gated: bool, residual: bool) -> Launch:
    """A 1x1 convolution with its epilogue and, with ``gated``, a gate multiplied into what it reads."""
    read, made = inputs * size.pixels, outputs * size.pixels
    return Launch(
        name,
        "pointwise_conv_bn_act",
        _shape(c=inputs, k=outputs, h=size.height, w=size.width, act=activation, gate=gated, residual=residual),
        elements=read + made * (1 + residual),
        vectors=inputs * gated,
        weights=inputs * outputs,
        dense=read * outputs,
        lanes=made * (1 + ACTIVATION_LANES * activation) + 2 * read * gated,
        activated=made * activation,
    )


def launches(config: NetConfig, level: str = "L2", machine: Machine = H200, dtype: str = "bf16") -> tuple[Launch, ...]:
    """Every launch of ``config`` at its own resolution, in order. ``machine`` and ``dtype`` matter to L3's tiles alone.

    Raises ValueError for a level that is not one of LEVELS, and for a net that is no EfficientNet.
    """
    if level not in LEVELS:
        raise ValueError(f"launches: level is {level!r}; one of {', '.join(LEVELS)} would do")
    if config.family != "efficientnet" or not config.head_channels:
        raise ValueError(f"launches: config is {config.name}'s; an EfficientNet's would do")
    active = config.activation != "identity"
    size = Size(config.resolution, config.resolution)
    rows = _unfused(conv("stem", config.in_channels, config.stem_channels, size, 3, 2, active, False), level)
    size = size.strided(2)
    for block in config.blocks():
        rows += _block(block, size, active, level, machine, dtype)
        size = size.strided(block.stride)
    head, features = _head(config, size, active), config.head_channels
    if level in ("LI", "L1"):
        rows += _unfused(head, level)
        rows.append(Launch("pool", elements=features * size.pixels, lanes=features * size.pixels))
    else:  # the pool's sums come out of the same pass and the features are never written
        rows.append(replace(head, op="", shape=(), elements=head.elements - features * size.pixels))
    if config.num_classes:
        rows.append(Launch("classifier", weights=features * config.num_classes, dense=features * config.num_classes))
    return tuple(rows)


def op_launches(config: NetConfig) -> tuple[Launch, ...]:
    """The launches of ``config`` that are ops of effnet_fast, in order, with the shapes that the model calls them with."""
    rows = [launch for launch in launches(config) if launch.op]
    size = Size(config.resolution, config.resolution).strided(2)
    for block in config.blocks():
        size = size.strided(block.stride)
    return (*rows, _head(config, size, config.activation != "identity"))


def expand_depthwise_launches(config: NetConfig) -> tuple[Launch, ...]:
    """Likewise those of the op that makes an expansion and a depthwise convolution at once, on CUDA."""
    return tuple(launch for launch in launches(config, "L3") if launch.op == EXPAND_DEPTHWISE)


def bound(rows: tuple[Launch, ...], machine: Machine, dtype: str, batch: int, special: float = 1.0) -> float:
    """Seconds that no implementation with these launches, and taps by lanes, beats, for ``batch`` images."""
    return sum(row.bound(machine, dtype, batch, special, vectors=False).seconds for row in rows)


def _shape(**numbers: int) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(number)) for name, number in numbers.items())


def _head(config: NetConfig, size: Size, active: bool) -> Launch:
    channels = config.stages[-1].out_channels if config.stages else config.stem_channels
    return pointwise("head", channels, config.head_channels, size, active, False, False)


def _unfused(launch: Launch, level: str) -> list[Launch]:
    """A dense convolution with its norm and activation, as one kernel but for LI."""
    if level != "LI":
        return [launch]
    made = round(launch.lanes) // (1 + ACTIVATION_LANES) if launch.activated else round(launch.lanes)
    norm = Launch(f"{launch.name}.norm", elements=2 * made, lanes=made * (ACTIVATION_LANES + 2), activated=launch.activated)
    return [replace(launch, op="", shape=(), lanes=0, activated=0), norm]


def _block(block: BlockConfig, size: Size, active: bool, level: str, machine: Machine, dtype: str) -> list[Launch]:
    name, kernel, stride = f"blocks.{block.stage}.{block.layer}", block.kernel_size, block.stride
    expanded, outputs, reduced = block.expanded_channels, block.out_channels, block.se_channels
    after = size.strided(stride)
    residual = block.residual and level != "L1"
    made = outputs * after.pixels
    add = [Launch(f"{name}.add", elements=3 * made, lanes=made)] if block.residual and level == "L1" else []
    if block.operator == "fused_mbconv" and not block.expands:
        one = conv(f"{name}.conv", block.in_channels, outputs, size, kernel, stride, active, residual)
        return [*_unfused(one, level), *add]
    rows: list[Launch] = []
    if block.operator == "fused_mbconv":
        rows += _unfused(conv(f"{name}.expand", block.in_channels, expanded, size, kernel, stride, active, False), level)
    else:
        expand = pointwise(f"{name}.expand", block.in_channels, expanded, size, active, False, False) if block.expands else None
        middle = depthwise(f"{name}.depthwise", expanded, size, kernel, stride, active, bool(reduced))
        if expand is not None and level == "L3":
            rows.append(_expand_depthwise(expand, middle, block, size, machine, dtype))
        else:
            rows += _unfused(expand, level) if expand is not None else []
            rows += _unfused_depthwise(middle, expanded * after.pixels, bool(reduced)) if level == "LI" else [middle]
    scaled = expanded * after.pixels  # the elements that the gate multiplies
    if reduced:
        one_gate = gate(f"{name}.gate", expanded, reduced, after)
        if level == "L1":
            rows.append(Launch(f"{name}.pool", elements=scaled, lanes=scaled))
        apart = {"LI": 3, "L1": 2}.get(level)
        rows.append(replace(one_gate, op="", shape=(), vectors=0, kernels=apart) if apart else one_gate)
        if level == "LI":
            lanes = scaled * (ACTIVATION_LANES + 3)
            rows.append(Launch(f"{name}.scale", elements=2 * scaled, lanes=lanes, activated=scaled * active))
        if level == "L1":
            rows.append(Launch(f"{name}.scale", elements=2 * scaled, lanes=scaled))
    gated = bool(reduced) and level in ("L2", "L3")
    project = pointwise(f"{name}.project", expanded, outputs, after, False, gated, residual)
    if level != "LI":
        return [*rows, project, *add]
    alone = replace(project, op="", shape=(), elements=scaled + made, lanes=0)
    return [*rows, alone, Launch(f"{name}.norm", elements=made * (2 + residual), lanes=3 * made)]


def _unfused_depthwise(launch: Launch, made: int, squeeze: bool) -> list[Launch]:
    """At LI: the convolution, then norm and activation, which with ``squeeze`` make the pool and are made again by the scaling."""
    alone = replace(launch, op="", shape=(), vectors=0, lanes=launch.taps + 3 * made, activated=0)
    elements = made * (1 if squeeze else 2)
    norm = Launch(f"{launch.name}.norm", elements=elements, lanes=made * (ACTIVATION_LANES + 2), activated=launch.activated)
    return [alone, norm]


def _expand_depthwise(expand: Launch, middle: Launch, block: BlockConfig, size: Size, machine: Machine, dtype: str) -> Launch:
    """Both as one kernel whose tiles compute the expanded halo again."""
    again = _halo(block, size, machine.shared, ITEM_BYTES[dtype])
    after = size.strided(block.stride).pixels
    shape = _shape(c=block.in_channels, k=block.expanded_channels) + middle.shape[1:]
    return Launch(
        f"{expand.name}_depthwise",
        EXPAND_DEPTHWISE,
        shape,
        elements=block.in_channels * size.pixels + block.expanded_channels * after,
        vectors=middle.vectors,
        weights=expand.weights + middle.weights,
        dense=expand.dense * again,
        taps=middle.taps,
        lanes=middle.lanes + expand.lanes * again,
        activated=middle.activated + expand.activated * again,
    )


def _halo(block: BlockConfig, size: Size, shared: int, item: int, chunk: int = 32) -> float:
    """How often the expanded tensor is computed when a block of threads holds a square output tile: the input tile, two buffers of
    weights, and ``chunk`` channels of the expanded and of the depthwise tile must fit ``shared`` bytes. The best tile's factor."""
    kernel, stride, inputs = block.kernel_size, block.stride, block.in_channels
    after = size.strided(stride)
    best = math.inf
    for tile in range(4, max(after) + 1):
        side = min(max(size), tile * stride + kernel - stride)
        pixels = side * side
        held = pixels * (inputs + chunk) * item + 2 * (inputs * chunk * item + kernel**2 * chunk * 4) + tile**2 * chunk * item
        if held > shared:
            break
        best = min(best, math.prod(_covered(before, out, tile, block) for before, out in zip(size, after, strict=True)))
    return best if best < math.inf else ((4 * stride + kernel - stride) / (4 * stride)) ** 2


def _covered(before: int, after: int, tile: int, block: BlockConfig) -> float:
    """Input pixels that the tiles along one side read, over those there are."""
    kernel, stride = block.kernel_size, block.stride
    first = range(0, after, tile)
    ends = [min(before, (min(after, start + tile) - 1) * stride + kernel // 2 + 1) for start in first]
    return sum(end - max(0, start * stride - kernel // 2) for start, end in zip(first, ends, strict=True)) / before
