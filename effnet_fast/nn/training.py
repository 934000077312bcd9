"""The fused forward and backward of a block in training: raw convolution results are kept, and nothing else of its size.

Eager PyTorch keeps the input of every operator: of an expanded tensor the convolution's result, the norm's and the activation's.
Here each is made again from the convolution's result by whoever reads it (:mod:`effnet_fast.ops.training`). Kept are the block's
input, one raw result for each convolution, and vectors. ``_Block`` is the one autograd function: it walks the block's convolutions
forward, then backward, and between them has what is of size C made: a batch norm's statistics become mean, scale and bias; the sums
over gradients become its gradients and the coefficients of the next convolution backward. That place is also where SyncBatchNorm
reduces over ranks, and where a norm in evaluation mode (a frozen one) differs: its statistics are constants.

A gradient that is to be differentiated again (``create_graph=True``), or is asked for in a batch, is plain PyTorch's: the backward
makes the block's result again from what was kept and the parameters, and differentiates that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from effnet_fast.nn.padding import sides
from effnet_fast.nn.parts import BlockParts, ConvNormAct, alike, tensor_of, uses_batch, weight_of
from effnet_fast.ops import backends, squeeze_excite_gate
from effnet_fast.ops import training as ops
from effnet_fast.ops.common import accumulator, output_size, without_autocast
from effnet_fast.ops.squeeze_excite import reference as squeeze_excite
from effnet_fast.ops.training import reference


class _Layer(NamedTuple):
    """What of a convolution, its norm and activation is no tensor."""

    stride: int
    padding: tuple[int, int, int, int]
    activation: str
    eps: float
    frozen: bool  # the norm has statistics of its own, and not the batch's
    group: Any  # that a SyncBatchNorm reduces over, or None


class _Plan(NamedTuple):
    layers: tuple[_Layer, ...]
    squeeze_activation: str | None  # of the squeeze-excite in front of the last convolution
    residual: bool
    keeps: bool  # what a backward pass would want


_PER_LAYER = 5  # tensors: weight, norm's weight and bias, and the statistics of a frozen norm
_SQUEEZED = 5  # tensors kept of the squeeze-excite: its mean and gate, and the weights that its backward reads


class _Kept(NamedTuple):
    """Of a layer, for its backward: weight, raw result, norm [3, K], 1 / sqrt(var + eps); values a channel of a SyncBatchNorm."""

    weight: Tensor
    y: Tensor
    norm: Tensor
    inverse: Tensor
    values: Tensor | None


def _over_ranks(mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of all ranks' batches from those of each, ``count`` values: two sums, and no difference of large ones."""
    first = _SumOverRanks.apply(torch.cat([mean * count, mean.new_full((1,), count)]), group)
    total = first[-1]
    mean_of_all = first[:-1] / total
    second = _SumOverRanks.apply((var + (mean - mean_of_all) ** 2) * count, group)
    return mean_of_all, second / total, total


