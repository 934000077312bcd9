"""Peers' models made fast in place, and checkpoints in their layouts."""

from effnet_fast.interop.accelerate import Acceleration, accelerate, restore
from effnet_fast.interop.checkpoints import convert
from effnet_fast.weights import load_checkpoint, save_checkpoint

__all__ = ["Acceleration", "accelerate", "convert", "load_checkpoint", "restore", "save_checkpoint"]
