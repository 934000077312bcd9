"""Parameter groups, the optimizer, and the learning rate at each step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from effnet_fast.training.recipes import Recipe

_WITH_PREVIOUS = 99999  # timm's mark in a group matcher: of the same layer as what comes before


def layers(model: nn.Module) -> dict[str, int]:
    """The number of the layer that each parameter is of, from 0 at the stem to the classifier.

    By the model's ``group_matcher``, which our nets and timm's have; ValueError where there is none.
    """
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            f"layer_decay wants layers, and {type(model).__name__} tells none; 1, or a model with group_matcher, would do"
        )
    matcher: dict[str, Any] = model.group_matcher()  # type: ignore[operator]
    blocks = [(matcher["blocks"], None)] if isinstance(matcher["blocks"], str) else matcher["blocks"]
    patterns: list[tuple[str, tuple[int, ...] | None]] = [(matcher["stem"], None), *blocks]
    places = {name: _place(name, patterns) for name, _ in model.named_parameters()}
    numbers: dict[tuple[float, ...], int] = {}
    number = -1
    for place in sorted(set(places.values())):
        number += place[-1] != _WITH_PREVIOUS
        numbers[place] = number
    return {name: numbers[place] for name, place in places.items()}


def _place(name: str, patterns: list[tuple[str, tuple[int, ...] | None]]) -> tuple[float, ...]:
    for at, (pattern, suffix) in enumerate(patterns):
        if (found := re.match(pattern, name)) is not None:
            return (min(at, 1), *(float(group) for group in found.groups() if group is not None), *(suffix or ()))
    return (math.inf,)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for an optimizer: norms and biases without weight decay; a layer's learning rate is ``layer_decay`` of the next one's.

    All parameters are in, by name, also those that do not train now. ValueError as in :func:`layers`.
    """
    numbers = layers(model) if layer_decay != 1 else {}
    last = max(numbers.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer, decays = numbers.get(name, 0), parameter.dim() > 1
        group = groups.setdefault(
            (layer, decays),
            {"params": [], "lr": lr * layer_decay ** (last - layer), "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append((name, parameter))
    return list(groups.values())


class RMSpropTF(Optimizer):
    """TensorFlow's RMSProp: eps stands under the root, the mean square starts at one, and the momentum holds steps, not gradients.

    As tf.raw_ops.ApplyRMSProp states it; with decay 0.9 and momentum 0.9 EfficientNet was trained by it (arXiv 1905.11946, section
    5.2). The rule is Hinton's ("Neural networks for machine learning", lecture 6e).

    lr            of the steps to come: those that the momentum holds keep what they were taken with
    alpha         decay of the mean square
    momentum      decay of the steps
    weight_decay  share of a parameter that is added to its gradient

    Parameters without a gradient stay as they are.
    """

    def __init__(
        self, params: Any, lr: float, alpha: float = 0.9, momentum: float = 0.9, eps: float = 1e-3, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a step; returns what ``closure`` does, which is called first with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        "square_avg": torch.ones_like(parameter),
                        "momentum_buffer": torch.zeros_like(parameter),
                    }
            squares, steps = (
                [self.state[parameter][name] for parameter in parameters] for name in ("square_avg", "momentum_buffer")
            )
            gradients: Any = [parameter.grad for parameter in parameters]
            if group["weight_decay"]:
                gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - group["alpha"])
            roots = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_mul_(steps, group["momentum"])
            torch._foreach_addcdiv_(steps, gradients, roots, group["lr"])
            torch._foreach_sub_(parameters, steps)
        return loss


def build_optimizer(model: nn.Module, recipe: Recipe, processes: int = 1) -> Optimizer:
    """torch's optimizer as the recipe says, or TensorFlow's RMSProp."""
    lr = recipe.learning_rate(processes)
    groups = parameter_groups(model, lr, recipe.weight_decay, recipe.layer_decay)
    if recipe.opt == "sgd":
        return torch.optim.SGD(groups, lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    if recipe.opt == "adamw":
        return torch.optim.AdamW(groups, lr, betas=recipe.opt_betas or (recipe.momentum, 0.999), eps=recipe.opt_eps)
    kind = RMSpropTF if recipe.opt == "rmsproptf" else torch.optim.RMSprop
    return kind(groups, lr, alpha=0.9, momentum=recipe.momentum, eps=recipe.opt_eps)


def schedule(recipe: Recipe, steps: int, processes: int = 1) -> Callable[[int], float]:
    """step -> factor of the learning rate, with ``steps`` in an epoch.

    A line from ``warmup_lr`` over the warm-up's steps (the first step takes 1 / steps of the way, so that it moves), then a cosine
    from there to ``min_lr`` at the end, or ``decay_rate`` for every full ``decay_epochs`` since the beginning.

    Raises ValueError for a ``warmup_lr`` or ``min_lr`` above the learning rate.
    """
    warmup, total = recipe.warmup_epochs * steps, recipe.epochs * steps
    highest = recipe.learning_rate(processes)
    for name in ("warmup_lr", "min_lr"):
        if getattr(recipe, name) > highest:
            raise ValueError(f"{name} is {getattr(recipe, name):g}, above the learning rate {highest:g}; that at most would do")
    first, least = recipe.warmup_lr / highest, recipe.min_lr / highest

    def factor(step: int) -> float:
        if step < warmup:
            return first + (1 - first) * min(1.0, (step + 1) / warmup)
        if recipe.sched == "step":
            return recipe.decay_rate ** math.floor(step / (recipe.decay_epochs * steps))
        way = (step - warmup) / max(1.0, total - warmup)
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, way)))

    return factor
