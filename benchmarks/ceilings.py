"""A GPU's ceilings, measured: copy bandwidth, matrix rate, instruction rates a clock, and cuDNN's depthwise 5x5 both ways.

    python -m benchmarks.ceilings --out ceilings.json

The instruction rates come from benchmarks/ceilings.cu, which nvcc compiles for the GPU at hand.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from effnet_fast.benchmark import machine
from effnet_fast.benchmark.results import write
from effnet_fast.benchmark.timing import EventTimer, GraphTimer, Summary, copies, summarize
from effnet_fast.cli.table import table

SOURCE = Path(__file__).with_suffix(".cu")
RATES = (
    "mma m16n8k8 bf16",
    "mma m16n8k16 bf16",
    "fma",
    "fma, 5x5 taps",
    "ex2",
    "rcp",
    "tanh",
    "ex2 bf16x2",
    "tanh bf16x2",
    "ex2 f16x2",
    "tanh f16x2",
)
MMA_MACS = {RATES[0]: 16 * 8 * 8, RATES[1]: 16 * 8 * 16}  # a warp
# channels and side of the 5x5, stride-1 depthwise convolutions of B0 and B5
DEPTHWISE = [(240, 28), (480, 14), (672, 14), (1152, 7), (384, 57), (768, 29), (1056, 29), (1824, 15)]
BATCH = 128
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args(arguments).out
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    results: Row = {"suite": "ceilings", "device": "cuda", "machine": machine.facts(), "rows": [], "failed": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    for part in (bandwidth, matrix, instructions, depthwise):
        try:
            results["rows"] += part()
        except Exception as error:
            traceback.print_exc()
            results["failed"].append({"part": part.__name__, "reason": f"{type(error).__name__}: {str(error)[:400]}"})
        write(results, out)
    print(summary(results))
    return 0


def summary(results: Row) -> str:
    rows = [(row["name"], f"{row['value']:.4g}", row["unit"], row.get("note", "")) for row in results["rows"]]
    lost = [f"{lost['part']} failed: {lost['reason']}" for lost in results["failed"]]
    return "\n".join([table(("ceiling", "value", "unit", ""), rows, "lrll"), *lost])


def bandwidth() -> list[Row]:
    """Bytes read and written by a copy of 2 GiB."""
    source = torch.ones(1 << 29, device="cuda")
    target = torch.zeros_like(source)
    times = _times(lambda i: target.copy_(source), 2, graph=False)
    return [_row("copy", 2 * source.nbytes / times.median / 1e12, "TB/s", times)]


def matrix() -> list[Row]:
    rows = []
    for side in (4096, 8192):
        a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        times = _times(lambda i, a=a, b=b: a @ b, 2, graph=False)
        rows.append(_row(f"matrix product bf16 {side}", 2 * side**3 / times.median / 1e12, "TFLOP/s", times))
    return rows


def instructions() -> list[Row]:
    """Results a clock and multiprocessor (multiply-adds of an mma), from the clocks that the blocks' loops took."""
    properties = torch.cuda.get_device_properties(0)
    blocks, iterations = properties.multi_processor_count, 2000
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "ceilings.so")
        command = ["nvcc", "-O3", "-std=c++20", f"-arch=sm_{properties.major}{properties.minor}", "-shared", "-Xcompiler", "-fPIC"]
        subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library))
    run.run_rate.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 3
    clocks = torch.zeros(blocks, dtype=torch.int64, device="cuda")
    sink = torch.zeros(1024, device="cuda")
    rows = []
    for rate, name in enumerate(RATES):
        if name.endswith("x2") and properties.major < 9:
            continue
        spent = []
        for _ in range(7):
            error = run.run_rate(
                rate, iterations, blocks, clocks.data_ptr(), sink.data_ptr(), torch.cuda.current_stream().cuda_stream
            )
            if error:
                raise RuntimeError(f"{name}: CUDA error {error}")
            spent.append(clocks.median().item())
        issued = iterations * run.instructions(rate)
        each = MMA_MACS.get(name, 32 * (2 if name.endswith("x2") else 1))
        unit = "multiply-adds/clock/SM" if name in MMA_MACS else "values/clock/SM"
        spent = sorted(spent[2:])
        rows.append({"name": name, "value": issued * 32 * each / spent[len(spent) // 2], "unit": unit, "clocks": spent})
    return rows


def depthwise() -> list[Row]:
    """What PyTorch's own 5x5 takes, NHWC bf16; the bytes are those of two tensors, x and y or x and g."""
    rows = []
    cache = machine.last_level_cache("cuda")
    for channels, side in DEPTHWISE:
        shape = (BATCH, channels, side, side)
        weight = torch.randn(channels, 1, 5, 5, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        moved = 2 * 2 * math.prod(shape)  # a set's too: a graph's results stay alive
        count = copies(moved, cache)
        x, g = ([_images(shape) for _ in range(count)] for _ in range(2))

        def forward(i: int, x: list = x, weight: torch.Tensor = weight) -> torch.Tensor:
            return F.conv2d(x[i], weight, padding=2, groups=weight.shape[0])

        def weight_gradient(i: int, x: list = x, g: list = g, weight: torch.Tensor = weight) -> torch.Tensor:
            return torch.ops.aten.convolution_backward(
                g[i], x[i], weight, None, [1, 1], [2, 2], [1, 1], False, [0, 0], weight.shape[0], [False, True, False]
            )[1]

        for name, call in (("forward", forward), ("weight gradient", weight_gradient)):
            times = _times(call, count)
            row = _row(f"depthwise 5x5 {name} c{channels} {side}x{side}", times.median * 1e6, "us", times)
            rows.append({**row, "gb_s": moved / times.median / 1e9, "note": f"{moved / times.median / 1e12:.2f} TB/s"})
    return rows


def _images(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def _times(call: Callable[[int], Any], sets: int, graph: bool = True) -> Summary:
    timer = GraphTimer(call, sets) if graph else EventTimer(call, sets)
    return summarize([timer.burst(0.1), timer.burst(0.1)])


def _row(name: str, value: float, unit: str, times: Summary) -> Row:
    passes, quartiles = ([seconds * 1e6 for seconds in kind] for kind in (times.passes, times.quartiles))
    return {"name": name, "value": value, "unit": unit, "passes_us": passes, "quartiles_us": quartiles}


if __name__ == "__main__":
    sys.exit(main())
