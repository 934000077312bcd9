"""Rewriting a checkpoint from one library's layout into another's, for any net of the family."""

from __future__ import annotations

import os

from effnet_fast import weights
from effnet_fast.models import CLASSICS, FAMILY, config_of
from effnet_fast.scaling.config import NetConfig


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    layout: str,
    architecture: str | None = None,
    ema: bool = False,
    force: bool = False,
) -> NetConfig:
    """Rewrite the checkpoint ``source`` as ``target`` in ``layout`` (timm, torchvision or lukemelas); returns the net it is of.

    The net is the one named ``architecture``, else what the file says of itself or the one of the family whose tensors it holds.
    ``ema``: its averaged weights. ``force``: even where the layout's library runs such a net with another padding or eps, and so
    answers wrongly; a warning says so. Raises ValueError as :func:`effnet_fast.weights.convert` does.
    """
    if architecture is not None:
        config_of(architecture)  # raises: the name is unknown
    return weights.convert(source, target, layout, (*FAMILY.values(), *CLASSICS.values()), architecture, ema, force)
