"""Compiles launches of the Triton kernels for GPUs that need not be here, and reports what each takes; run as a process of its own.

python tests/triton_ahead.py 80|90|100 all|covering [PART PARTS]

The launches are those that the ops would make for every layer of B0 to B7 at batch 1, 16, 128 and 256: the ops' own launch
functions run on meta tensors, with the launch itself recorded. ``covering`` takes each configuration of a kernel once
in fp32, tf32, bf16 and with mixed types, in its fullest form. PART 0 or 1 of 2 is a half, with launches of every kernel. To stdout
goes one JSON object a kernel (its name, constants, registers, bytes of shared memory, and bytes of stack, where registers spill
to), and one that counts them last.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effnet_fast.models import FAMILY
from effnet_fast.ops.conv import triton as conv
from effnet_fast.ops.depthwise import triton as depthwise
from effnet_fast.ops.depthwise import triton_pieces
from effnet_fast.ops.pointwise import triton as pointwise
from effnet_fast.ops.squeeze_excite import triton as squeeze_excite
from effnet_fast.ops.training import triton as passes
from effnet_fast.ops.training import triton_squeeze_excite as gate_s_backward
from effnet_fast.ops.training import triton_statistics as statistics
from effnet_fast.ops.training import triton_vectors as of_norms

PROCESSORS = {80: 108, 90: 132, 100: 148}
# x, weights, norms: a model in one dtype, or autocast over float32 weights; float32 with and without TF32.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "autocast-bfloat16": (torch.bfloat16, torch.float32),
    "autocast-float16": (torch.float16, torch.float32),
}
TYPES = {torch.uint8: "*u8", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
Launch = tuple[Any, tuple[tuple[str, str], ...], tuple[tuple[str, Any], ...], int, int, int | None]


def launches(models: list[str], batch: int, dtype: str, sms: int) -> Iterator[Launch]:
    """Every launch of the models' forward passes and of a training step: kernel, signature, constants, warps, stages, registers."""
    recorded: list[Launch] = []

    def record(kernel: Any, programs: int, *args: Any, num_warps: int, **constants: Any) -> None:
        num_stages, maxnreg = constants.pop("num_stages", 1), constants.pop("maxnreg", None)
        assert 0 < programs < 2**31
        signature = []
        for name, value in zip(kernel.arg_names, args, strict=False):
            if isinstance(value, torch.Tensor):
                signature.append((name, TYPES[value.dtype]))
            elif value is None:
                constants[name] = None
            else:
                signature.append((name, "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"))
        recorded.append((kernel, tuple(signature), tuple(sorted(constants.items())), num_warps, num_stages, maxnreg))

    for module in (conv, depthwise, pointwise, squeeze_excite, passes, statistics, of_norms, gate_s_backward):
        module.run = record  # type: ignore[attr-defined]
    for module in (pointwise, squeeze_excite, passes, statistics, gate_s_backward):
        module.processors = lambda device: sms  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    x_dtype, weight_dtype = DTYPES[dtype]

    def image(channels: int, size: int) -> torch.Tensor:
        shape = batch, channels, size, size
        return torch.empty(shape, dtype=x_dtype, device="meta").contiguous(memory_format=torch.channels_last)

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=weight_dtype, device="meta")

    def norm(channels: int) -> tuple[Any, ...]:
        return (*(weight(channels) for _ in range(4)), 1e-3)

    def point(channels: int, outputs: int, size: int, gated: bool, residual: bool, activation: str) -> None:
        gate = torch.empty(batch, channels, device="meta") if gated else None
        shortcut = image(outputs, size) if residual else None
        arguments = image(channels, size), weight(outputs, channels, 1, 1), *norm(outputs), gate, shortcut, activation
        pointwise.launch(*arguments, y=image(outputs, size))

    def vectors(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    def normed(channels: int, size: int, activation: str) -> None:
        """What training does with a convolution's result, all of it."""
        y, n, each = image(channels, size), vectors(3, channels), vectors(batch, channels)
        statistics.batch_stats(y, mean=n[0], var=n[1])
        passes.norm_act(y, n, activation, each, y, out=y)
        passes.norm_act_mean(y, n, activation, mean=each)
        passes.norm_act_sums(y, y, n, activation, each, sums=vectors(2, channels))
        passes.norm_act_image_sums(y, y, n, activation, sums=vectors(batch, 5, channels))
        passes.norm_act_backward(y, y, n, activation, y, grad_x=y, sums=vectors(2, channels))
        passes.norm_gradient(y, y, n, n, activation, each, each, grad_y=y)
        of_norms.norm_vectors(n[0], n[1], weight(channels), weight(channels), 1e-3, norm=n, inverse=n[0])
        for values in (batch * size * size, None):
            of_norms.norm_coefficients(vectors(2, channels), n, n[0], values, coefficients=n, grad_weight=n[0])

    for model in models:
        config = FAMILY[model]
        size = (config.resolution + 1) // 2
        x = image(3, config.resolution)
        stem = config.stem_channels
        pixels, decoded = torch.empty(2, 3, device="meta"), x.to(torch.uint8)
        arguments = weight(stem, 3, 3, 3), *norm(stem), None, 2, [1, 1, 1, 1], "silu"
        conv.launch(x, *arguments, None, y=image(stem, size))
        conv.launch(decoded, *arguments, pixels, y=image(stem, size).to(weight_dtype))
        for block in config.blocks():
            wide, half = block.expanded_channels, block.kernel_size // 2
            if block.expands:
                normed(wide, size, "silu")
                point(block.in_channels, wide, size, False, False, "silu")
            out = (size + block.stride - 1) // block.stride
            pieces = triton_pieces(image(wide, size), out, out)
            partial = torch.empty(batch, pieces, wide, device="meta")
            taps = weight(wide, 1, block.kernel_size, block.kernel_size)
            arguments = image(wide, size), taps, *norm(wide), block.stride, [half] * 4, "silu", pieces
            depthwise.launch(*arguments, y=image(wide, out), partial=partial)
            size, squeezed = out, block.se_channels
            weights = weight(squeezed, wide, 1, 1), weight(squeezed), weight(wide, squeezed, 1, 1), weight(wide)
            squeeze_excite.launch(partial, size * size, *weights, "silu", gate=torch.empty(batch, wide, device="meta"))
            of_gate = vectors(batch, 5, wide), vectors(batch, wide), vectors(batch, wide), *weights[:3], "silu", size * size
            gradients = ("reduce", vectors(squeezed, wide)), ("expand", vectors(wide, squeezed))
            biases = {"grad_reduce_bias": vectors(squeezed), "grad_expand_bias": vectors(wide)}
            made = {"pool": vectors(batch, wide), "norm_sums": vectors(2, wide)} | biases
            made |= {f"grad_{name}_weight": tensor for name, tensor in gradients}
            gate_s_backward.squeeze_excite_backward(*of_gate, **made)
            point(wide, block.out_channels, size, True, block.residual, "identity")
            normed(wide, size, "silu")
            normed(block.out_channels, size, "identity")
        point(block.out_channels, config.head_channels, size, False, False, "silu")
    yield from recorded


def name_of(kernel: Any) -> str:
    path = Path(kernel.fn.__code__.co_filename)
    return f"{path.parent.name}.{path.stem.removeprefix('triton').removeprefix('_')}{kernel.fn.__name__}"


def compile_ahead(launch: Launch, arch: int) -> dict[str, Any]:
    """The launch's kernel for ``sm_<arch>``, and what ``cuobjdump -res-usage`` says of it."""
    kernel, signature, constants, num_warps, num_stages, maxnreg = launch
    types = dict.fromkeys(kernel.arg_names, "constexpr") | dict(signature)
    positions = {name: position for position, name in enumerate(kernel.arg_names)}
    # torch allocates at multiples of 16 bytes, and a launch on others compiles a kernel of its own.
    aligned = {(positions[name],): [["tt.divisibility", 16]] for name, kind in signature if kind.startswith("*")}
    source = ASTSource(kernel, types, {(positions[name],): value for name, value in constants}, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage.stdout)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    return {
        "kernel": name_of(kernel),
        "types": ",".join(dict.fromkeys(kind for _, kind in signature)),
        "constants": {name: value for name, value in constants if value is not None},
        "absent": [name for name, value in constants if value is None],
        "num_warps": num_warps,
        "num_stages": num_stages,
        "arch": arch,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
    }


def covering(found: dict[Launch, None]) -> list[Launch]:
    """Of the launches that differ in alignment, residual, activation or bias alone, the one with most tensors; fp16 is as bf16."""
    fullest: dict[Any, Launch] = {}
    for launch in found:
        kernel, signature, constants, *shape = launch
        if "*fp16" in dict(signature).values():
            continue
        key = (
            kernel,
            dict(signature).get("x", dict(signature)[kernel.arg_names[0]]),
            tuple(kind for name, kind in signature if name in ("weight", "reduce", "reduce_weight")),
            tuple(
                (name, value)
                for name, value in constants
                if isinstance(value, (int, str)) and not name.startswith(("ALIGN", "ACTIV"))
            ),
            *shape,
        )
        if key not in fullest or len(signature) > len(fullest[key][1]):
            fullest[key] = launch
    return list(fullest.values())


def main(arch: int, which: str, part: int = 0, parts: int = 1) -> None:
    start = time.monotonic()
    found: dict[Launch, None] = {}
    models = [f"efficientnet_b{number}" for number in range(8)]
    for dtype in DTYPES:
        for batch in (1, 16, 128, 256):
            found.update(dict.fromkeys(launches(models, batch, dtype, PROCESSORS[arch])))
    chosen = sorted(found if which == "all" else covering(found), key=lambda launch: name_of(launch[0]))[part::parts]
    for launch in chosen:
        print(json.dumps(compile_ahead(launch, arch)), flush=True)
    print(json.dumps({"compiled": len(chosen), "of": len(found), "seconds": round(time.monotonic() - start)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
