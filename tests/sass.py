"""What nvcc made of the kernels: resources from ptxas's report, and from the SASS the hot loop of each kernel and the counts that
the model of its time rests on.

    python tests/sass.py        writes those counts to benchmarks/instructions.json (nvcc, cuobjdump)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COUNTS = ROOT / "benchmarks" / "instructions.json"
COUNTED_ARCH = 90
USEFUL = {"HMMA", "FFMA", "FMUL", "FADD", "MUFU", "LDG", "STG", "LD", "LDGSTS", "LDS", "LDSM", "STS", "STSM", "SHFL"}
FP32 = {"FFMA", "FMUL", "FADD"}
SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "I2I"}
# At half rate: integers, moves, comparisons, conversions.
HALF = frozenset(
    "IMAD IADD3 VIADD LOP3 SHF LEA ISETP SEL MOV CS2R IABS IMNMX VIMNMX PLOP3 LDC S2R R2P PRMT F2FP HADD2 FMNMX FSETP FSEL".split()  # noqa: SIM905
)


def cuobjdump() -> str | None:
    """$CUOBJDUMP, or the one on PATH or in an installed triton; None if there is none."""
    triton = util.find_spec("triton")
    inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton and triton.origin else None
    return os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)


@dataclass(frozen=True)
class Resources:
    """What a thread of one kernel takes: registers, bytes of stack and of spills."""

    registers: int
    stack: int
    spilled: int


def compile_kernels(source: Path, arch: int, cubin: Path) -> dict[str, Resources]:
    """Compiles a .cu file; returns each kernel's resources by its mangled name."""
    command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(source), "-o", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(
        r"Compiling entry function '(\S+)'.*\n.*\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores.*\n.*Used (\d+) registers",
        report,
    )
    assert len(found) == report.count("Compiling entry function"), report
    return {name: Resources(int(registers), int(stack), int(spilled)) for name, stack, spilled, registers in found}


def installed_kernels(arch: int, directory: Path) -> dict[str, tuple[Path, dict[str, Resources]]]:
    """Of each .cu file the cubin in the installed module, taken out into ``directory``, and its kernels' resources, of which what
    spills is part of the stack; nothing where the module has none for ``arch`` or is older than a source."""
    module = ROOT / "effnet_fast" / "_C.abi3.so"
    changed = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".cu", ".cuh", ".h"))
    if cuobjdump() is None or not module.exists() or module.stat().st_mtime < changed:
        return {}
    tool, found = str(cuobjdump()), {}
    subprocess.run([tool, "-xelf", "all", str(module)], capture_output=True, cwd=directory)
    for cubin in sorted(directory.glob(f"*.sm_{arch}.cubin")):
        told = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
        kernels = {
            name: Resources(int(registers), int(stack), 0)
            for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", told)
        }
        # A .cu file is named as the namespace of its kernels, or, where they are another's with parts of its own, by these.
        name = min(kernels)
        folder = re.search(r"NS_\d+([a-z_]+?)\d+Expander", name) or re.match(r"_ZN11effnet_fast\d+([a-z_]+?)\d", name)
        own = {kind: any(f"Pointwise{kind.title()}" in kernel for kernel in kernels) for kind in ("stats", "backward")}
        file = next((f"pointwise_{kind}" for kind, has in own.items() if has), folder[1])  # type: ignore[index]
        found[f"{file}.cu"] = (cubin, kernels)
    return found


