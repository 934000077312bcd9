"""Builds the kernels into a Python module with ninja, for the CPU and under AddressSanitizer and UBSan; runs it in a subprocess."""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"

NINJA = """\
flags = -std=c++20 -Og -g1 -fPIC -ffp-contract=fast -Wall -Wno-unknown-pragmas -Wno-psabi -I{here}
csrc = {csrc}
rule binding
  command = g++ $flags -fvisibility=hidden -I$csrc -I{pybind} -I{python} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule kernel
  command = g++ $flags {sanitizers} $options -I$csrc -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = g++ -shared {sanitizers} -Wl,-z,lazy $in -o $out
build binding.o: binding {here}/binding.cpp
build binding_training.o: binding {here}/binding_training.cpp
build binding_chain.o: binding {here}/binding_chain.cpp
"""
BINDING = "binding.o binding_training.o binding_chain.o"
# Of the CPU's kernels, which without optimisation compile in half the time, and not inlined in a quarter of that. What is called
# must then be compiled for the vectors of its callers, which this machine must have, or be of one kind.
VECTORS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
CPU, TOLD = "-O0", Path("/proc/cpuinfo")
if platform.machine() != "x86_64":
    CPU += " -Dalways_inline=unused"
elif TOLD.exists() and set(VECTORS) <= set(TOLD.read_text().split()):
    CPU += f" -Dalways_inline=unused {' '.join(f'-m{name}' for name in VECTORS)} -mavx512bf16"
# The objects of a module: name, source, options; what takes longest first.
KERNELS = {
    "depthwise_cpu": ("depthwise_cpu.cpp", CPU),
    "depthwise_bf16": ("depthwise.cpp", "-DEMULATED_TYPE=effnet_fast::bf16"),
    "depthwise_fp16": ("depthwise.cpp", "-DEMULATED_TYPE=effnet_fast::fp16"),
    "expand_depthwise_bf16": ("expand_depthwise.cpp", "-DEMULATED_TYPE=effnet_fast::bf16"),
    "expand_depthwise_fp16": ("expand_depthwise.cpp", "-DEMULATED_TYPE=effnet_fast::fp16 -DONE_WINDOW"),
    "pointwise_bf16": ("pointwise.cpp", "-DEMULATED_TYPE=effnet_fast::bf16"),
    "pointwise_fp16": ("pointwise.cpp", "-DEMULATED_TYPE=effnet_fast::fp16 -DONE_KERNEL"),
    "training_pointwise_bf16": ("training_pointwise.cpp", "-DEMULATED_TYPE=effnet_fast::bf16"),
    "training_pointwise_fp16": ("training_pointwise.cpp", "-DEMULATED_TYPE=effnet_fast::fp16"),
    "training_pointwise_backward_bf16": ("training_pointwise_backward.cpp", "-DEMULATED_TYPE=effnet_fast::bf16"),
    "training_pointwise_backward_fp16": ("training_pointwise_backward.cpp", "-DEMULATED_TYPE=effnet_fast::fp16"),
    "chain_bf16": ("chain.cpp", "-DEMULATED_TYPE=effnet_fast::bf16"),
    "chain_fp16": ("chain.cpp", "-DEMULATED_TYPE=effnet_fast::fp16"),
    "pointwise_cpu": ("pointwise_cpu.cpp", CPU),
    "conv": ("conv.cpp", ""),
    "training_bf16": ("training_depthwise.cpp", "-DEMULATED_TYPE=effnet_fast::bf16"),
    "training_fp16": ("training_depthwise.cpp", "-DEMULATED_TYPE=effnet_fast::fp16"),
    "training_fp32": ("training_depthwise.cpp", "-DEMULATED_TYPE=float"),
    "depthwise_fp32": ("depthwise.cpp", "-DEMULATED_TYPE=float"),
    "squeeze_excite": ("squeeze_excite.cpp", ""),
    "conv_cpu": ("conv_cpu.cpp", CPU),
    "squeeze_excite_cpu": ("squeeze_excite_cpu.cpp", CPU),
    "plan_cpu": ("plan_cpu.cpp", CPU),
}