class _SumOverRanks(torch.autograd.Function):
    """Each rank's result depends on every rank's tensor, so the gradient is the sum of all ranks'; and so on."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group, total = group, tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None


class _Block(torch.autograd.Function):
    """out = keep * norm(conv(... x)) + x, and the statistics of each layer, which have no gradient.

    x        [N, C, H, W]
    keep     [N, K], the factor of stochastic depth for each image, or None
    tensors  _PER_LAYER of each layer, then weight and bias of both convolutions of the squeeze-excite
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor | None, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        read: Tensor = x
        norm, activation, gate, kept = None, "identity", None, []
        statistics: list[Tensor] = []
        squeezed: list[Tensor | None] = []
        for number, layer in enumerate(plan.layers):
            weight, norm_weight, norm_bias, mean, var = tensors[number * _PER_LAYER : (number + 1) * _PER_LAYER]
            if plan.squeeze_activation is not None and number == len(plan.layers) - 1:
                pooled = ops.norm_act_mean(read, norm, activation)  # type: ignore[arg-type]
                of_gate = alike(tensors[-4:], pooled.dtype)
                gate = squeeze_excite_gate(pooled[:, None], 1, *of_gate, activation=plan.squeeze_activation)  # type: ignore[arg-type]
                if plan.keeps:
                    reduce, bias, expand, _ = tensors[-4:]  # a bias may change before the backward, as plain PyTorch lets it
                    squeezed = [pooled, gate, reduce, None if bias is None else bias.detach().clone(), expand]
            y, batch_mean, batch_var = ops.conv_stats(
                read,
                weight,  # type: ignore[arg-type]
                norm,
                activation=activation,
                gate=gate,
                stride=layer.stride,
                padding=layer.padding,
            )
            values = None
            if layer.group is not None:
                batch_mean, batch_var, values = _over_ranks(batch_mean, batch_var, _values(y), layer.group)
            if not layer.frozen:
                mean, var = batch_mean, batch_var
            mean, var = mean.to(batch_mean.dtype), var.to(batch_var.dtype)  # type: ignore[union-attr]
            norm, inverse = ops.norm_vectors(mean, var, norm_weight, norm_bias, layer.eps)
            activation, read = layer.activation, y
            statistics += [batch_mean, batch_var] if values is None else [batch_mean, batch_var, values]
            if plan.keeps:
                kept += [weight, y, norm, inverse, values]
        out = ops.norm_act(read, norm, activation, keep, x if plan.residual else None)  # type: ignore[arg-type]
        if plan.keeps:
            derived: list[Tensor | None] = []
            if not torch.compiler.is_compiling():  # AOTAutograd's graphs refuse a second derivative themselves
                # What somebody has made of parameters is autograd's to free, and for its hooks to see.
                ctx.leaves = [None if t is None or t.grad_fn is not None else t for t in tensors]
                ctx.versions = [_version(t) for t in ctx.leaves]
                derived = [t if leaf is None else None for t, leaf in zip(tensors, ctx.leaves, strict=True)]
            ctx.save_for_backward(x, keep, *kept, *squeezed, *derived)
        ctx.request = backends.requested()
        ctx.plan, ctx.like = plan, [None if t is None else (t.shape, t.dtype, t.stride()) for t in tensors]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)  # a launch for each of the statistics
        return out, *statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_statistics: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.compiler.is_compiling():  # in the forward's thread; and torch 2.11's compiler lets nothing be set here
            return _backward(grad.contiguous(memory_format=torch.channels_last), ctx)
        if torch.is_grad_enabled() or is_legacy_batchedtensor(grad) or is_functorch_wrapped_tensor(grad):
            return _plain_backward(grad, ctx)
        with backends.asking(*ctx.request):
            return _backward(grad.contiguous(memory_format=torch.channels_last), ctx)


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was changed in place; one of inference mode does not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


@without_autocast
def _plain_backward(grad: Tensor, ctx: Any) -> tuple[Tensor | None, ...]:
    """Gradients that have gradients of their own, and those that ``grad`` asks for in a batch (vmap)."""
    plan, (x, keep, *saved) = ctx.plan, ctx.saved_tensors
    biases = range(2, len(plan.layers) * _PER_LAYER, _PER_LAYER)  # of norms, which may change, as plain PyTorch lets them
    for number, (tensor, version) in enumerate(zip(ctx.leaves, ctx.versions, strict=True)):
        if _version(tensor) != version and number not in biases:
            raise RuntimeError(
                f"create_graph: a tensor {tuple(tensor.shape)} of a fused block was changed in place between its forward and"
                " a backward that is plain PyTorch's; changing it after that would do"
            )
    create_graph, needs = torch.is_grad_enabled(), ctx.needs_input_grad
    tensors = [t if leaf is None else leaf for t, leaf in zip(saved[-len(ctx.leaves) :], ctx.leaves, strict=True)]
    with torch.enable_grad():
        # Aliases, for x may have been made of a parameter, whose gradient on that way is not the block's.
        inputs = [t.view_as(t) if need else t for t, need in zip((x, keep, plan, *tensors), needs, strict=True)]
        read = inputs[3:]
        for layer, number in enumerate(biases):
            if (bias := read[number]) is not None:
                kept = _Kept(*saved[layer * len(_Kept._fields) :][: len(_Kept._fields)])
                read[number] = bias + (kept.norm[2].to(bias.dtype) - bias).detach()  # with the value of the forward
        out = _plain(*inputs[:3], *read)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    gradients = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=create_graph))
    return tuple(next(gradients) if need else None for need in needs)