class Instruction(NamedTuple):
    at: int
    operation: str  # with its suffixes
    guarded: bool
    target: int | None  # of a branch that all lanes take together

    @property
    def base(self) -> str:
        return self.operation.split(".")[0]

    @property
    def bytes(self) -> int:
        """Of a warp's access to memory."""
        width = re.search(r"\.U?(8|16|64|128)(\.|$)", self.operation)
        return 32 * (16 if self.base in ("LDSM", "STSM") else int(width[1]) // 8 if width else 4)


def read_sass(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each kernel."""
    text = subprocess.run([str(cuobjdump()), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            code = kernels[name[1]] = []
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Z0-9_.]*)(.*?);", line):
            operation, to = found[3], re.search(r"0x([0-9a-f]+)$", found[4].strip())
            jumps = operation.startswith("BRA") and "DIV" not in operation and to
            never = found[2] == "@!PT"  # padding that the assembler puts before LDGSTS
            operation = "NOP" if never else operation
            code.append(Instruction(int(found[1], 16), operation, bool(found[2]), int(to[1], 16) if jumps else None))
    return kernels


def hot_loop(code: list[Instruction]) -> Counter[str]:
    """Instructions of one pass of the loop with most arithmetic, along the path that does most work: by name."""
    return Counter(i.base for i in _busiest(_loop(code)))


def _loops(code: list[Instruction]) -> list[list[Instruction]]:
    return [[i for i in code if end.target <= i.at <= end.at] for end in code if end.target is not None and end.target <= end.at]


def _loop(code: list[Instruction]) -> list[Instruction]:
    """The loop with most arithmetic; of those with the same, the innermost."""
    return max((sum(i.base in ("HMMA", "FFMA") for i in body), -len(body), body) for body in _loops(code))[2]


def _busiest(code: list[Instruction]) -> list[Instruction]:
    """Of the paths through code with forward branches, the one with most useful and then fewest other instructions. What has been
    taken out of the code, such as its loops, is passed over."""
    addresses = [i.at for i in code]
    best, choice = [0] * (len(code) + 1), [0] * (len(code) + 1)
    for n in reversed(range(len(code))):
        i = code[n]
        leaves = i.base in ("BRA", "EXIT") and not i.guarded and "DIV" not in i.operation  # which goes where lanes have parted
        options = [] if leaves else [n + 1]
        if i.target is not None and i.target > i.at:
            options.append(bisect_left(addresses, i.target))
        choice[n] = max(options or [len(code)], key=best.__getitem__)
        best[n] = best[choice[n]] + (1000 if i.base in USEFUL else -1)
    path, n = [], 0
    while n < len(code):
        path.append(code[n])
        n = choice[n]
    return path


def tally(path: Iterable[Instruction]) -> dict[str, int]:
    """By what they keep busy; effnet_fast/benchmark/kernel_time.py says what each number is. Zeros are left out."""
    counts: Counter[str] = Counter()
    for i in path:
        counts["issue"] += 1
        if i.base == "HMMA":
            counts["k16" if "16816" in i.operation else "k8"] += 1
        elif i.base in FP32:
            counts["fp32"] += 1
        elif i.base in SPECIAL:
            counts["special"] += 1
        elif i.base in HALF:
            counts["half"] += 1
        elif i.base == "LDGSTS":
            counts["copies"] += 1
        elif i.base in ("LDS", "LDSM", "STS", "STSM", "LD", "SHFL"):  # LD reads the shared memory of a cluster
            counts["shared"] += -(-i.bytes // 128)
        elif i.base == "STG" and i.bytes == 512:
            counts["stores"] += 1
        elif i.base in ("LDG", "STG"):
            counts["lines"] += -(-i.bytes // 128)
    return dict(counts)


def depthwise_instance(name: str) -> tuple[str, list[int], str, bool]:
    """Of a depthwise kernel's mangled name: "tensor" or "direct", its numbers from k and stride on, its type, and whether SiLU is
    compiled in."""
    found = re.search(
        r"(tensor|direct)_kernelI.*?TraitsI(?:f|\w*?(?P<half>bf16|fp16)E)(?P<numbers>(?:Li\d+E)+)(?P<silu>Lb1E)?", name
    )
    assert found, name
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", found["numbers"])]
    return found[1], numbers, found["half"] or "fp32", found["silu"] is not None


def depthwise_parts(code: list[Instruction], tensor: bool, live: int, taps: int, outputs: int) -> dict[str, dict[str, int]]:
    """A depthwise kernel's counts: "once" a block; "weight", one element of the weights put down by a thread (direct_kernel);
    "rows", the input rows of one pass of the main loop that lie in the image; "finish", the output rows of one pass, ``live`` of
    them, ``outputs`` a lane; "pass", the rest of a pass. Staging is counted by the row, wherever it stands."""
    main = _loop(code)
    first, last = main[0].at, main[-1].at
    inner = [body for body in _loops([i for i in code if i.at < first]) if any(i.base == "STS" for i in body)]
    in_loops = {i.at for body in inner for i in body}
    before = [i for i in code if i.at < first and i.at not in in_loops and i.base != "LDGSTS"]
    after = _busiest([i for i in code if i.at > last])
    if tensor:  # the last rows come out after the loop, but are counted by the row as all
        after = [i for i in after if i.base != "LDS" and not (i.base == "STG" and i.bytes == 512)]
    once = [*_busiest(before), *after]
    path = _busiest(main)
    if tensor:
        sums = [i for i in path if i.base == "HMMA" and "16816" not in i.operation][: 2 * live]
        rows = [i for i in path if i.base in ("HMMA", "LDSM", "LDGSTS") and i not in sums]
        finish = [*sums, *(i for i in path if i.base in {*FP32, "MUFU", "F2FP", "PRMT", "STSM", "LDS", "STG"})]
    else:
        products = [i for i in path if i.base in ("FFMA", "FMUL")][: taps * outputs]
        rows = [*products, *(i for i in path if i.base == "LDG")]
        finish = [i for i in path if i not in products and i.base in {*FP32, "MUFU", "STG"}]
    counted = {i.at for i in [*rows, *finish]}
    parts = {"once": once, "rows": rows, "finish": finish, "pass": [i for i in path if i.at not in counted]}
    counts = {name: tally(part) for name, part in parts.items()}
    if inner:  # the unrolled loop
        body = max(inner, key=len)
        stored = sum(i.base == "STS" for i in body)
        counts["weight"] = {name: -(-number // stored) for name, number in tally(_busiest(body)).items()}
    return counts


def stem_parts(code: list[Instruction]) -> dict[str, Counter[str]]:
    """The stem kernel's instructions by name: "pixels", 16 pixels of all channels; "packed" and "planes", 3 rows of a thread's two
    input columns, channels_last or NCHW."""
    loops = _loops(code)
    pixels = min((body for body in loops if any(i.base == "HMMA" for i in body)), key=len)
    inner = {i.at for body in loops if body is not pixels and _holds(pixels, body) for i in body}
    columns = (body for body in loops if sum(i.base == "LDG" for i in body) == 18 and not any(i.base == "I2F" for i in body))
    packed, planes = sorted(columns, key=len)[:2]
    parts = {"pixels": [i for i in pixels if i.at not in inner], "packed": packed, "planes": planes}
    return {name: Counter(i.base for i in _busiest(part) if i.base != "NOP") for name, part in parts.items()}


def gate_parts(code: list[Instruction], rows: int, wide: str, narrow: str) -> dict[str, dict[str, int]]:
    """The gate kernel's counts. Of a fully connected layer, in the reduce layer's code: "vectors", 4 elements of ``rows`` rows a
    lane, "scalars", the same where rows are not aligned, and "row", the rest of a group of rows. Of the squeeze: "piece", 4
    channels of a partial sum, and "mean", a channel. "once", the rest of the kernel. Weights are loaded by ``wide`` or
    ``narrow``."""
    loops = _loops(code)
    innermost = [body for body in loops if not any(other is not body and _holds(body, other) for other in loops)]

    def first(*wanted: str, lacks: str = "") -> list[Instruction]:
        """Loop that has all these operations; of the others, none in ``lacks``."""
        for body in sorted(innermost, key=lambda body: body[0].at):
            of = {i.operation for i in body} | {i.base for i in body}
            if of.issuperset(wanted) and not of.intersection(lacks.split()):
                return body
        raise AssertionError(f"there is no loop of {wanted}")

    def per(body: list[Instruction], base: str, each: int = 1) -> dict[str, int]:
        times = sum(i.base == base for i in body) // each
        return {name: -(-number // times) for name, number in tally(_busiest(body)).items()}

    vectors, scalars = first(wide, "FFMA"), first(narrow, "FFMA")
    piece, mean = first("LDG.E.128", "FADD", lacks="FFMA"), first("LDS", "STS", "CALL", lacks="LDG")
    unaligned = first("LDG.E", "FADD", lacks="FFMA LDG.E.128")  # pieces, of no EfficientNet
    row = min((body for body in loops if _holds(body, vectors) and _holds(body, scalars)), key=len)
    inside = {i.at for body in (vectors, scalars) for i in body}
    counted = inside | {i.at for body in (row, piece, unaligned, mean) for i in body}
    rest = [i for i in row if i.at not in inside and i.base not in ("LD", "FFMA")]
    return {
        "vectors": per(vectors, "LD", rows),
        "scalars": per(scalars, "LD", 4 * rows),
        "row": tally(_busiest(rest)),
        "piece": per(piece, "LDG"),
        "mean": per(mean, "STS"),
        "once": tally(_busiest([i for i in code if i.at not in counted])),
    }


def _holds(outer: list[Instruction], inner: list[Instruction]) -> bool:
    return outer[0].at <= inner[0].at and inner[-1].at <= outer[-1].at


def model_counts(cubins: dict[str, Path], resources: dict[str, Resources]) -> dict[str, Any]:
    """What benchmarks/instructions.json holds, from the cubins of depthwise.cu and squeeze_excite.cu for COUNTED_ARCH."""
    counted: dict[str, Any] = {}
    for name, code in read_sass(cubins["depthwise.cu"]).items():
        kind, (k, s, *tile), dtype, silu = depthwise_instance(name)
        tensor = kind == "tensor"
        # Those that EfficientNets run: SiLU, and two channels a thread.
        if (tensor and not silu) or dtype == "fp16" or (not tensor and (dtype, tile) != ("fp32", [2])):
            continue
        live = -(-k // s)
        columns, width = (tile[0], 16 * tile[1]) if tensor else (4, tile[0])
        parts = depthwise_parts(code, tensor, live, k * k, live * columns * width)
        counted[f"{kind} k{k} s{s} {columns}x{width}"] = {"registers": resources[name].registers, **parts}
    for name, code in read_sass(cubins["squeeze_excite.cu"]).items():
        found = re.search(r"gate_kernelI(f|\w*?bf16E)Li(\d+)E", name)
        if found:
            dtype = "fp32" if found[1] == "f" else "bf16"
            rows = 1 if found[2] == "1" else 4
            parts = gate_parts(code, rows, *(("LD.E.128", "LD.E") if dtype == "fp32" else ("LD.E.64", "LD.E.U16")))
            counted[f"gate {found[2]} {dtype}"] = {"registers": resources[name].registers, **parts}
    return {"arch": COUNTED_ARCH, "nvcc": nvcc_version(), "kernels": dict(sorted(counted.items()))}


def nvcc_version() -> str:
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", told)[1]  # type: ignore[index]


def main() -> int:
    if cuobjdump() is None:
        sys.exit("sass.py: there is no cuobjdump: $CUOBJDUMP, PATH or an installed triton would do")
    with tempfile.TemporaryDirectory() as folder:
        cubins, resources = {}, {}
        for name in ("depthwise/depthwise.cu", "squeeze_excite/squeeze_excite.cu"):
            source = ROOT / "csrc" / name
            cubins[source.name] = Path(folder, source.name)
            resources |= compile_kernels(source, COUNTED_ARCH, cubins[source.name])
        counts = model_counts(cubins, resources)
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in counts.pop("kernels").items())
    COUNTS.write_text(json.dumps(counts)[:-1] + ', "kernels": {\n' + rows + "\n}}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
