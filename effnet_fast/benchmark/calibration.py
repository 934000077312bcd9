"""Untrained networks that can be compared: statistics like a trained one's, and images that they tell apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def images(count: int, size: tuple[int, int], channels: int = 3, seed: int = 1) -> Tensor:
    """Random images with structure at several scales, [N, C, H, W] float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, *size, generator=generator)
    for scale in (4, 16):
        coarse = torch.randn(count, channels, max(1, size[0] // scale), max(1, size[1] // scale), generator=generator)
        x += nn.functional.interpolate(coarse, size=size, mode="bilinear") * 2
    return x


@torch.no_grad()
def calibrate(model: nn.Module, size: tuple[int, int] = (64, 64), channels: int = 3) -> nn.Module:
    """Give a randomly initialised net running statistics like a trained one's, in place; returns it in eval mode.

    Fresh statistics (0 and 1) let the activations die out, and random ones let the image move the logits by 3e-4 or less: either
    way any two nets agree. One train-mode pass sets them, and a perturbation keeps mean and variance from being exactly that
    pass's. A channel that hardly varied is not scaled up by its tiny variance: such a net is chaotic, and fp32 itself loses digits
    in it. ``size`` is the one that the comparison will use, for the same reason.

    Raises RuntimeError where two images give logits less than 10 % apart, or logits that died out or exploded.
    """
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    drops = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for norm in norms:
        norm.weight.uniform_(0.1, 0.3, generator=generator)
        norm.bias.uniform_(-0.1, 0.1, generator=generator)
    for drop in drops:
        drop.p = 0.0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for module in model.modules():  # stochastic depth off, batch norm on
        if not isinstance(module, _BatchNorm) and any(hasattr(module, name) for name in ("drop_prob", "p")):
            module.eval()
    model(images(8, size, channels, seed=0))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean += 0.03 * norm.running_var.sqrt() * torch.randn(norm.num_features, generator=generator)
        norm.running_var *= torch.empty(norm.num_features).uniform_(0.95, 1.05, generator=generator)
        norm.running_var.clamp_(min=0.1 * norm.running_var.mean().item())
    for drop, p in drops.items():
        drop.p = p
    model.eval()
    out = model(images(2, size, channels))
    if isinstance(out, Tensor):
        a, b = out
        scale = out.abs().max().item()
        if not (a - b).abs().max().item() >= 0.1 * scale:
            raise RuntimeError("calibrate: two images give the same logits, to 10 %: a comparison would be vacuous")
        if not 1e-3 < scale < 100:
            raise RuntimeError(f"calibrate: logits of {scale:.2g}: activations die out or explode, and any rounding with them")
    return model
