"""Class activation maps (arXiv 1512.04150): where in the image the evidence for a class is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from effnet_fast.models import Classifier


class ClassActivation(NamedTuple):
    """``maps`` [N, h, w] and ``logits`` [N, K]: the mean of a map plus the classifier's bias is the logit of its class."""

    maps: Tensor
    classes: Tensor
    logits: Tensor


def class_activation_maps(model: Classifier, x: Tensor, classes: Tensor | int | None = None) -> ClassActivation:
    """Weigh the last feature map by the classifier's row of a class (equation 2): exact where the pool is the average.

    x        [N, C, H, W], prepared as the weights want it; h = H / 32 and w = W / 32, rounded up, for the published networks
    classes  one class for all images, or [N]; the most probable of each image where None

    Raises ValueError for a model in training mode, with another pool or classifier, or a class that it does not have.
    """
    if model.training:
        raise ValueError("class_activation_maps: the model is in training mode; model.eval() would do")
    classifier = model.get_classifier()
    if model.global_pool != "avg" or not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"class_activation_maps: the pool is {model.global_pool!r} and the classifier a {type(classifier).__name__}; "
            "'avg' and a Linear would do"
        )
    like = classifier.weight
    # Before it is made a tensor: a whole number may be too large for one.
    if isinstance(classes, int) and not 0 <= classes < model.num_classes:
        raise ValueError(f"class_activation_maps: class {classes}; 0 to {model.num_classes - 1} would do")
    with torch.no_grad():
        features = model.forward_features(x.to(like.device, like.dtype))
        logits = model.forward_head(features).float()
        if classes is None:
            classes = logits.argmax(1)
        chosen = torch.as_tensor(classes, device=like.device).expand(x.shape[0])
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < model.num_classes:
            raise ValueError(f"class_activation_maps: class {chosen.tolist()}; 0 to {model.num_classes - 1} would do")
        maps = torch.einsum("nchw,nc->nhw", features.float(), like[chosen].float())
    return ClassActivation(maps, chosen, logits)