def _plain(x: Tensor, keep: Tensor | None, plan: _Plan, *tensors: Any) -> Tensor:
    """The result of :class:`_Block` in plain PyTorch and x's accumulator."""
    read = x = x.to(accumulator(x.dtype))
    tensors = tuple(None if t is None else t.to(x.dtype) for t in tensors)
    for number, layer in enumerate(plan.layers):
        weight, norm_weight, norm_bias, mean, var = tensors[number * _PER_LAYER : (number + 1) * _PER_LAYER]
        last = number == len(plan.layers) - 1
        if last and plan.squeeze_activation is not None:
            pooled, weights = read.mean((2, 3))[:, None], list(tensors[-4:])
            gate = squeeze_excite.squeeze_excite_gate(pooled, 1, *weights, plan.squeeze_activation)  # type: ignore[call-arg]
            read = read * gate[:, :, None, None]
        top, bottom, left, right = layer.padding
        padded, groups = F.pad(read, (left, right, top, bottom)), read.shape[1] // weight.shape[1]
        y = F.conv2d(padded, weight, stride=layer.stride, groups=groups)
        if not layer.frozen:
            mean, var = reference.batch_stats(y)
            if layer.group is not None:
                mean, var, _ = _over_ranks(mean, var, _values(y), layer.group)
        norm, _ = reference.norm_vectors(mean, var, norm_weight, norm_bias, layer.eps)
        read = reference.norm_act(y, norm, layer.activation, keep if last else None, x if last and plan.residual else None)
    return read


@without_autocast
def _backward(grad: Tensor, ctx: Any) -> tuple[Tensor | None, ...]:
    plan: _Plan = ctx.plan
    layers, size = plan.layers, len(_Kept._fields)
    x, keep, *saved = ctx.saved_tensors
    kept = [_Kept(*saved[at : at + size]) for at in range(0, len(layers) * size, size)]
    wanted = ctx.needs_input_grad[3:]
    gradients: list[Tensor | None] = [None] * len(wanted)
    residual = grad if plan.residual else None
    activation, y_gate, y_pool = layers[-1].activation, keep, None
    sums = ops.norm_act_sums(grad, kept[-1].y, kept[-1].norm, activation, keep)
    for number in reversed(range(len(layers))):
        layer, at, (weight, y, norm, inverse, values) = layers[number], number * _PER_LAYER, kept[number]
        coefficients, of_norm_weight = _coefficients(layer, sums, norm, inverse, _values(y) if values is None else values)
        if wanted[at + 1]:
            gradients[at + 1] = of_norm_weight
        if wanted[at + 2]:
            gradients[at + 2] = sums[0]
        squeeze_activation = plan.squeeze_activation if number == len(layers) - 1 else None
        need_x = ctx.needs_input_grad[0] or any(wanted[:at]) or (squeeze_activation is not None and any(wanted[-4:]))
        if not need_x and not wanted[at]:
            break
        before = kept[number - 1] if number > 0 else None
        if squeeze_activation is not None:
            pooled, gate, *weights = saved[len(layers) * size :][:_SQUEEZED]
        grad, grad_weight, sums = ops.conv_backward(
            grad,
            y,
            norm,
            coefficients,
            x if before is None else before.y,
            weight,
            None if before is None else before.norm,
            activation="identity" if before is None else layers[number - 1].activation,
            gate=None if squeeze_activation is None else gate,
            y_activation=activation,
            y_gate=y_gate,
            y_pool=y_pool,
            residual=residual if before is None else None,
            stride=layer.stride,
            padding=layer.padding,
            need_x=need_x,
            need_weight=wanted[at],
        )
        if wanted[at]:
            gradients[at] = grad_weight
        if not need_x:
            break
        activation, y_gate, y_pool = "identity", None, None
        if squeeze_activation is not None and before is not None:
            pixels = before.y.shape[2] * before.y.shape[3]
            activation, y_gate = layers[number - 1].activation, gate
            y_pool, sums, *of_weights = ops.squeeze_excite_backward(
                sums, gate, pooled, *weights, activation=squeeze_activation, pixels=pixels
            )
            gradients[-4:] = [g if want else None for g, want in zip(of_weights, wanted[-4:], strict=True)]
    made = [None if g is None else _like(g, *like) for g, like in zip(gradients, ctx.like, strict=True)]
    return grad if ctx.needs_input_grad[0] else None, None, None, *made


