"""What nvcc made of the kernels: resources from ptxas's report, and the hot loop of each kernel from its SASS."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import NamedTuple

USEFUL = {"HMMA", "FFMA", "FMUL", "FADD", "MUFU", "LDG", "STG", "LDGSTS", "LDS", "LDSM", "STS", "STSM"}


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


class Instruction(NamedTuple):
    at: int
    base: str  # without its suffixes
    guarded: bool
    target: int | None  # of a branch that all lanes take together


def read_sass(cubin: Path, tool: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel."""
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            code = kernels[name[1]] = []
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Z0-9_.]*)(.*?);", line):
            operation, to = found[3], re.search(r"0x([0-9a-f]+)$", found[4].strip())
            jumps = operation.startswith("BRA") and "DIV" not in operation and to
            code.append(Instruction(int(found[1], 16), operation.split(".")[0], bool(found[2]), int(to[1], 16) if jumps else None))
    return kernels


def hot_loop(code: list[Instruction]) -> Counter[str]:
    """Instructions of one pass of the loop with most arithmetic, along the path that does most work: by name."""
    loops = []
    for end in code:
        if end.target is not None and end.target <= end.at:
            body = [i for i in code if end.target <= i.at <= end.at]
            loops.append((sum(i.base in ("HMMA", "FFMA") for i in body), -len(body), body))
    return Counter(i.base for i in _busiest(max(loops)[2]))


def _busiest(code: list[Instruction]) -> list[Instruction]:
    """Of the paths through code with forward branches, the one with most useful and then fewest other instructions."""
    index = {i.at: n for n, i in enumerate(code)}
    best, choice = [0] * (len(code) + 1), [0] * (len(code) + 1)
    for n in reversed(range(len(code))):
        i = code[n]
        options = [] if i.base in ("BRA", "EXIT") and not i.guarded else [n + 1]
        if i.target is not None and i.target > i.at:
            options.append(index.get(i.target, len(code)))
        choice[n] = max(options or [len(code)], key=best.__getitem__)
        best[n] = best[choice[n]] + (1000 if i.base in USEFUL else -1)
    path, n = [], 0
    while n < len(code):
        path.append(code[n])
        n = choice[n]
    return path
