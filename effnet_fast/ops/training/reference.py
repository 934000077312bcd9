"""Training's ops in plain PyTorch. Like the kernels they round to x's dtype what they return, and nothing before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.ops.common import accumulator
from effnet_fast.ops.training import composed


def activation_and_slope(u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation of ``u`` and its derivative there, where PyTorch's backward has the same."""
    if activation == "silu":
        sigmoid = torch.sigmoid(u)
        return u * sigmoid, sigmoid * (1 + u * (1 - sigmoid))
    if activation == "relu":
        return F.relu(u), (~(u <= 0)).to(u.dtype)
    if activation == "relu6":
        return F.relu6(u), (~((u <= 0) | (u >= 6))).to(u.dtype)
    return u, torch.ones_like(u)


def _of_channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _of_images(t: Tensor) -> Tensor:
    return t[:, :, None, None]


def _centred(x: Tensor, norm: Tensor) -> Tensor:
    return x.to(norm.dtype) - _of_channels(norm[0])


def _value_and_slope(x: Tensor, norm: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return activation_and_slope(_of_channels(norm[1]) * _centred(x, norm) + _of_channels(norm[2]), activation)


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    return result.to(like.dtype).contiguous(memory_format=torch.channels_last)


def norm_act(y: Tensor, norm: Tensor, activation: str, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    out = _value_and_slope(y, norm, activation)[0]
    if gate is not None:
        out = out * _of_images(gate)
    return _laid_out(out if residual is None else out + residual, y)


def norm_act_mean(y: Tensor, norm: Tensor, activation: str) -> Tensor:
    return _value_and_slope(y, norm, activation)[0].mean((2, 3))


def _sums(product: Tensor, centred: Tensor) -> Tensor:
    return torch.stack([product.sum((0, 2, 3)), (product * centred).sum((0, 2, 3))])


def norm_act_sums(grad: Tensor, y: Tensor, norm: Tensor, activation: str, gate: Tensor | None) -> Tensor:
    g = grad.to(norm.dtype)
    if gate is not None:
        g = g * _of_images(gate)
    return _sums(g * _value_and_slope(y, norm, activation)[1], _centred(y, norm))


def norm_act_image_sums(grad: Tensor, x: Tensor, norm: Tensor, activation: str) -> Tensor:
    (value, slope), centred, g = _value_and_slope(x, norm, activation), _centred(x, norm), grad.to(norm.dtype)
    terms = (g * value, g * slope, slope, g * slope * centred, slope * centred)
    return torch.stack([term.sum((2, 3)) for term in terms], 1)


def norm_act_backward(grad: Tensor, x: Tensor, norm: Tensor, activation: str, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    product = grad.to(norm.dtype) * _value_and_slope(x, norm, activation)[1]
    return _laid_out(product if residual is None else product + residual, x), _sums(product, _centred(x, norm))


def norm_gradient(
    grad: Tensor, y: Tensor, norm: Tensor, coefficients: Tensor, activation: str, gate: Tensor | None, pool: Tensor | None
) -> Tensor:
    g = grad.to(norm.dtype)
    if gate is not None:
        g = g * _of_images(gate)
    if pool is not None:
        g = g + _of_images(pool)
    if activation != "identity":
        g = g * _value_and_slope(y, norm, activation)[1]
    of_grad, of_y, shift = map(_of_channels, coefficients)
    return _laid_out(of_grad * g + of_y * _centred(y, norm) + shift, y)


def batch_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(y.to(accumulator(y.dtype)), (0, 2, 3), correction=0)
    return mean, var


def norm_vectors(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    inverse = torch.rsqrt(var + eps)
    scale = inverse if weight is None else weight.to(inverse.dtype) * inverse
    return torch.stack([mean, scale, torch.zeros_like(mean) if bias is None else bias.to(inverse.dtype)]), inverse


def norm_coefficients(sums: Tensor, norm: Tensor, inverse: Tensor, values: int | None) -> tuple[Tensor, Tensor]:
    (total, of_deviations), scale = sums, norm[1]
    grad_weight = of_deviations * inverse
    if values is None:
        zeros = torch.zeros_like(scale)
        return torch.stack([scale, zeros, zeros]), grad_weight
    share = scale / -values
    return torch.stack([scale, grad_weight * inverse * share, total * share]), grad_weight


def squeeze_excite_backward(
    sums: Tensor,
    gate: Tensor,
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    activation: str,
    pixels: int,
) -> tuple[Tensor, ...]:
    reduce, bias, expand = (None if t is None else t.to(sums.dtype) for t in (reduce_weight, reduce_bias, expand_weight))
    value, slope = activation_and_slope(F.linear(pooled, reduce.flatten(1), bias), activation)  # type: ignore[union-attr]
    of_expanded = torch.ops.aten.sigmoid_backward(sums[:, 0], gate)
    of_hidden = of_expanded @ expand.flatten(1) * slope  # type: ignore[union-attr]
    pool = torch.addmm(pooled, of_hidden, reduce.flatten(1), beta=0, alpha=1 / pixels)  # type: ignore[union-attr]
    norm_sums = torch.addcmul(pool[:, None] * sums[:, 2::2], gate[:, None], sums[:, 1::2]).sum(0)
    return pool, norm_sums, of_hidden.T @ pooled, of_hidden.sum(0), of_expanded.T @ value, of_expanded.sum(0)


_PASSES = composed.Passes(norm_act, norm_act_image_sums, norm_act_backward, norm_gradient)


def _wide(*args: Any, dtype: torch.dtype) -> list[Any]:
    return [arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args]


def conv_stats(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = composed.forward(_PASSES, *_wide(x, *args, dtype=accumulator(x.dtype))).to(x.dtype)
    return y, *batch_stats(y)


def conv_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, need_x, need_weight = args[7], *args[-2:]
    grad_x, grad_weight, sums = composed.backward(_PASSES, *_wide(grad, *args, dtype=accumulator(grad.dtype)))
    return (
        _laid_out(grad_x, grad) if need_x else grad_x.to(grad.dtype),
        grad_weight.to(weight.dtype) if need_weight else weight.new_empty(0),
        sums,
    )