class Bug(NamedTuple):
    """A bug seeded into a copy of csrc/, or another change of it: the file, its text, what replaces the first occurrence of that,
    what must be said of it; the one object that is compiled from the copy, and further options for it."""

    path: str
    text: str
    replacement: str
    says: str
    kernel: str
    options: str = ""


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "the emulator needs g++ with its sanitizers"
    if shutil.which("ninja") is None:
        return "the emulator needs ninja"
    try:
        import pybind11  # noqa: F401
    except ModuleNotFoundError:
        return "the emulator needs pybind11"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the emulator needs Python.h"
    return None


def build(directory: Path, bugs: dict[str, Bug]) -> dict[str, Path]:
    """Compiles the kernels as they are, "sound", and with each bug; returns the modules, for :func:`run`.

    What an earlier build has left in the directory is not compiled again; one at a time may build there.
    """
    import pybind11

    python = sysconfig.get_path("include")
    text = NINJA.format(here=HERE, csrc=CSRC, pybind=pybind11.get_include(), python=python, sanitizers=SANITIZERS)
    for kernel, (source, options) in KERNELS.items():
        text += f"build {kernel}.o: kernel {HERE / source}\n  options = {options}\n"
    text += f"build sound.so: link {BINDING} {' '.join(f'{kernel}.o' for kernel in KERNELS)}\n"
    for name, bug in bugs.items():
        source, options = KERNELS[bug.kernel]
        text += f"build {name}.o: kernel {HERE / source}\n  csrc = {directory / name}\n  options = {options} {bug.options}\n"
        # A kernel of CUDA stands alone, and nobody calls the others of its module, which are looked up when they are called.
        others = [kernel for kernel in KERNELS if kernel != bug.kernel and bug.kernel.endswith("_cpu")]
        objects = " ".join(f"{kernel}.o" for kernel in (name, *others))
        text += f"build {name}.so: link {BINDING} {objects}\n"
    for name, bug in bugs.items():
        source = (CSRC / bug.path).read_text()
        assert bug.text in source, f"the seeded bug {name} no longer fits the source"
        changed, copy = source.replace(bug.text, bug.replacement, 1), directory / name
        if not copy.exists():
            shutil.copytree(CSRC, copy)
            (copy / bug.path).write_text(changed)
        assert (copy / bug.path).read_text() == changed, f"another bug is seeded by the name {name}"
    ninja = directory / f"{hashlib.sha256(text.encode()).hexdigest()}.ninja"
    ninja.write_text(text)
    done = subprocess.run(["ninja", "-C", str(directory), "-f", ninja.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulator does not compile:\n{done.stdout}{done.stderr}")
    return {name: directory / f"{name}.so" for name in ("sound", *bugs)}


def run(module: Path, calls: list[tuple[str, tuple]], **environment: str) -> list:
    """Calls functions of the module, ``(name, arguments)`` each, in a process with the sanitizers loaded; returns their results.

    Raises:
        RuntimeError: with the report, if a sanitizer or the emulator found an error.
    """
    # AddressSanitizer looks for the function that throws when it starts, so that must be there by then.
    preloaded = []
    for library in ("libasan.so", "libstdc++.so"):
        command = ["g++", f"-print-file-name={library}"]
        preloaded.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    env = dict(os.environ, LD_PRELOAD=" ".join(preloaded), ASAN_OPTIONS="detect_leaks=0", **environment)
    done = subprocess.run([sys.executable, __file__, str(module)], input=pickle.dumps(calls), capture_output=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    return pickle.loads(done.stdout)


def main() -> None:
    import importlib.util

    sys.setdlopenflags(os.RTLD_LAZY)
    spec = importlib.util.spec_from_file_location("emulated", sys.argv[1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = [getattr(module, name)(*arguments) for name, arguments in pickle.load(sys.stdin.buffer)]
    sys.stdout.buffer.write(pickle.dumps(results))


if __name__ == "__main__":
    main()
