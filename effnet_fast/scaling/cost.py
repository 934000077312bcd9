"""What a network costs, counted from its ``NetConfig`` alone: no tensor, no device.

:func:`layers` walks the net as plain PyTorch runs it and returns one row per operation; :class:`Cost` sums rows over a layer, a
block, a stage or the net.

* **MACs**: multiply-adds of convolutions and the classifier, taps on the padding included. FLOPs are two per multiply-add; what
  the EfficientNet papers and most slides call "FLOPS" is this count of multiply-adds, per image.
* **Activations**: elements that convolutions write, squeeze-excite's included (arXiv 2003.13678, section 3).
* **Inference memory**: weights and buffers, and the peak of live activations: at each operation its inputs, its output and whatever
  a later operation still needs. A tensor dies with its last use, nothing is written in place, the caller keeps the image.
* **Training memory**: weights, gradients, optimizer state, and what autograd keeps for backward when every operation is a module
  of plain PyTorch (convolution and normalisation keep their input, SiLU too, the gate's product both factors). Temporaries of the
  backward pass and convolution workspaces come on top.
* **Bytes moved**: ``eager``, every operation reads its inputs and weights and writes its output; ``fused``, a block is at most four
  launches, expand | depthwise + squeeze | gate | project (of a ResNet one for each convolution, as if they were fused), and only
  what crosses between launches moves.

A strided layer makes ``ceil(size / stride)`` pixels under either padding. With "same" padding, training keeps a padded copy of the
input of each convolution larger than 1x1 in place of that input; the other figures take the zeros to be made inside the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from effnet_fast.scaling.config import BlockConfig, NetConfig, is_whole
from effnet_fast.scaling.names import Pair, block_names, names_of

Shape = tuple[int, ...]
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
IMAGE = -1


@dataclass(frozen=True)
class Layer:
    """One operation of plain PyTorch. Elements are per image; shapes are (C, H, W), or (features,) after the pool.

    kind            conv, norm, activation, squeeze (mean over H, W), sigmoid, scale (by the gate), add, max_pool, pool or linear
    stage, block    "stem", "head", or "blocks.S" and "blocks.S.B"; ``launch`` is the fused kernel that does this operation
    inputs          indices into :func:`layers` of the operations whose outputs it reads; ``IMAGE`` (-1) is the image
    weight          shape of its weight, () where it has none
    buffers         running mean and variance of a norm
    activations     output elements of a convolution, else 0
    live            elements that exist while it runs in inference
    saved           elements kept for backward: its output, its dropout mask, a padded copy; the image counts with the stem
    positions       of the maxima, kept for backward in 64 bits each
    statistics      batch mean and inverse deviation that a norm keeps for backward, fp32, once per batch
    eager, fused    elements read and written, weights apart
    """

    name: str
    kind: str
    stage: str
    block: str
    launch: str
    inputs: tuple[int, ...]
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    weight: Shape
    parameters: int
    buffers: int
    macs: int
    activations: int
    live: int
    saved: int
    positions: int
    statistics: int
    eager: int
    fused: int

    @property
    def elements(self) -> int:
        return math.prod(self.output_shape)


class InferenceMemory(NamedTuple):
    """Bytes. ``weights`` includes the norms' buffers; ``activations`` is the peak."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


