"""Images from files, batched prediction, class activation maps. Reading images needs Pillow."""

from effnet_fast.inference.cam import class_activation_maps
from effnet_fast.inference.predict import Label, Prediction, predict

__all__ = ["Label", "Prediction", "class_activation_maps", "predict"]
