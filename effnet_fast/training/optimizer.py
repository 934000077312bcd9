"""Parameter groups, the optimizer, and the learning rate at each step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
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


def build_optimizer(model: nn.Module, recipe: Recipe, processes: int = 1) -> Optimizer:
    """torch's optimizer as the recipe says; rmsprop's mean square starts at one, as TensorFlow's does, and not at zero."""
    lr = recipe.learning_rate(processes)
    groups = parameter_groups(model, lr, recipe.weight_decay, recipe.layer_decay)
    if recipe.opt == "sgd":
        return torch.optim.SGD(groups, lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    if recipe.opt == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(recipe.momentum, 0.999), eps=recipe.opt_eps)
    # TensorFlow's eps stands under the root, torch's beside it: with its root a step is at most TensorFlow's, at least 0.7 of it.
    optimizer = torch.optim.RMSprop(groups, lr, alpha=0.9, momentum=recipe.momentum, eps=math.sqrt(recipe.opt_eps))
    for parameter in model.parameters():
        ones, zeros = (make(parameter, requires_grad=False) for make in (torch.ones_like, torch.zeros_like))
        optimizer.state[parameter] = {"step": torch.zeros(()), "square_avg": ones, "momentum_buffer": zeros}
    return optimizer


def schedule(recipe: Recipe, steps: int, processes: int = 1) -> Callable[[int], float]:
    """step -> factor of the learning rate, with ``steps`` in an epoch.

    A line from 0 over the warm-up's steps (the first step takes 1 / steps of the way, so that it moves), then a cosine from there
    to ``min_lr`` at the end, or ``decay_rate`` for every full ``decay_epochs`` since the beginning.

    Raises ValueError for a ``min_lr`` above the learning rate.
    """
    warmup, total = recipe.warmup_epochs * steps, recipe.epochs * steps
    highest = recipe.learning_rate(processes)
    if recipe.min_lr > highest:
        raise ValueError(f"min_lr is {recipe.min_lr:g}, above the learning rate {highest:g}; that at most would do")
    least = recipe.min_lr / highest

    def factor(step: int) -> float:
        if step < warmup:
            return min(1.0, (step + 1) / warmup)
        if recipe.sched == "step":
            return recipe.decay_rate ** math.floor(step / (recipe.decay_epochs * steps))
        way = (step - warmup) / max(1.0, total - warmup)
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, way)))

    return factor
