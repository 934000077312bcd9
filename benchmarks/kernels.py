"""The kernel suite's entrants: every op by ours and by plain PyTorch, on the same random inputs, checked before it is timed.

Eager is what a user writes: separate calls, the squeeze as a mean, the gate as a product. Every image of a batch up to 16, and 16
of a larger one, are held to float64. Our gate takes as many partial sums as the depthwise kernel of its backend hands over; eager's
takes a mean.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast import ops
from effnet_fast.benchmark.case import DTYPES, PEER_FACTOR, Case
from effnet_fast.benchmark.machine import last_level_cache
from effnet_fast.benchmark.roofline import EXPAND_DEPTHWISE
from effnet_fast.benchmark.timing import GraphTimer, HostTimer, Refused, Skipped, Timer, copies
from effnet_fast.benchmark.tolerance import why_wrong
from effnet_fast.ops import backends, native
from effnet_fast.ops.expand_depthwise.launch import why_too_large

NUMBERS = 4096  # that a check wants: the largest error of a few is luck
_BACKEND = contextlib.ExitStack()  # what this process has asked for
_IMAGES = ("x", "partial", "gate", "residual")
Arguments = dict[str, Any]


def ours(case: Case, backend: str) -> Timer:
    """The op on one of its backends."""
    kernel = next((kernel for kernel in backends.kernels(case.group) if kernel.backend == backend), None)
    pieces = pieces_of(case, backend)
    arguments = make(case, pieces=pieces)
    reason = "no kernel of this op" if kernel is None else kernel.can_run(arguments.get("x", arguments.get("partial")))
    if reason is None and case.group == EXPAND_DEPTHWISE:
        d = case.shape
        reason = why_too_large(arguments["x"], d["c"], d["kernel"], d["stride"], -(-d["w"] // d["stride"]))
    if reason is not None:
        raise Skipped(reason)
    _BACKEND.close()
    _BACKEND.enter_context(ops.backend(backend, strict=True))
    op = getattr(ops, case.group)
    timer = checked(case, lambda arguments: op(**arguments), arguments, 2.0, pieces=pieces)
    if pieces:
        timer.facts["pieces"] = pieces
    return timer


def ours_in_two(case: Case) -> Timer:
    """One op after the other in place of the one that makes both, on whatever backends they choose."""
    reason = native.REASON or native.why_no_cuda(torch.device(case.device))
    if reason is not None:
        raise Skipped(reason)
    _BACKEND.close()

    def call(a: Arguments) -> tuple[Tensor, Tensor]:
        h = ops.pointwise_conv_bn_act(a["x"], a["expand_weight"], a["expand_norm"], activation=a["activation"])
        rest = {name: a[name] for name in ("stride", "padding", "activation", "squeeze")}
        return ops.depthwise_conv_bn_act(h, a["weight"], a["norm"], **rest)

    return checked(case, call, make(case))


def pieces_of(case: Case, backend: str) -> int:
    """Partial sums of an image that the depthwise kernel of ``backend`` makes, or hands to the gate; 0 where there are none."""
    if case.group == EXPAND_DEPTHWISE:  # it says itself how many
        return 0
    d, kernel = case.shape, next((k for k in backends.kernels("depthwise_conv_bn_act") if k.backend == backend), None)
    if kernel is None or kernel.pieces is None or not (case.group == "squeeze_excite_gate" or d.get("squeeze")):
        return 0
    x = torch.empty((), dtype=DTYPES[case.dtype], device=case.device).expand(case.batch, d["c"], d["h"], d["w"])
    return kernel.pieces(x, *(-(-side // d.get("stride", 1)) for side in (d["h"], d["w"])))


def eager(case: Case, layout: str) -> Timer:
    return checked(case, _EAGER[case.group], make(case, layout), PEER_FACTOR, plain_arguments)


def compiled(case: Case, options: dict[str, Any]) -> Timer:
    """What eager runs, by torch.compile, channels_last."""
    call = torch.compile(_EAGER[case.group], dynamic=False, fullgraph=True, **options)
    return checked(case, call, make(case), PEER_FACTOR, plain_arguments)


def checked(
    case: Case,
    call: Callable[[Arguments], Any],
    arguments: Arguments,
    factor: float = 2.0,
    convert: Callable[[Arguments], Arguments] = lambda arguments: arguments,
    pieces: int = 0,
) -> Timer:
    """A timer for ``call(convert(arguments))`` that goes round copies of them. ``pieces``: partial sums of an image, if there are.

    Raises Refused where a result is further from float64 than ``factor`` times eager's own distance allows.
    """
    assert case.launch is not None
    torch.backends.cudnn.benchmark = True
    made = case.batch * case.shape["c"] * (1 if "partial" in arguments else case.shape["h"] * case.shape["w"])
    outs, plains, exacts = [], [], []
    for seed in range(min(32, math.ceil(NUMBERS / made))):
        draw = redrawn(arguments, seed) if seed else arguments
        few = {name: value[case.checked] if name in _IMAGES else value for name, value in draw.items()}
        wide = {name: _wide(value) for name, value in few.items()}
        outs.append([result[case.checked] for result in _results(call(convert(draw)))])
        plains.append(_results(_EAGER[case.group](plain_arguments(few))))
        exacts.append(_results(_EAGER[case.group](plain_arguments(wide))))
    for result in zip(*map(_joined, (outs, plains, exacts)), strict=True):
        wrong = why_wrong(*result, factor)
        if wrong is not None:
            raise Refused(wrong)
    del outs, plains, exacts, draw, few, wide
    arguments = convert(arguments)
    moved = case.launch.bytes(case.dtype, case.batch) + 4 * case.batch * case.shape["c"] * max(0, pieces - 1)
    held = _bytes(arguments)
    count = copies(held, last_level_cache(case.device))
    sets = [arguments, *({name: _clone(value) for name, value in arguments.items()} for _ in range(count - 1))]
    kind: type = GraphTimer if case.device == "cuda" else HostTimer
    timer: Timer = kind(lambda i: call(sets[i]), count)
    timer.facts |= {"bytes": moved, "set_bytes": held}
    return timer


def make(case: Case, layout: str = "channels_last", pieces: int = 1) -> Arguments:
    """Random arguments of the op, as keywords: the same for our op and for eager, but for the gate's ``pieces``."""
    d, dtype = case.shape, DTYPES[case.dtype]
    generator = torch.Generator(case.device).manual_seed(0)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, generator=generator, device=case.device).to(dtype)
        return x.contiguous(memory_format=form) if len(shape) == 4 else x

    channels = d["c"]
    if case.group == "squeeze_excite_gate":
        reduced, count = d["reduced"], d["h"] * d["w"]
        pieces = max(1, pieces)
        return {
            "partial": draw(case.batch, pieces, channels, dtype=torch.float32) * (count / pieces**0.5),
            "count": count,
            "reduce_weight": draw(reduced, channels, 1, 1) / channels**0.5,
            "reduce_bias": draw(reduced),
            "expand_weight": draw(channels, reduced, 1, 1) / reduced**0.5,
            "expand_bias": draw(channels),
            "activation": "silu",
        }
    depthwise = case.group in ("depthwise_conv_bn_act", EXPAND_DEPTHWISE)
    outputs, kernel = d.get("k", channels), d.get("kernel", 1)
    inputs = 1 if depthwise else channels

    def norm() -> ops.Norm:
        vectors = [draw(outputs, dtype=torch.float32) for _ in range(4)]
        return ops.Norm(1 + 0.2 * vectors[0], 0.5 * vectors[1], 0.1 * vectors[2], 0.5 + vectors[3].abs(), 1e-5)

    arguments: Arguments = {
        "x": draw(case.batch, channels, d["h"], d["w"]),
        "weight": draw(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5,
        "norm": norm(),
        "activation": "silu" if d["act"] else "identity",
    }
    if case.group == EXPAND_DEPTHWISE:
        arguments |= {"expand_weight": draw(outputs, channels, 1, 1) / channels**0.5, "expand_norm": norm()}
    if kernel > 1:
        arguments["stride"], arguments["padding"] = d["stride"], (kernel // 2,) * 4
    if depthwise:
        arguments["squeeze"] = bool(d["squeeze"])
        return arguments
    size = [-(-side // d.get("stride", 1)) for side in (d["h"], d["w"])]
    if d.get("gate"):
        arguments["gate"] = draw(case.batch, channels, dtype=torch.float32).sigmoid()
    if d["residual"]:
        arguments["residual"] = draw(case.batch, outputs, *size)
    return arguments


def redrawn(arguments: Arguments, seed: int) -> Arguments:
    """The same weights, other images."""
    name = "partial" if "partial" in arguments else "x"
    generator = torch.Generator(arguments[name].device).manual_seed(seed)
    images = torch.empty_like(arguments[name]).normal_(generator=generator)
    return {**arguments, name: images * (arguments["count"] / images.shape[1] ** 0.5) if name == "partial" else images}


def plain_arguments(arguments: Arguments) -> Arguments:
    """What plain PyTorch has in their place: the mean, and a gate in the images' dtype."""
    arguments = dict(arguments)
    if "partial" in arguments:
        mean = arguments.pop("partial").sum(1) / arguments.pop("count")
        arguments["mean"] = mean.to(arguments["reduce_weight"].dtype)[:, :, None, None]
    if "gate" in arguments:
        arguments["gate"] = arguments["gate"].to(arguments["x"].dtype)[:, :, None, None]
    return arguments


def _eager_expand_depthwise(a: Arguments) -> tuple[Tensor, Tensor]:
    expand = {"x": a["x"], "weight": a["expand_weight"], "norm": a["expand_norm"], "activation": a["activation"]}
    return _eager_depthwise({**a, "x": _eager_conv(expand)})


def _eager_conv(a: Arguments) -> Tensor:
    groups = a["x"].shape[1] // a["weight"].shape[1]
    x = a["x"] * a["gate"] if "gate" in a else a["x"]
    padding, norm = a.get("padding", (0,))[0], a["norm"]
    y = F.conv2d(x, a["weight"], stride=a.get("stride", 1), padding=padding, groups=groups)
    y = F.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps)
    if a["activation"] == "silu":
        y = F.silu(y, inplace=True)
    return y + a["residual"] if "residual" in a else y


def _eager_depthwise(a: Arguments) -> tuple[Tensor, Tensor]:
    y = _eager_conv(a)
    return y, y.mean((2, 3))


def _eager_gate(a: Arguments) -> Tensor:
    hidden = F.silu(F.conv2d(a["mean"], a["reduce_weight"], a["reduce_bias"]), inplace=True)
    return F.conv2d(hidden, a["expand_weight"], a["expand_bias"]).sigmoid().flatten(1)


_EAGER: dict[str, Callable[[Arguments], Any]] = {
    "conv_bn_act": _eager_conv,
    "depthwise_conv_bn_act": _eager_depthwise,
    EXPAND_DEPTHWISE: _eager_expand_depthwise,
    "squeeze_excite_gate": _eager_gate,
    "pointwise_conv_bn_act": _eager_conv,
}


def _results(made: Any) -> list[Tensor]:
    """The tensors to compare; partial sums as the mean that they stand for."""
    if isinstance(made, Tensor):
        return [made]
    y, squeezed = made
    return [y, squeezed.sum(1) / (y.shape[2] * y.shape[3]) if squeezed.dim() == 3 else squeezed]


def _joined(draws: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(same) for same in zip(*draws, strict=True)]


def _bytes(value: Any) -> int:
    """Of the tensors among inputs and weights."""
    if isinstance(value, Tensor):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return sum(map(_bytes, inner))


def _wide(value: Any) -> Any:
    if isinstance(value, ops.Norm):
        return ops.Norm(*map(_wide, value))
    return value.double() if isinstance(value, Tensor) else value


def _clone(value: Any) -> Any:
    if isinstance(value, ops.Norm):
        return ops.Norm(*map(_clone, value))
    return value.clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value
