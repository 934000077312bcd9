"""What the ops share: the norm that travels with a convolution, the activations, and the checks made before any kernel starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

ACTIVATIONS = ("silu", "relu", "relu6", "identity")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (int, torch.SymInt)
_NORM = ("norm.weight", "norm.bias", "norm.mean", "norm.var")
NORM_SCHEMA = "Tensor? norm_weight, Tensor? norm_bias, Tensor norm_mean, Tensor norm_var, float norm_eps"


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def constant(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """What torch.compiler.assume_constant_result does, which would import the compiler, and triton with it, at import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Norm(NamedTuple):
    """A frozen batch norm over C channels: ``(y - mean) / sqrt(var + eps) * weight + bias``, each [C]; folded inside the kernel."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums, statistics and gates are fp32 (fp64 for fp64 storage)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_size(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Pixels that a convolution gives along one side."""
    return (size + before + after - kernel) // stride + 1


def activate_(y: Tensor, activation: str) -> Tensor:
    """The activation, in place: for reference kernels, on a tensor they own."""
    if activation == "silu":
        return F.silu(y, inplace=True)
    if activation == "relu":
        return F.relu(y, inplace=True)
    return F.relu6(y, inplace=True) if activation == "relu6" else y


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    stride: int,
    padding: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """The reference of every convolution op: what PyTorch's own modules compute, channels_last out."""
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    y = F.conv2d(x, weight.to(x.dtype), stride=stride, padding=(top, left), groups=groups)
    if norm.mean.dtype not in (x.dtype, accumulator(x.dtype)):  # PyTorch's batch norm takes no other
        norm = Norm(*(None if t is None else t.to(accumulator(x.dtype)) for t in norm[:4]), norm.eps)  # type: ignore[arg-type, call-arg]
    y = activate_(F.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps), activation)
    if residual is not None:
        y += residual
    return y.contiguous(memory_format=torch.channels_last)


def empty_output(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The fake of every convolution op's y: [N, K, H', W'], channels_last."""
    top, bottom, left, right = padding
    height = output_size(x.shape[2], weight.shape[2], stride, top, bottom)
    width = output_size(x.shape[3], weight.shape[3], stride, left, right)
    return torch.empty(
        (x.shape[0], weight.shape[0], height, width), dtype=dtype, device=x.device, memory_format=torch.channels_last
    )


def conv_flops(x_shape: Sequence[int], weight_shape: Sequence[int], y_shape: Sequence[int]) -> int:
    """2 * N * H' * W' * (elements of the weight): padding taps count, as in PyTorch's own FLOP counter."""
    images, _, height, width = y_shape
    elements = 1
    for size in weight_shape:
        elements *= size
    return 2 * images * height * width * elements


@functools.cache
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


@constant  # torch 2.11's compiler does not trace it
def has_autocast(device: str) -> bool:
    """Whether there is autocast for a type of device."""
    return _has_autocast(device)


def autocasts(device: str) -> bool:
    """Whether autocast is enabled for a type of device."""
    return has_autocast(device) and torch.is_autocast_enabled(device)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The dtypes of what a function of a tensor and more gives follow from these: autocast has had its say in the module before."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        device = first.device.type
        if autocasts(device):
            with torch.autocast(device, enabled=False):
                return function(first, *args)
        return function(first, *args)

    return run


def differentiates() -> bool:
    """Whether a gradient may be asked for: backward, or forward (which torch.no_grad does not end)."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def check_no_gradient(op: str, *tensors: Tensor | None) -> None:
    """Where :func:`differentiates`, refuse silently losing a derivative: the inference ops have none."""
    for tensor in tensors:
        if tensor is None:
            continue
        forward = forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
        if forward or (tensor.requires_grad and torch.is_grad_enabled()):
            raise RuntimeError(f"{op}: it has no gradient; torch.no_grad() or the modules of effnet_fast.nn, which train, would do")


def either(dtypes: tuple[torch.dtype, ...]) -> str:
    """Their names, for a sentence that says what would do."""
    *others, last = map(str, dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def check_strided(op: str, name: str, tensor: Tensor) -> None:
    """Refuse what is no tensor, and one without strides (sparse)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}; a torch.Tensor would do")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} is {tensor.layout}; torch.strided would do")


