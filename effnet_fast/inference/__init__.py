"""A frozen copy of a network for serving; images from files, batched prediction, class activation maps. Reading images needs
Pillow."""

from effnet_fast.inference.cam import class_activation_maps
from effnet_fast.inference.optimize import InferenceModel, optimize_for_inference
from effnet_fast.inference.predict import Label, Prediction, predict

__all__ = ["InferenceModel", "Label", "Prediction", "class_activation_maps", "optimize_for_inference", "predict"]
