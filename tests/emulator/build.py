"""Builds the kernels into a Python module with ninja, for the CPU and under AddressSanitizer and UBSan; runs it in a subprocess."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"

NINJA = """\
flags = -std=c++20 -Og -g1 -fPIC -ffp-contract=fast -Wall -Wno-unknown-pragmas -Wno-psabi -I{here}
rule binding
  command = g++ $flags -fvisibility=hidden -I{csrc} -I{pybind} -I{python} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule kernel
  command = g++ $flags {sanitizers} -I$csrc -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = g++ -shared {sanitizers} $in -o $out
build binding.o: binding {here}/binding.cpp
build squeeze_excite_cpu.o: kernel {here}/squeeze_excite_cpu.cpp
  csrc = {csrc}
build pointwise_cpu.o: kernel {here}/pointwise_cpu.cpp
  csrc = {csrc}
build convolutions_cpu.o: kernel {here}/convolutions_cpu.cpp
  csrc = {csrc}
"""
NINJA_VARIANT = """\
build {name}/squeeze_excite.o: kernel {here}/squeeze_excite.cpp
  csrc = {csrc}
build {name}/emulated.so: link binding.o squeeze_excite_cpu.o pointwise_cpu.o convolutions_cpu.o {name}/squeeze_excite.o
"""


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


def build(directory: Path, variants: dict[str, Path]) -> dict[str, Path]:
    """Compiles the kernels of each variant's copy of csrc/; returns the variants' modules, for :func:`run`."""
    import pybind11

    python = sysconfig.get_path("include")
    text = NINJA.format(here=HERE, csrc=CSRC, pybind=pybind11.get_include(), python=python, sanitizers=SANITIZERS)
    for name, csrc in variants.items():
        text += NINJA_VARIANT.format(name=name, here=HERE, csrc=csrc)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text(text)
    done = subprocess.run(["ninja", "-C", str(directory)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulator does not compile:\n{done.stdout}{done.stderr}")
    return {name: directory / name / "emulated.so" for name in variants}


def run(module: Path, calls: list[tuple[str, tuple]], **environment: str) -> list:
    """Calls functions of the module, ``(name, arguments)`` each, in a process with the sanitizers loaded; returns their results.

    Raises:
        RuntimeError: with the report, if a sanitizer or the emulator found an error.
    """
    command = ["g++", "-print-file-name=libasan.so"]
    libasan = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    env = dict(os.environ, LD_PRELOAD=libasan, ASAN_OPTIONS="detect_leaks=0", **environment)
    done = subprocess.run([sys.executable, __file__, str(module)], input=pickle.dumps(calls), capture_output=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    return pickle.loads(done.stdout)


def main() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("emulated", sys.argv[1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = [getattr(module, name)(*arguments) for name, arguments in pickle.load(sys.stdin.buffer)]
    sys.stdout.buffer.write(pickle.dumps(results))


if __name__ == "__main__":
    main()
