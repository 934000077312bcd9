"""How a network is trained: all the numbers of it in one place, and named sets of them with their sources."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from effnet_fast.scaling.config import is_real, is_whole
from effnet_fast.training.policies import options_of

Check = tuple[Callable[[Any], bool], str]  # whether a value is good, and what would be


def _whole(least: int) -> Check:
    return lambda value: is_whole(value, least), f"a whole number >= {least}"


def _seed(value: Any) -> bool:
    """Whether torch's generators take it."""
    return is_whole(value, 0) and value < 2**64


def _real(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Check:
    """A number between the two, which are good themselves where they are not open; None where that is the default."""
    asked = f"{'above' if open_low else 'from'} {low:g}" + (
        "" if high == math.inf else f" and {'below' if open_high else 'up to'} {high:g}"
    )
    return (
        lambda value: (
            is_real(value) and (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
        ),
        f"a number {asked}",
    )


def _one_of(*words: str) -> Check:
    return lambda value: value in words, " or ".join(map(repr, words))


def _two(good: Callable[[float, float], bool], wanted: str) -> Check:
    """A tuple of two numbers that are good together."""
    return (
        lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(is_real, value)) and good(*value),
        wanted,
    )


def _setting(default: Any, text: str, check: Check | None = None, choices: tuple[str, ...] | None = None, values: int = 1) -> Any:
    """A field whose metadata says what it means, what is good for it and of how many values; the command line is made from it."""
    check = _one_of(*choices) if choices else check
    return field(default=default, metadata={"help": text, "check": check, "choices": choices, "values": values})


_FLAG: Check = (lambda value: isinstance(value, bool), "True or False")
_TEXT: Check = (lambda value: isinstance(value, str), "a name")


@dataclass(frozen=True)
class Recipe:
    """Settings under timm's names; ValueError names one that is out of range. ``PRESETS`` has sets of them."""

    epochs: int = _setting(30, "passes over the training images", _whole(1))
    batch_size: int = _setting(64, "images of one process at a time", _whole(1))
    grad_accum_steps: int = _setting(1, "batches whose gradients make one step", _whole(1))
    opt: str = _setting(
        "adamw", "optimizer; rmsproptf is TensorFlow's, rmsprop PyTorch's", choices=("sgd", "adamw", "rmsproptf", "rmsprop")
    )
    lr: float | None = _setting(
        None, "learning rate (default: lr-base for each lr-base-size images of a step)", _real(0, open_low=True)
    )
    lr_base: float = _setting(1e-3, "learning rate of a step of lr-base-size images; scaled linearly", _real(0, open_low=True))
    lr_base_size: int = _setting(256, "images that lr-base is for", _whole(1))
    momentum: float = _setting(0.9, "of sgd (Nesterov's) and rmsprop; adamw's first beta", _real(0, 1, open_high=True))
    opt_eps: float = _setting(1e-8, "of adamw and rmsprop; rmsproptf's stands under the root", _real(0, open_low=True))
    opt_betas: tuple[float, float] | None = _setting(
        None,
        "adamw's two (default: momentum and 0.999)",
        _two(lambda first, second: 0 <= first < 1 and 0 <= second < 1, "two numbers from 0 and below 1"),
        values=2,
    )
    weight_decay: float = _setting(0.05, "of weights; norms and biases have none", _real(0))
    layer_decay: float = _setting(1.0, "factor of the learning rate from a layer to the one before it", _real(0, 1, open_low=True))
    sched: str = _setting("cosine", "the learning rate's way down: once, or by decay-rate in steps", choices=("cosine", "step"))
    warmup_epochs: float = _setting(0.0, "in which the learning rate rises linearly", _real(0))
    warmup_lr: float = _setting(0.0, "learning rate that it rises from", _real(0))
    min_lr: float = _setting(0.0, "learning rate at the end of the cosine", _real(0))
    decay_epochs: float = _setting(2.4, "between steps of sched step", _real(0, open_low=True))
    decay_rate: float = _setting(0.97, "factor of such a step", _real(0, 1, open_low=True))
    clip_grad: float | None = _setting(None, "largest norm of the gradient", _real(0, open_low=True))
    smoothing: float = _setting(0.0, "label smoothing", _real(0, 1, open_high=True))
    aa: str = _setting(
        "none",
        "torchvision's augmentation of colours and shapes: none, autoaugment (or original), randaugment, trivialaugment, or timm's "
        "rand-m9-mstd0.5-inc1 (n, p) and augmix-m3-w3 (d)",
        _TEXT,
    )
    color_jitter: float = _setting(0.0, "largest change of brightness, contrast and saturation; without aa", _real(0))
    scale: tuple[float, float] = _setting(
        (0.08, 1.0),
        "share of an image that a random crop keeps",
        _two(lambda low, high: 0 < low <= high <= 1, "two shares, 0 < low <= high <= 1,"),
        values=2,
    )
    ratio: tuple[float, float] = _setting(
        (3 / 4, 4 / 3),
        "width by height of a random crop",
        _two(lambda low, high: 0 < low <= high, "two numbers, 0 < low <= high,"),
        values=2,
    )
    hflip: float = _setting(0.5, "probability of a mirrored image", _real(0, 1))
    vflip: float = _setting(0.0, "probability of an image upside down", _real(0, 1))
    reprob: float = _setting(0.0, "probability of an erased rectangle", _real(0, 1))
    remode: str = _setting("pixel", "what is in it: noise, or the mean colour", choices=("pixel", "const"))
    mixup: float = _setting(0.0, "alpha of MixUp; 0: none", _real(0))
    cutmix: float = _setting(0.0, "alpha of CutMix; 0: none; with MixUp either, by chance", _real(0))
    mixup_prob: float = _setting(1.0, "probability that a batch is mixed by either", _real(0, 1))
    mixup_switch_prob: float = _setting(0.5, "probability of CutMix where there are both", _real(0, 1))
    mixup_off_epoch: int = _setting(0, "epochs after which no batch is mixed; 0: all are", _whole(0))
    bn_momentum: float | None = _setting(None, "of batch norm's statistics, as PyTorch counts (default: the net's)", _real(0, 1))
    model_ema: bool = _setting(False, "average the weights, and judge and save the average", _FLAG)
    model_ema_decay: float = _setting(0.9999, "of that average, and less in the first steps", _real(0, 1, open_high=True))
    amp: bool = _setting(False, "mixed precision", _FLAG)
    amp_dtype: str = _setting("bfloat16", "of mixed precision", choices=("bfloat16", "float16"))
    grad_checkpointing: bool = _setting(False, "recompute blocks in the backward pass", _FLAG)
    cuda_graph: bool = _setting(
        False, "forward and backward as one CUDA graph, on the fused kernels (one process, on a GPU)", _FLAG
    )
    sync_bn: bool = _setting(False, "batch norm over the batches of all processes", _FLAG)
    freeze_epochs: int = _setting(0, "epochs, from the first, in which only the classifier trains", _whole(0))
    freeze_bn: bool = _setting(False, "batch norms keep their statistics and weights", _FLAG)
    distill: float = _setting(0.5, "share of the teacher's loss, where there is one", _real(0, 1))
    temperature: float = _setting(2.0, "of the teacher's and student's distributions", _real(0, open_low=True))
    seed: int = _setting(0, "order, augmentation and dropout follow from it", (_seed, "a whole number >= 0 and < 2**64"))

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            good, wanted = setting.metadata["check"]
            if not (value is None and setting.default is None) and not good(value):
                raise ValueError(f"{setting.name} is {value!r}; {wanted} would do")
        options_of(self.aa)  # raises: torchvision cannot do it
        if self.color_jitter and self.aa != "none":
            raise ValueError(
                f"color_jitter is {self.color_jitter:g}, and aa {self.aa!r} changes colours itself; either alone would do"
            )
        if self.opt_betas is not None and self.opt != "adamw":
            raise ValueError(f"opt_betas is {self.opt_betas!r}, and opt {self.opt!r} has none; opt 'adamw' would do")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs:g} of {self.epochs} epochs; fewer would do")
        if self.freeze_bn and self.sync_bn:
            raise ValueError("freeze_bn with sync_bn: a frozen norm has no statistics to share; one of them would do")

    def learning_rate(self, processes: int = 1) -> float:
        """The highest learning rate of the run, of a step over so many processes."""
        if self.lr is not None:
            return self.lr
        return self.lr_base * self.batch_size * self.grad_accum_steps * processes / self.lr_base_size


