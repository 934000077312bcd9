"""optimize_for_inference: a frozen copy of a network for serving."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.inference.pixels import image_batch, scale_and_shift
from effnet_fast.inference.plan import NativePlan
from effnet_fast.inference.recording import Unplannable
from effnet_fast.interop import accelerate
from effnet_fast.ops.conv.reference import normalised
from effnet_fast.weights.preprocessing import Preprocessing

PLANS = 16  # that a copy keeps: image shapes and layouts, the least recently used goes first
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, *, preprocessing: Preprocessing | None = None
) -> InferenceModel:
    """A frozen copy of ``model`` in evaluation mode, with the same call, for serving.

    model          an EfficientNet of ours, or one of timm, torchvision or efficientnet_pytorch that :func:`effnet_fast.accelerate`
                   takes
    dtype          what it computes in, float32, bfloat16 or float16: by default the model's own
    preprocessing  its mean and std normalise uint8 images: by default the model's own where it carries them (ours, timm's), else
                   ImageNet's

    On the CPU one native call runs the whole network, with its norms folded and its weights packed: an image a thread, or an image
    for all threads where there are fewer. It is planned anew for each shape and layout of an image, at the first call with it. On
    CUDA the copy's blocks run fused, as those of an accelerated model do. What comes later to the model does not change the copy. A
    hook that the model has is called where the copy is planned, and not again.

    Raises TypeError or ValueError, naming the argument, for what cannot be copied so.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_for_inference: model is a {type(model).__name__}; a torch.nn.Module would do")
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtype is None and len(dtypes) != 1:
        raise ValueError(
            f"optimize_for_inference: dtype is None and the model's are {sorted(map(str, dtypes))}; naming one would do"
        )
    dtype = dtype or dtypes.pop()
    if dtype not in DTYPES:
        raise ValueError(f"optimize_for_inference: dtype is {dtype}; one of {', '.join(map(str, DTYPES))} would do")
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise TypeError(f"optimize_for_inference: preprocessing is a {type(preprocessing).__name__}; a Preprocessing would do")
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    if callable(set_swish := getattr(frozen, "set_swish", None)):
        set_swish(memory_efficient=False)  # efficientnet_pytorch's other form is two operators, to keep less for backward
    accelerate(frozen)
    for module in frozen.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)  # norms stay as they are: every kernel folds them in float32
    return InferenceModel(frozen, dtype, scale_and_shift(frozen, preprocessing))


class InferenceModel(nn.Module):
    """What :func:`optimize_for_inference` gives, in ``dtype``.

    It takes normalised images [N, C, H, W] of any floating type, or uint8 ones, [N, C, H, W] or [N, H, W, C], told apart by which
    has the network's channels (both: the former). The network's first convolution normalises those as it reads them.

    Any number of threads may call it at the same time.
    """

    pixels: Tensor

    def __init__(self, frozen: nn.Module, dtype: torch.dtype, pixels: Tensor) -> None:
        super().__init__()
        self.frozen, self.dtype = frozen, dtype
        self.register_buffer("pixels", pixels, persistent=False)
        self._plans: OrderedDict[tuple, NativePlan | str] = OrderedDict()
        self._lock = threading.Lock()
        super().train(False)

    def train(self, mode: bool = True) -> InferenceModel:
        if mode:
            raise RuntimeError("InferenceModel: it is frozen and cannot train; the model that it was made from would do")
        return self

    def forward(self, x: Tensor) -> Any:
        x = image_batch(x, self.pixels.shape[1])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # the dtype is the copy's, whoever calls it
            x = x if x.dtype == torch.uint8 else x.to(self.dtype)
            if x.device.type != "cpu" or len(x) == 0:
                return self._block_by_block(x)
            if not x.is_contiguous(memory_format=torch.channels_last):
                x = x.contiguous()
            plan = self._plan(x)
            return self._block_by_block(x) if isinstance(plan, str) else plan(x)

    def _block_by_block(self, x: Tensor) -> Any:
        return self.frozen(normalised(x, self.pixels, self.dtype) if x.dtype == torch.uint8 else x)

    def _plan(self, x: Tensor) -> NativePlan | str:
        """The plan for such images, made now if need be, or why there is none."""
        key = x.dtype, x.shape[1:], x.stride()[1:]
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
            image = x[:1].clone(memory_format=torch.preserve_format)
            try:
                plan: NativePlan | str = NativePlan(self.frozen, image, self.pixels, self.dtype)
            except Unplannable as reason:
                plan = str(reason)
            self._plans[key] = plan
            while len(self._plans) > PLANS:
                self._plans.popitem(last=False)
            return plan

    def __str__(self) -> str:
        lines = [f"{type(self.frozen).__name__} for inference in {self.dtype}, {len(self._plans)} plans"]
        for (dtype, shape, _), plan in self._plans.items():
            told = f"run block by block: {plan}" if isinstance(plan, str) else str(plan)
            lines.append(f"  {'x'.join(map(str, shape))} of {dtype}: {told}")
        return "\n".join(lines)

    __repr__ = __str__