def check_tensor(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Refuse a tensor of another shape, dtype, layout or device, and what is no tensor."""
    fits = isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dtype in dtypes
    if fits and tensor.device == device and tensor.layout is torch.strided:
        return
    check_strided(op, name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}; {shape} would do")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; {either(dtypes)} would do")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; {device}, where the first argument is, would do")


def check_integer(op: str, name: str, value: int, least: int) -> None:
    """Refuse what is no integer, perhaps a symbolic one, of ``least`` or more."""
    if not isinstance(value, INTEGERS) or value < least:
        raise ValueError(f"{op}: {name} is {value!r}; an integer >= {least} would do")


def check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; one of {', '.join(ACTIVATIONS)} would do")


def check_conv(
    op: str,
    kind: Literal["dense", "depthwise", "pointwise"],
    x: Tensor,
    weight: Tensor,
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor, float],
    activation: str,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    pixels: Tensor | None = None,
    channels: int | None = None,
    prefix: str = "",
) -> tuple[int, int]:
    """Refuse, by name, what a convolution op does not take, whatever the backend; return (H', W').

    x         [N, C, H, W] of one of ``DTYPES``, beside pixels uint8
    weight    [K, C, k, k], depthwise [C, 1, k, k], pointwise [K, C, 1, 1]: of any of them, whatever x's
    norm      weight, bias, mean and var, each [K]: of any of them, all of the same one
    gate      [N, C] fp32, or fp64 beside fp64 x
    residual  [N, K, H', W'] of x's dtype, beside pixels of weight's
    pixels    [2, C] fp32, or fp64 beside fp64 weight
    channels  of what is convolved, where it is not x but is made of x's pixels
    prefix    of the weight's and the norm's names

    It comes before every kernel, and small kernels take 10 us: an attribute of a tensor costs 50 to 100 ns, and so does a call.
    """
    mean, var = norm[2], norm[3]
    tensors = isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(mean, Tensor) and isinstance(var, Tensor)
    optional = (norm[0] is None or isinstance(norm[0], Tensor)) and (norm[1] is None or isinstance(norm[1], Tensor))
    if not (tensors and optional) or x.layout != torch.strided:
        for name, tensor in zip(("x", "weight", *_NORM), (x, weight, *norm), strict=False):
            if tensor is not None or name not in _NORM[:2]:
                check_strided(op, name if name == "x" else prefix + name, tensor)  # type: ignore[arg-type]
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) != 4:
        raise ValueError(f"{op}: x has {len(shape)} dimensions; an image batch [N, C, H, W] would do")
    images, inputs, height, width = shape
    if inputs < 1 or height < 1 or width < 1:
        raise ValueError(f"{op}: x is {tuple(shape)}; [N, C, H, W] with C, H and W >= 1 would do")
    if dtype not in (DTYPES if pixels is None else (torch.uint8,)):
        would_do = either(DTYPES) if pixels is None else "torch.uint8, beside pixels,"
        raise TypeError(f"{op}: x is {dtype}; {would_do} would do")

    shape = weight.shape
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{op}: {prefix}weight is {tuple(shape)}; [K, C/groups, k, k] with no size of 0 would do")
    outputs, _, rows, columns = shape
    channels = inputs if channels is None else channels
    if kind == "depthwise":
        outputs, inputs = channels, 1
    elif kind == "pointwise":
        inputs, rows, columns = channels, 1, 1
    else:
        inputs = channels
    check_tensor(op, prefix + "weight", weight, (outputs, inputs, rows, columns), DTYPES, device)

    vector, dtypes = (outputs,), (mean.dtype,) if mean.dtype in DTYPES else DTYPES
    for i, given in enumerate(norm[:4]):
        if given is not None and (given.shape != vector or given.dtype not in dtypes or given.device != device):
            check_tensor(op, prefix + _NORM[i], given, vector, dtypes, device)

    if not isinstance(norm[4], (int, float)):
        raise TypeError(f"{op}: {prefix}norm.eps is {norm[4]!r}; a number would do")
    check_activation(op, activation)
    if kind != "pointwise":
        check_integer(op, "stride", stride, 1)
        fits = isinstance(padding, (tuple, list)) and len(padding) == 4
        for side in padding if fits else ():
            fits = fits and isinstance(side, INTEGERS) and side >= 0
        if not fits:
            raise ValueError(f"{op}: padding is {padding!r}; four integers >= 0 (top, bottom, left, right) would do")
        top, bottom, left, right = padding
        below, beside = height + top + bottom - rows, width + left + right - columns
        if below < 0 or beside < 0:
            raise ValueError(f"{op}: kernel {rows}x{columns} is larger than the padded x, {height}x{width} and {tuple(padding)}")
        height, width = below // stride + 1, beside // stride + 1
    if pixels is not None:
        dtype = weight.dtype
        check_tensor(op, "pixels", pixels, (2, channels), (accumulator(dtype),), device)
    if gate is not None:
        check_tensor(op, "gate", gate, (images, channels), (accumulator(dtype),), device)
    if residual is not None:
        check_tensor(op, "residual", residual, (images, outputs, height, width), (dtype,), device)
    return height, width