class TrainingMemory(NamedTuple):
    """Bytes. ``weights`` includes the norms' buffers; ``activations`` is what is kept for backward."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class Cost:
    """Sums over ``layers``: those of a net, or of a part of it that :meth:`by` cut out."""

    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, config: NetConfig, resolution: int | Sequence[int] | None = None) -> Cost:
        """The cost of ``config`` at ``resolution``: pixels of a square side, (height, width), or None for the config's own."""
        return cls(layers(config, resolution))

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds per image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating-point operations per image: two per multiply-add."""
        return 2 * self.macs

    @property
    def activations(self) -> int:
        """Elements per image that convolutions write."""
        return sum(layer.activations for layer in self.layers)

    @property
    def launches(self) -> int:
        """Kernels of the fused form (the eager form has ``len(layers)``)."""
        return len({layer.launch for layer in self.layers})

    def by(self, key: str) -> dict[str, Cost]:
        """Split, in order, by "stage", "block", "launch" or "name"."""
        if key not in ("stage", "block", "launch", "name"):
            raise ValueError(f"Cost.by: key is {key!r}; stage, block, launch or name would do")
        groups: dict[str, list[Layer]] = {}
        for layer in self.layers:
            groups.setdefault(getattr(layer, key), []).append(layer)
        return {name: Cost(tuple(rows)) for name, rows in groups.items()}

    def saved_elements(self, batch: int = 1) -> int:
        """Elements kept for backward at ``batch`` images, parameters and buffers excluded."""
        _check_batch("saved_elements", batch)
        return sum(batch * (layer.saved + layer.positions) + layer.statistics for layer in self.layers)

    def weight_bytes(self, dtype: str = "fp32") -> int:
        """Bytes of parameters and buffers, all in ``dtype`` but the norms' 64-bit batch counters."""
        size = _item_bytes("weight_bytes", dtype)
        return sum((layer.parameters + layer.buffers) * size + (8 if layer.kind == "norm" else 0) for layer in self.layers)

    def inference_memory(self, dtype: str = "fp32", batch: int = 1) -> InferenceMemory:
        """Bytes to run ``batch`` images with everything in ``dtype`` ("fp32", "bf16" or "fp16")."""
        size = _item_bytes("inference_memory", dtype)
        _check_batch("inference_memory", batch)
        return InferenceMemory(self.weight_bytes(dtype), max((layer.live for layer in self.layers), default=0) * batch * size)

    def training_memory(self, dtype: str = "fp32", batch: int = 1, optimizer_tensors: int = 2) -> TrainingMemory:
        """Bytes to train on ``batch`` images with everything in ``dtype`` but the norms' batch statistics (fp32) and positions.

        ``optimizer_tensors`` are kept per parameter: 0 for SGD, 1 with momentum, 2 for Adam or RMSProp with momentum.
        """
        size = _item_bytes("training_memory", dtype)
        _check_batch("training_memory", batch)
        if not is_whole(optimizer_tensors, least=0):
            raise ValueError(f"training_memory: optimizer_tensors is {optimizer_tensors!r}; a whole number >= 0 would do")
        saved = sum(batch * (size * layer.saved + 8 * layer.positions) + 4 * layer.statistics for layer in self.layers)
        gradients = self.parameters * size
        return TrainingMemory(self.weight_bytes(dtype), gradients, gradients * optimizer_tensors, saved)

    def bytes_moved(self, dtype: str = "fp32", batch: int = 1, form: str = "eager") -> int:
        """Bytes read and written in one inference of ``batch`` images, weights read once; ``form`` is "eager" or "fused"."""
        size = _item_bytes("bytes_moved", dtype)
        _check_batch("bytes_moved", batch)
        if form not in ("eager", "fused"):
            raise ValueError(f"bytes_moved: form is {form!r}; eager or fused would do")
        return sum((batch * getattr(layer, form) + layer.parameters + layer.buffers) * size for layer in self.layers)


def layers(config: NetConfig, resolution: int | Sequence[int] | None = None) -> tuple[Layer, ...]:
    """Every operation of ``config`` in the order it runs, under its module's name (``blocks.1.0.conv_pw``).

    Functions without a module are named beside them: ``act1`` after ``bn1``, ``se.squeeze``, ``se.act1``, ``se.gate``,
    ``se.scale``, ``add``, ``max_pool``, ``global_pool``. Stochastic depth and dropout keep a mask and cost nothing else: they count
    with ``add`` and ``classifier``.
    """
    if not isinstance(config, NetConfig):
        raise ValueError(f"layers: config is {config!r}; a NetConfig, such as a model's .config, would do")
    height, width = _image_size(config.resolution if resolution is None else resolution)
    walk, names = _Walk((config.in_channels, height, width), config.activation, config.padding), names_of(config)
    walk.enter("stem", "stem", "")
    x = walk.conv_norm_act(names.stem, IMAGE, config.stem_channels, config.stem_kernel, config.stem_stride)
    x = walk.max_pool(x) if config.stem_pool else x
    for block in config.blocks():
        prefix, pairs = block_names(config, block)
        walk.enter(f"blocks.{block.stage}", f"blocks.{block.stage}.{block.layer}", prefix)
        x = walk.residual_block(x, block, pairs) if config.family == "resnet" else walk.block(x, block, pairs)
    walk.enter("head", "head", "")
    if config.head_channels:
        x = walk.conv_norm_act(names.head, x, config.head_channels)
    features, classes = config.features, config.num_classes
    x = walk.add("global_pool", "pool", (x,), (features,))
    if classes:
        walk.launch = "classifier"
        mask = features if config.dropout else 0
        walk.add(names.classifier, "linear", (x,), (classes,), (classes, features), bias=True, macs=features * classes, own=mask)
    return walk.finish()


class _Row(NamedTuple):
    """A layer before the whole walk is known. ``own``: elements it makes for backward alone, a mask or a padded copy."""

    name: str
    kind: str
    stage: str
    block: str
    launch: str
    inputs: tuple[int, ...]
    shape: Shape
    weight: Shape
    parameters: int
    buffers: int
    macs: int
    own: int


