"""A frozen copy of a network for serving."""

from effnet_fast.inference.optimize import InferenceModel, optimize_for_inference

__all__ = ["InferenceModel", "optimize_for_inference"]
