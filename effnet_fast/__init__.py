"""EfficientNet as fast as its FLOPs promise: fused kernels behind the ordinary PyTorch model."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # From where they are defined: in a cycle of imports mypy takes a name that is a submodule's too for that.
    from effnet_fast.inference.optimize import optimize_for_inference
    from effnet_fast.interop.accelerate import accelerate, restore
    from effnet_fast.models import (
        efficientnet_b0,
        efficientnet_b1,
        efficientnet_b2,
        efficientnet_b3,
        efficientnet_b4,
        efficientnet_b5,
        efficientnet_b6,
        efficientnet_b7,
    )
    from effnet_fast.models.registry import create_model, efficientnet, list_models
    from effnet_fast.nn.explain import explain
    from effnet_fast.ops import backend

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "backend",
    "create_model",
    "efficientnet",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "explain",
    "list_models",
    "optimize_for_inference",
    "restore",
]

_HOMES = {  # of the names above; else models
    "accelerate": "interop",
    "restore": "interop",
    "explain": "nn",
    "backend": "ops",
    "optimize_for_inference": "inference",
}
_PACKAGES = ("inference", "interop", "models", "nn", "ops", "scaling", "training", "weights")

if not TYPE_CHECKING:
    # torch comes, and all of the package with it, when a name is first asked for: the command says its help at once, and an
    # interrupt while torch is loading finds the command ready for it.
    def __getattr__(name):
        if name in _PACKAGES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'models')}"), name)
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__all__, *_PACKAGES})
