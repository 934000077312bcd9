"""What the stem over uint8 images is held to, whatever the backend and the device."""

from __future__ import annotations

import cases
import plain
import torch
import torch.nn.functional as F
from plain import channels_last, wide
from test_ops import check_refused, good
from tolerance import assert_2x

import effnet_fast
from effnet_fast import ops

VIEWS = {
    "nchw": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "sliced": lambda x: F.pad(x, (1, 2, 1, 2), value=77)[:, :, 1:-2, 1:-2],
    "every second channel": lambda x: channels_last(torch.stack([x, 255 - x], 2).flatten(1, 2))[:, ::2],
}


def check_stem(case: cases.Stem, dtype: torch.dtype, backend: str, device: str) -> None:
    """In each layout, with and without a residual, by the 2x rule; zeros lie around the normalised image."""
    g = torch.Generator().manual_seed(case.channels + case.width)
    x, pixels = plain.uint8_images(*case[:4], g).to(device), plain.pixels(case.channels).to(device)
    weight = torch.randn(case.out, case.channels, 3, 3, generator=g).to(device, dtype)
    n = ops.Norm(*(t.to(device) for t in plain.norm(case.out, generator=g)[:4]), 1e-3)
    image, exact = plain.normalised(x, dtype), plain.normalised(x)
    residual = torch.randn(plain.conv(image, weight, n, 2, case.padding).shape, generator=g).to(device, dtype)
    for number, (name, view) in enumerate(VIEWS.items()):
        activation, added = ops.ACTIVATIONS[number], residual if number % 2 else None
        args = {"stride": 2, "padding": case.padding, "activation": activation}
        with effnet_fast.backend(backend, strict=True):
            y = ops.conv_bn_act(view(x), weight, n, **args, residual=added, pixels=pixels)
        assert y.is_contiguous(memory_format=torch.channels_last)
        ref = plain.conv(exact, wide(weight), wide(n), **args, residual=wide(added))
        assert_2x(y, plain.conv(image, weight, n, **args, residual=added), ref, name)


def check_refusals(backend: str, device: str) -> None:
    args = good("conv_bn_act", device)
    x, pixels = args["x"].to(torch.uint8), torch.ones(2, 3, device=device)
    args |= {"x": x, "pixels": pixels}
    for name, value, error, says in (
        ("x", x.float(), TypeError, "x is torch.float32; torch.uint8, beside pixels, would do"),
        ("x", x.int(), TypeError, "x is torch.int32; torch.uint8, beside pixels, would do"),
        ("pixels", None, TypeError, "x is torch.uint8; torch.float32, .* would do"),
        ("pixels", pixels[:, :2], ValueError, r"pixels is \(2, 2\); \(2, 3\) would do"),
        ("pixels", pixels[0], ValueError, r"pixels is \(3,\); \(2, 3\) would do"),
        ("pixels", pixels.bfloat16(), TypeError, "pixels is torch.bfloat16; torch.float32 would do"),
        ("pixels", pixels.to("meta"), ValueError, "pixels is on meta"),
        ("residual", args["residual"].bfloat16(), TypeError, "residual is torch.bfloat16; torch.float32 would do"),
        ("weight", args["weight"].bfloat16(), TypeError, "residual is torch.float32; torch.bfloat16 would do"),
    ):
        check_refused("conv_bn_act", backend, {**args, name: value}, error, says)
