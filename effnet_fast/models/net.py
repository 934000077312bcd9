"""What all nets share: their config and conventions, recomputation, and the pooled classifier."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effnet_fast.nn.blocks import ActLayer, NormLayer, set_conv_padding, set_padding
from effnet_fast.nn.padding import check_padding
from effnet_fast.nn.parts import has_hooks
from effnet_fast.scaling.config import NetConfig
from effnet_fast.scaling.names import names_of
from effnet_fast.weights import default_cfg

_ACTIVATIONS: dict[str, ActLayer] = {"silu": nn.SiLU, "relu": nn.ReLU, "relu6": nn.ReLU6, "identity": nn.Identity}
POOLS = ("avg", "max", "avgmax", "")


def layer_factories(config: NetConfig, norm_layer: NormLayer | None, act_layer: ActLayer | None) -> tuple[NormLayer, ActLayer]:
    """The factories of a net's layers. A model keeps none: a user's lambda would not pickle."""
    batch_norm = partial(nn.BatchNorm2d, eps=config.bn_eps, momentum=config.bn_momentum)
    return norm_layer or batch_norm, act_layer or _ACTIVATIONS[config.activation]


class Net(nn.Module):
    """A net's convolutional part. ``config`` says what was built."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False

    def forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """A stage, or one block."""
        if not (self.grad_checkpointing and self.training):
            return stage(x)
        blocks = stage.children() if type(stage) is nn.Sequential and not has_hooks(stage) else (stage,)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def set_weights_convention(
        self, padding: str | None = None, bn_eps: float | None = None, bn_momentum: float | None = None
    ) -> None:
        """Adopt the padding, eps or momentum that some weights were trained under; what is None stays as it is."""
        if padding is not None:
            check_padding("set_weights_convention", padding)
        given = {"padding": padding, "bn_eps": bn_eps, "bn_momentum": bn_momentum}
        self.config = replace(self.config, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        if padding is not None and self.config.family == "efficientnet":
            set_padding(self, padding)
            set_conv_padding(self.get_submodule(names_of(self.config).stem[0]), padding)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = module.eps if bn_eps is None else bn_eps
                module.momentum = module.momentum if bn_momentum is None else bn_momentum


class Classifier(Net):
    """A classifier: x [N, in_channels, H, W] float, either layout -> logits [N, num_classes].

    config        what to build, from a table or from the scaling law
    drop_rate     dropout before the classifier; the config's where None
    global_pool   "avg", "max", "avgmax" (their mean), or "" for none
    """

    CLASSIFIER = "classifier"  # the child that is called last

    def __init__(self, config: NetConfig, drop_rate: float | None = None) -> None:
        super().__init__(config)
        self.drop_rate = config.dropout if drop_rate is None else drop_rate
        self.num_classes, self.num_features = config.num_classes, config.features
        self.head_hidden_size = self.num_features
        self.default_cfg = default_cfg(config)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The preprocessing and provenance of the weights; timm's other name for ``default_cfg``."""
        return self.default_cfg

    def place_classifier(self, linear: nn.Module) -> None:
        """Put what makes logits of features where its name says."""
        self.add_module(self.CLASSIFIER, linear)

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(names_of(self.config).classifier)

    @torch.no_grad()
    def init_classifier(self) -> None:
        """Initialise the linear layer, where there is one, in place: as the paper's code, U(-1, 1) / sqrt(out), and no bias."""
        if isinstance(linear := self.get_classifier(), nn.Linear):
            bound = linear.out_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(linear.bias)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in POOLS:
            who, pools = type(self).__name__, ", ".join(map(repr, POOLS))
            raise ValueError(f"{who}: global_pool is {global_pool!r}; one of {pools} would do")
        if not global_pool and num_classes:
            raise ValueError(f"{type(self).__name__}: global_pool is '' with a classifier; num_classes=0 would do, or a pool")
        self.global_pool, self.num_classes = global_pool, num_classes
        self.place_classifier(nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity())

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes`` (0: none), freshly initialised, where the old one stood."""
        like = next(self.parameters())
        self._set_head(num_classes, self.global_pool if global_pool is None else global_pool)
        self.config = replace(self.config, num_classes=num_classes)
        self.init_classifier()
        self.get_submodule(self.CLASSIFIER).to(device=like.device, dtype=like.dtype).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, num_features, H', W'], ``config.reduction`` times smaller (rounded up): all before the pool."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, dropout, classifier; with ``pre_logits`` what the classifier would be given."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        elif self.global_pool == "max":
            x = x.amax((2, 3))
        elif self.global_pool == "avgmax":
            x = 0.5 * (x.mean((2, 3)) + x.amax((2, 3)))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else getattr(self, self.CLASSIFIER)(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def check_images(who: str, x: Any, channels: int | None) -> None:
    """ValueError or TypeError where ``x`` is no batch of float images of so many channels."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{who}: the input is {shape}; a batch of images [N, {channels or 'C'}, H, W] would do")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{who}: the input has {x.shape[1]} channels; {channels} would do (in_chans sets it)")
    if not x.is_floating_point():
        raise TypeError(f"{who}: the input is {x.dtype}; a float image, normalised as the weights' preprocessing says, would do")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{who}: the input is {tuple(x.shape)}; at least one pixel would do")
