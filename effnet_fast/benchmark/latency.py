"""How long a scaled net takes on this machine, as :func:`effnet_fast.scaling.search` asks: the fused model, measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from effnet_fast.benchmark.case import DTYPES
from effnet_fast.benchmark.timing import EventTimer, HostTimer
from effnet_fast.inference import optimize_for_inference
from effnet_fast.models import build
from effnet_fast.scaling import Cost, ScaledNet
from effnet_fast.scaling.config import is_real, is_whole


@dataclass(frozen=True)
class Latency:
    """``latency(net)`` builds the net with random weights and its copy for serving: the median milliseconds of that copy's calls.

    batch    images at a time, of the net's own resolution
    dtype    "fp32", "bf16" or "fp16"
    device   "cpu", with torch's threads, or "cuda"
    seconds  of calls, at least three, after a first one

    Raises ValueError for none of these, and for a net that memory does not hold at that batch.
    """

    batch: int = 1
    dtype: str = "fp32"
    device: str = "cpu"
    seconds: float = 0.5

    def __post_init__(self) -> None:
        for name, good, would_do in (
            ("batch", is_whole(self.batch), "a whole number of images >= 1"),
            ("dtype", isinstance(self.dtype, str) and self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            ("device", self.device in ("cpu", "cuda"), "'cpu' or 'cuda'"),
            ("seconds", is_real(self.seconds) and self.seconds > 0, "a number > 0"),
        ):
            if not good:
                raise ValueError(f"Latency: {name} is {getattr(self, name)!r}; {would_do} would do")

    def __call__(self, net: ScaledNet) -> float:
        try:
            return self._measured(net)
        except (
            MemoryError,
            RuntimeError,
            TypeError,
        ) as error:  # torch has no class for the CPU's memory, or for what no index counts
            if not any(word in str(error).lower() for word in ("memory", "overflow")):
                raise
            needed = Cost.of(net.config).inference_memory(self.dtype, self.batch).total
            raise ValueError(
                f"Latency: batch is {self.batch}; {net.config.name} takes about {needed:,} bytes of memory, more than is here; "
                "a smaller batch, or a smaller net, would do"
            ) from error

    def _measured(self, net: ScaledNet) -> float:
        dtype = DTYPES[self.dtype]
        with torch.no_grad():
            serving = optimize_for_inference(build(net.config).eval().to(self.device, dtype))
            size = net.config.resolution
            x = torch.randn(self.batch, net.config.in_channels, size, size).to(self.device, dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            timer = (EventTimer if self.device == "cuda" else HostTimer)(lambda _: serving(x), 1)
            return 1e3 * statistics.median(timer.burst(self.seconds))
