"""What the kernels are held to, in PyTorch's own functions and without the package's reference; and the same values behind other
strides and addresses. For the tests of every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.ops import Norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "relu6": F.relu6, "identity": lambda t: t}


def norm(channels: int, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None) -> Norm:
    """Of random vectors, weight and variance from 0.5 to 1.5, bias and mean from -0.5 to 0.5."""
    vectors = (torch.rand(channels, generator=generator) + shift for shift in (0.5, -0.5, -0.5, 0.5))
    return Norm(*(v.to(dtype) for v in vectors), 1e-3)


def wide(value):
    """Tensors in float64, also those of a norm, a list or a tuple; the rest as it is."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, Norm):
        return Norm(*map(wide, value))
    return list(map(wide, value)) if isinstance(value, (list, tuple)) else value


def conv(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    groups: int = 1,
    activation: str = "identity",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``activation(norm(conv(x * gate))) + residual`` in x's dtype; padding is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    x = x if gate is None else x * gate.to(x.dtype)[:, :, None, None]
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight.to(x.dtype), stride=stride, groups=groups)
    y = ACTIVATIONS[activation](F.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps))
    return y if residual is None else y + residual


def uint8_images(images: int, channels: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """[N, C, H, W], random, with both ends of the range."""
    x = torch.randint(-32, 288, (images, channels, height, width), generator=generator)
    return x.clamp(0, 255).to(torch.uint8)


MEAN, STD = torch.tensor([[0.485, 0.456, 0.406, 0.5], [0.229, 0.224, 0.225, 0.25]], dtype=torch.float64)


def normalised(x: Tensor, dtype: torch.dtype = torch.float64, mean: Tensor = MEAN, std: Tensor = STD) -> Tensor:
    """uint8 ``x`` [N, C, H, W] as a network is given it in ``dtype``: made in float32, or float64 where that is asked for."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = (t[: x.shape[1], None, None].to(x.device, compute) for t in (mean, std))
    return ((x.to(compute) / 255 - mean) / std).to(dtype)


def pixels(channels: int) -> Tensor:
    """The same as scale and shift: [2, C] float32."""
    return torch.stack([1 / (255 * STD), -MEAN / STD])[:, :channels].float()


def gate(
    partial: Tensor,
    count: int,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """The squeeze-excite's gate, in the sums' dtype."""
    reduce_weight, reduce_bias, expand_weight, expand_bias = (
        None if t is None else t.to(partial.dtype) for t in (reduce_weight, reduce_bias, expand_weight, expand_bias)
    )
    hidden = ACTIVATIONS[activation](F.linear(partial.sum(1) / count, reduce_weight.flatten(1), reduce_bias))
    return torch.sigmoid(F.linear(hidden, expand_weight.flatten(1), expand_bias))


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def misaligned(t: Tensor) -> Tensor:
    """With t's own strides, one element past an address that suits vectors."""
    return t.new_empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1).copy_(t)


def sliced(t: Tensor) -> Tensor:
    """A slice, in every dimension, of a larger tensor of NaN."""
    return F.pad(t, (1, 2) * t.dim(), value=float("nan"))[(slice(1, -2),) * t.dim()]


def every_second(t: Tensor) -> Tensor:
    """With NaN between neighbours."""
    return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    """The last two dimensions, where there are two, change places in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


VIEWS = {
    "nchw": Tensor.contiguous,
    "channels_last": channels_last,
    "misaligned": misaligned,
    "sliced": sliced,
    "every second": every_second,
    "transposed": transposed,
}


def without_kinks(name: str) -> dict[str, type[torch.nn.Module]]:
    """Arguments that make a net's activation smooth, for its gradients: of a million ReLU6 of the lite nets some are so close to a
    kink that rounding decides on the slope, 0 or 1."""
    return {"act_layer": torch.nn.SiLU} if "lite" in name else {}