def _values(y: Tensor) -> int:
    """A channel's, of [N, C, H, W]."""
    return y.numel() // y.shape[1]


def _coefficients(layer: _Layer, sums: Tensor, norm: Tensor, inverse: Tensor, values: Any) -> tuple[Tensor, Tensor]:
    """:func:`effnet_fast.ops.training.norm_coefficients`, of all ranks' sums; the gradient of the weight is this rank's alone."""
    if layer.group is None:
        return ops.norm_coefficients(sums, norm, inverse, None if layer.frozen else values)
    means = sums / values
    dist.all_reduce(means, group=layer.group)
    return ops.norm_coefficients(means, norm, inverse, 1)[0], sums[1] * inverse


def _like(gradient: Tensor, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int]) -> Tensor:
    """In a parameter's shape, dtype and strides: DistributedDataParallel copies what has others, and warns. Not in the strides of
    one whose elements share memory (a broadcast one), or leave some between them: as autograd does it."""
    gradient = gradient.view(shape)
    if (gradient.dtype == dtype and gradient.stride() == strides) or not _is_dense(shape, strides):
        return gradient.to(dtype)
    return gradient.new_empty_strided(shape, strides, dtype=dtype).copy_(gradient)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie side by side, each in memory of its own, in whatever order."""
    elements = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != elements:
            return False
        elements *= size
    return True


def _group(norm: nn.Module) -> Any:
    """What a SyncBatchNorm in training reduces over, or None."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _layer(part: ConvNormAct, shape: Sequence[int]) -> tuple[_Layer, list[int]]:
    """And the shape of what its convolution makes of an x of ``shape``."""
    conv, norm = part.conv, part.norm
    zeros = top, bottom, left, right = sides(conv, part.padding, shape) if isinstance(part.padding, str) else part.padding
    (rows, columns), stride = conv.kernel_size, conv.stride[0]
    height, width = output_size(shape[2], rows, stride, top, bottom), output_size(shape[3], columns, stride, left, right)
    layer = _Layer(stride, zeros, part.activation, norm.eps, not uses_batch(norm), _group(norm))
    return layer, [shape[0], conv.out_channels, height, width]


def _tensors(part: ConvNormAct) -> list[Tensor | None]:
    norm = part.norm
    affine = [tensor_of(norm, "weight"), tensor_of(norm, "bias")]
    frozen = [None, None] if uses_batch(norm) else [tensor_of(norm, "running_mean"), tensor_of(norm, "running_var")]
    return [weight_of(part.conv), *affine, *frozen]


def _track(told: Iterable[tuple[nn.BatchNorm2d, Tensor, Tensor, Tensor | int]]) -> None:
    """Bring norms' running statistics up to date, as their own forwards do, with few launches for all of them.

    told  norms, each with the mean and variance (not corrected) of its batch, and how many values a channel these are of
    """
    told = list(told)
    if len({norm for norm, *_ in told}) < len(told):  # a norm that stands twice: one launch would write its buffers twice at once
        for once in told:
            _track([once])
        return
    counters, alike = [], []
    for norm, mean, var, values in told:
        running_mean, running_var, batches = (
            tensor_of(norm, name) for name in ("running_mean", "running_var", "num_batches_tracked")
        )
        if not (uses_batch(norm) and norm.training and norm.track_running_stats) or running_mean is None or running_var is None:
            continue
        momentum: Any = 0.0 if norm.momentum is None else norm.momentum
        if batches is not None:
            counters.append(batches)
            if norm.momentum is None:
                momentum = 1 / (batches + 1).to(running_mean.dtype)
        factor = values / (values - 1)
        if isinstance(momentum, Tensor) or isinstance(factor, Tensor):
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * factor).to(running_var.dtype), momentum)
        else:
            alike.append((running_mean, running_var, mean, var, factor, momentum))
    if counters:
        torch._foreach_add_(counters, 1)
    if alike:
        running_means, running_vars, means, variances, factors, momenta = map(list, zip(*alike, strict=True))
        running, now = running_means + running_vars, [*means, *torch._foreach_mul(variances, factors)]
        torch._foreach_lerp_(running, [new.to(old.dtype) for old, new in zip(running, now, strict=True)], momenta + momenta)