PRESETS = {
    # arXiv 1905.11946, section 5.2; epochs, eps, the average, warm-up, label smoothing and batch are of the code published with it.
    "paper": Recipe(
        epochs=350,
        opt="rmsproptf",
        lr_base=0.256,
        lr_base_size=4096,
        momentum=0.9,
        opt_eps=1e-3,
        weight_decay=1e-5,
        sched="step",
        warmup_epochs=5,
        decay_epochs=2.4,
        decay_rate=0.97,
        smoothing=0.1,
        aa="autoaugment",
        bn_momentum=0.01,
        model_ema=True,
        model_ema_decay=0.9999,
    ),
    # timm's EfficientNet-B2 with RandAugment (its "training hparam examples"), there on two processes of 128 images.
    "randaugment": Recipe(
        epochs=450,
        batch_size=128,
        opt="rmsproptf",
        lr_base=0.016,
        lr_base_size=256,
        momentum=0.9,
        opt_eps=1e-3,
        weight_decay=1e-5,
        sched="step",
        warmup_epochs=3,
        warmup_lr=1e-6,
        decay_epochs=2.4,
        decay_rate=0.97,
        smoothing=0.1,
        aa="rand-m9-mstd0.5-inc1",
        reprob=0.2,
        model_ema=True,
        model_ema_decay=0.9999,
        amp=True,
    ),
    # "Bag of tricks", arXiv 1812.01187, sections 2.1, 3.1 and 5: SGD, warm-up and a cosine, label smoothing, MixUp.
    "cosine": Recipe(
        epochs=200,
        opt="sgd",
        lr_base=0.1,
        lr_base_size=256,
        momentum=0.9,
        weight_decay=1e-4,
        warmup_epochs=5,
        smoothing=0.1,
        mixup=0.2,
    ),
    # No paper's: a common way to adapt pretrained weights to a small data set, the early layers least.
    "finetune": Recipe(
        epochs=20,
        lr_base=1e-3,
        layer_decay=0.85,
        warmup_epochs=1,
        weight_decay=0.05,
        smoothing=0.1,
        aa="randaugment",
        scale=(0.35, 1.0),
        clip_grad=1.0,
    ),
}
