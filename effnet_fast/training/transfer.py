"""Parts of a network that do not train: everything but the classifier, or its batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def head_of(model: nn.Module) -> nn.Module:
    """The classifier: what ``get_classifier()`` gives (our nets, timm's), else the child named classifier or fc."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    head = head or getattr(model, "classifier", None) or getattr(model, "fc", None)
    if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
        raise ValueError(f"{type(model).__name__} has no classifier to train alone; get_classifier(), classifier or fc would do")
    return head


def freeze(model: nn.Module) -> None:
    """Train only the classifier: no other parameter has a gradient, and no batch norm's statistics move."""
    head = head_of(model)
    model.requires_grad_(False)
    freeze_batch_norm(model)
    head.requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    """Train everything, batch norms too."""
    model.requires_grad_(True)
    _release(_norms(model), model.training)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """:func:`freeze` for the while; what did not train before does not train then or afterwards."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    norms = moving_norms(model)
    freeze(model)
    for parameter, before in trained:
        parameter.requires_grad_(parameter.requires_grad and before)
    try:
        yield
    finally:
        for parameter, before in trained:
            parameter.requires_grad_(before)
        _release(norms, model.training)


def freeze_batch_norm(model: nn.Module) -> None:
    """Batch norms normalise with the statistics that they have; neither these nor their weights move, whatever ``train()`` says.

    They stay the modules they are, so blocks train fused as before. :func:`unfreeze` undoes it; copies and pickles stay frozen.
    """
    for norm in _norms(model):
        norm.requires_grad_(False).eval()
        norm.train = partial(_stay, norm)  # type: ignore[method-assign]


def moving_norms(model: nn.Module) -> list[nn.Module]:
    """Batch norms that :func:`freeze_batch_norm` has not frozen."""
    return [norm for norm in _norms(model) if "train" not in norm.__dict__]


def _release(norms: list[nn.Module], training: bool) -> None:
    for norm in norms:
        norm.__dict__.pop("train", None)
        norm.train(training)


def _stay(norm: nn.Module, mode: bool = True) -> nn.Module:
    return norm


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
