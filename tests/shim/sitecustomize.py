"""Lets a CUDA build of torchvision be imported beside CPU-only torch: its models and transforms work, its compiled ops do not.

On PYTHONPATH for the tests and their subprocesses; never part of the package.
"""

import importlib.util
import sys
import types

if importlib.util.find_spec("torch") is not None:
    from importlib.metadata import version

    if "+cpu" in version("torch"):
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