class _Walk:
    """Appends operations as the forward would run them; tensors are named by the index of the row that wrote them."""

    def __init__(self, image: Shape, activation: str, padding: str) -> None:
        self.image, self.activation, self.padding = image, activation, padding
        self.rows: list[_Row] = []
        self.stage = self.block_name = self.prefix = self.launch = ""

    def enter(self, stage: str, block: str, prefix: str) -> None:
        self.stage, self.block_name, self.prefix = stage, block, prefix
        self.launch = block

    def shape(self, tensor: int) -> Shape:
        return self.image if tensor == IMAGE else self.rows[tensor].shape

    def add(
        self,
        name: str,
        kind: str,
        inputs: tuple[int, ...],
        shape: Shape,
        weight: Shape = (),
        *,
        bias: bool = False,
        macs: int = 0,
        own: int = 0,
    ) -> int:
        parameters = math.prod(weight) + bias * weight[0] if weight else 0
        buffers = 2 * shape[0] if kind == "norm" else 0
        where = self.stage, self.block_name, self.launch
        self.rows.append(_Row(self.prefix + name, kind, *where, inputs, shape, weight, parameters, buffers, macs, own))
        return len(self.rows) - 1

    def conv(
        self, name: str, x: int, out: int, kernel: int = 1, stride: int = 1, depthwise: bool = False, bias: bool = False
    ) -> int:
        channels, *size = self.shape(x)
        height, width = (-(-side // stride) for side in size)
        weight = (out, 1 if depthwise else channels, kernel, kernel)
        padded = 0
        if self.padding == "same" and kernel > 1:
            padded = channels * math.prod((after - 1) * stride + kernel for after in (height, width))
        macs = math.prod(weight) * height * width
        return self.add(name, "conv", (x,), (out, height, width), weight, bias=bias, macs=macs, own=padded)

    def conv_norm(self, names: Pair, x: int, out: int, kernel: int = 1, stride: int = 1, depthwise: bool = False) -> int:
        y = self.conv(names[0], x, out, kernel, stride, depthwise)
        return self.add(names[1], "norm", (y,), self.shape(y), (out,), bias=True)

    def conv_norm_act(self, names: Pair, x: int, out: int, kernel: int = 1, stride: int = 1, depthwise: bool = False) -> int:
        return self.act(_after(names[1]), self.conv_norm(names, x, out, kernel, stride, depthwise))

    def act(self, name: str, x: int) -> int:
        return x if self.activation == "identity" else self.add(name, "activation", (x,), self.shape(x))

    def max_pool(self, x: int) -> int:
        channels, height, width = self.shape(x)
        return self.add("max_pool", "max_pool", (x,), (channels, -(-height // 2), -(-width // 2)))

    def block(self, x: int, config: BlockConfig, names: tuple[Pair, ...]) -> int:
        shortcut, block, expanded = x, self.block_name, config.expanded_channels
        kernel, stride, out = config.kernel_size, config.stride, config.out_channels
        first, last = names[0], names[-1]
        if config.operator == "fused_mbconv" and not config.expands:
            self.launch = f"{block}.conv"
            x = self.conv_norm_act(first, x, out, kernel, stride)
        else:
            if config.operator == "fused_mbconv":
                self.launch = f"{block}.expand"
                x = self.conv_norm_act(first, x, expanded, kernel, stride)
            else:
                if config.expands:
                    self.launch = f"{block}.expand"
                    x = self.conv_norm_act(first, x, expanded)
                self.launch = f"{block}.depthwise"
                x = self.conv_norm_act(names[-2], x, expanded, kernel, stride, depthwise=True)
            gate = self.gate(x, config.se_channels) if config.se_channels else None
            self.launch = f"{block}.project"
            if gate is not None:
                x = self.add("se.scale", "scale", (x, gate), self.shape(x))
            x = self.conv_norm(last, x, out)
            if config.operator == "separable":
                x = self.act(_after(last[1]), x)
        if config.residual:
            x = self.add("add", "add", (x, shortcut), self.shape(x), own=1 if config.drop_path else 0)
        return x

    def residual_block(self, x: int, config: BlockConfig, names: tuple[Pair, ...]) -> int:
        """A ResNet's: the last activation comes after the sum, and is in the launch of the last convolution."""
        block, shortcut, middle = self.block_name, x, config.expanded_channels
        kernel, stride = config.kernel_size, config.stride
        plan = [(middle, 1, 1), (middle, kernel, stride), (config.out_channels, 1, 1)]
        if config.operator == "basic":
            plan = [(middle, kernel, stride), (config.out_channels, kernel, 1)]
        own = list(zip(names, plan, strict=False))
        for number, (pair, (out, size, step)) in enumerate(own, start=1):
            self.launch = f"{block}.{pair[0]}"
            convolve = self.conv_norm if number == len(own) else self.conv_norm_act
            x = convolve(pair, x, out, size, step)
        last = self.launch
        if config.projects_shortcut:
            self.launch = f"{block}.downsample"
            shortcut = self.conv_norm(names[-1], shortcut, config.out_channels, 1, stride)
        self.launch = last
        x = self.add("add", "add", (x, shortcut), self.shape(x), own=1 if config.drop_path else 0)
        return self.act(_after(own[-1][0][1]), x)

    def gate(self, x: int, squeezed: int) -> int:
        channels = self.shape(x)[0]
        # The squeeze belongs to the launch that wrote x: its sums come out of the same pass.
        y = self.add("se.squeeze", "squeeze", (x,), (channels, 1, 1))
        self.launch = f"{self.block_name}.gate"
        y = self.act("se.act1", self.conv("se.conv_reduce", y, squeezed, bias=True))
        y = self.conv("se.conv_expand", y, channels, bias=True)
        return self.add("se.gate", "sigmoid", (y,), (channels, 1, 1))

    def finish(self) -> tuple[Layer, ...]:
        rows = self.rows
        end = len(rows)
        elements = {index: math.prod(row.shape) for index, row in enumerate(rows)}
        elements[IMAGE] = math.prod(self.image)
        readers: dict[int, list[int]] = {tensor: [] for tensor in elements}
        for index, row in enumerate(rows):
            for tensor in row.inputs:
                readers[tensor].append(index)
        # The caller holds the image and receives the last output.
        last = {tensor: uses[-1] if uses else end for tensor, uses in readers.items()} | {IMAGE: end}
        saved = self._saved()

        result: list[Layer] = []
        alive = elements[IMAGE]
        read_by_launch: set[tuple[str, int]] = set()
        for index, row in enumerate(rows):
            alive += elements[index]
            crossing = 0
            for tensor in row.inputs:
                outside = tensor == IMAGE or rows[tensor].launch != row.launch
                if outside and (row.launch, tensor) not in read_by_launch:
                    read_by_launch.add((row.launch, tensor))
                    crossing += elements[tensor]
            if index == end - 1 or any(rows[reader].launch != row.launch for reader in readers[index]):
                crossing += elements[index]
            kept = row.own + (elements[index] if index in saved else 0)
            if index == 0 and IMAGE in saved:
                kept += elements[IMAGE]
            result.append(
                Layer(
                    row.name,
                    row.kind,
                    row.stage,
                    row.block,
                    row.launch,
                    row.inputs,
                    tuple(self.shape(tensor) for tensor in row.inputs),
                    row.shape,
                    row.weight,
                    row.parameters,
                    row.buffers,
                    row.macs,
                    activations=elements[index] if row.kind == "conv" else 0,
                    live=alive,
                    saved=kept,
                    positions=elements[index] if row.kind == "max_pool" else 0,
                    statistics=row.buffers,
                    eager=sum(elements[tensor] for tensor in row.inputs) + elements[index],
                    fused=crossing,
                )
            )
            alive -= sum(elements[tensor] for tensor in set(row.inputs) if last[tensor] == index)
        return tuple(result)

    def _saved(self) -> set[int]:
        """Tensors that some operation keeps for backward, each once however many keep it (gate: its sigmoid and its product)."""
        saved: set[int] = set()
        for index, row in enumerate(self.rows):
            if row.kind == "activation" and self.activation == "relu":
                saved.add(index)  # the derivative is a function of the result
            elif row.kind in ("norm", "activation", "scale", "max_pool", "linear") or (row.kind == "conv" and not row.own):
                saved.update(row.inputs)
        return saved


def _after(norm: str) -> str:
    """The name of the activation after a norm: ``act1`` after ``bn1``, and in a sequence the next."""
    place, dot, name = norm.rpartition(".")
    return f"{place}{dot}{int(name) + 1 if name.isdigit() else name.replace('bn', 'act')}"


def _image_size(resolution: int | Sequence[int]) -> tuple[int, int]:
    size = (resolution, resolution) if not isinstance(resolution, (tuple, list)) else tuple(resolution)
    if len(size) != 2 or not all(map(is_whole, size)):
        raise ValueError(
            f"layers: resolution is {resolution!r}; a whole number of pixels >= 1, or a pair (height, width), would do"
        )
    return size


def _check_batch(function: str, batch: int) -> None:
    if not is_whole(batch, least=0):
        raise ValueError(f"{function}: batch is {batch!r}; a whole number of images >= 0 would do")


def _item_bytes(function: str, dtype: str) -> int:
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{function}: dtype is {dtype!r}; one of {', '.join(ITEM_BYTES)} would do")
    return ITEM_BYTES[dtype]