_apply = without_autocast(_Block.apply)


def train_block(parts: BlockParts, x: Tensor) -> Tensor:
    """A block's result, with a gradient for x and for every parameter; its norms' running statistics follow."""
    convs = [part for part in (parts.expand, parts.depthwise, parts.project) if part is not None]
    layers, counts, tensors, shape = [], [], [], list(x.shape)
    for part in convs:
        layer, shape = _layer(part, shape)
        if uses_batch(part.norm) and layer.group is None and min(shape) > 0:  # else the convolution says what is wrong
            F._verify_batch_size(torch.Size(shape))  # type: ignore[attr-defined]
        layers.append(layer)
        counts.append(shape[0] * shape[2] * shape[3])
        tensors += _tensors(part)
    squeeze = parts.squeeze_excite
    if squeeze is not None:
        tensors += [tensor_of(conv, name) for conv in (squeeze.reduce, squeeze.expand) for name in ("weight", "bias")]
    keep = None
    if parts.residual and parts.drop is not None:
        keep = parts.drop(x.new_ones((len(x), 1, 1, 1)))  # drawn in x's dtype, as the block's own forward would
        keep = keep.to(accumulator(x.dtype)).view(-1, 1).expand(-1, shape[1]).contiguous()
    plan = _Plan(tuple(layers), None if squeeze is None else squeeze.activation, parts.residual, torch.is_grad_enabled())
    out, *statistics = _apply(x.contiguous(memory_format=torch.channels_last), keep, plan, *tensors)
    told = iter(statistics)
    with torch.no_grad():
        _track(
            [
                (part.norm, next(told), next(told), count if layer.group is None else next(told))
                for part, layer, count in zip(convs, layers, counts, strict=True)
            ]
        )
    return out


def why_not_trained(parts: BlockParts, x: Tensor) -> str | None:
    """Why a block is not trained fused for ``x``, or None.

    Where an op has no kernel plain PyTorch runs, unless the reference is asked for; and where it is faster, unless a backend is.
    """
    convs = [part for part in (parts.expand, parts.depthwise, parts.project) if part is not None]
    if 0 in x.shape:
        if any(_group(part.norm) is not None for part in convs):
            raise ValueError("SyncBatchNorm: this process has an empty batch, and the others would wait; an image or more would do")
        return "the batch is empty"
    name, _ = backends.requested()
    if name == "reference":
        return None
    for part in convs:
        conv = part.conv
        if (reason := ops.why_no_kernel(x, conv.in_channels, weight_of(conv), conv.stride[0])) is not None:
            backends.refuse_strictly("training", reason)
            return f"training: {reason}"
    slower = None if name is not None else _why_slower(parts, x)
    return None if slower is None else f"training: {slower}"


# On a CPU (two cores with AVX-512, B0 to B5 at batch 1 to 16) plain PyTorch trains these faster: products dominate them, which
# oneDNN makes faster; it has a bfloat16 kernel for 3x3 depthwise convolutions, and none for 5x5.
FEWEST_PIXELS, OF_CHANNELS = 256, 480  # of the batch, where the expanded channels are so many
WIDE, WIDE_BF16 = 500, 160  # channels in and out of a 3x3 block, together


def _why_slower(parts: BlockParts, x: Tensor) -> str | None:
    """Why plain PyTorch is faster on a block. Asking symbolic sizes would fix them."""
    if x.is_cuda:
        return (
            "on a GPU its launches take Python longer than PyTorch's: effnet_fast.backend('native') asks for them, in a CUDA graph"
        )
    if parts.depthwise is None:
        return None
    conv = parts.depthwise.conv
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if conv.in_channels >= OF_CHANNELS and isinstance(pixels, int) and pixels < FEWEST_PIXELS * conv.stride[0] ** 2:
        return f"{pixels} pixels of {conv.in_channels} channels: PyTorch's products are faster on few"
    around = parts.project.conv.out_channels + (0 if parts.expand is None else parts.expand.conv.in_channels)
    wide = WIDE_BF16 * conv.stride[0] if x.dtype == torch.bfloat16 else WIDE
    if tuple(conv.kernel_size) == (3, 3) and around >= wide:
        return f"{around} channels around a 3x3 depthwise convolution in {x.dtype}: PyTorch's products are faster on many"
    return None
