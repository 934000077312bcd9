"""The package build: what is built, what is left out and what is said of it. Every build runs in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import needs
import pytest

from effnet_fast.ops import native

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NO_NVCC = needs.missing()["nvcc"]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
needs_nvcc = pytest.mark.skipif(NO_NVCC is not None, reason=str(NO_NVCC))


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project that compiles its C++ without optimisation, which is soon done."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("effnet_fast\n")
    shutil.copytree(CSRC, copy / "csrc")
    shutil.copytree(ROOT / "effnet_fast", copy / "effnet_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    edit_setup(copy, 'cxx = ["-std=c++20", "-O3"', 'cxx = ["-std=c++20", "-O0"')
    return copy


def edit_setup(project: Path, text: str, replacement: str) -> None:
    source = (project / "setup.py").read_text()
    assert text in source
    (project / "setup.py").write_text(source.replace(text, replacement, 1))


def build_wheel(project: Path, *, succeeds: bool = True, editable: bool = False, **environment: str) -> tuple[str, list[Path]]:
    """The build's output, and the wheels it made. An empty string removes a variable."""
    env = {k: v for k, v in {**os.environ, "PYTHONPATH": "", "MAX_JOBS": "2", **environment}.items() if v}
    wheels = project.parent / "wheels"
    hook = "build_editable" if editable else "build_wheel"
    command = [sys.executable, "-c", f"import sys; from setuptools import build_meta as b; print(b.{hook}(sys.argv[1]))"]
    done = subprocess.run([*command, str(wheels)], cwd=project, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == succeeds, output
    return output, sorted(wheels.glob("*.whl"))


def symbols(module: Path, kind: str) -> list[str]:
    lines = subprocess.run(["nm", "-D", "-C", kind, str(module)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^[0-9a-f ]*[A-Za-z] ", "", line) for line in lines]


def check_symbols(module: Path) -> None:
    undefined = symbols(module, "--undefined-only")
    assert any("aoti_torch_" in name for name in undefined), "nm shows nothing of the stable ABI"
    assert not [name for name in undefined if re.search(r"\b(at|c10|torch)::", name)], "symbols outside the stable ABI"
    assert not [name for name in undefined if "cuda" in name and name != "aoti_torch_device_type_cuda"], (
        "symbols of a CUDA torch alone"
    )
    defined = symbols(module, "--defined-only")
    assert "PyInit__C" in defined and not [name for name in defined if "effnet_fast" in name], "only the import hook is exported"


def check_compiled(wheel: Path, directory: Path) -> Path:
    """The wheel's module, after checks of tag and symbols."""
    assert "-cp310-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        module = Path(archive.extract("effnet_fast/_C.abi3.so", directory))
        assert not [name for name in archive.namelist() if name.startswith(("csrc", "tests", "benchmarks"))]
    check_symbols(module)
    return module


def import_module(module: Path, expression: str) -> str:
    script = f"import sys, torch; sys.path.insert(0, {str(module.parent)!r}); import _C; print({expression})"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
def test_symbols_of_the_installed_module():
    """Which is compiled as users' are, with optimisation."""
    check_symbols(ROOT / "effnet_fast" / "_C.abi3.so")


@needs_compiler
def test_wheel_without_cuda(project, tmp_path):
    output, (wheel,) = build_wheel(project, EFFNET_FAST_CUDA="0")
    assert "building without CUDA kernels: EFFNET_FAST_CUDA=0" in output
    assert import_module(check_compiled(wheel, tmp_path), "_C.CUDA_KERNELS") == "0"


@needs_compiler
@needs_nvcc
def test_wheel_with_cuda(project, tmp_path):
    # Hardly a kernel is compiled, as nothing starts them: tests/test_resources.py has the GPU's, the wheel without CUDA the CPU's.
    header = project / "csrc" / "common" / "cuda.h"
    text, launches = re.subn(r"#define EFFNET_LAUNCH\(.*\n.*\n", "#define EFFNET_LAUNCH(...)\n", header.read_text())
    text, limits = re.subn(r"#define EFFNET_ALLOW_SHARED\(.*\n.*\n", "#define EFFNET_ALLOW_SHARED(...)\n", text)
    header.write_text(text)
    assert launches == limits == 1
    with open(project / "csrc" / "common" / "simd.h", "a") as simd:
        for macro, parameters, made in (
            ("PER_ISA", "name, parameters, body, arguments", "void name parameters {}"),
            ("PER_WIDTH", "name, body", "void name(const Task&, int) {}"),
        ):
            assert f"#define EFFNET_{macro}({parameters})" in (CSRC / "common" / "simd.h").read_text()
            simd.write(f"#undef EFFNET_{macro}\n#define EFFNET_{macro}({parameters}) {made}\n")
    _, (wheel,) = build_wheel(project, EFFNET_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert import_module(check_compiled(wheel, tmp_path), "_C.CUDA_KERNELS, _C.CUDA_ARCHITECTURES") == "1 sm_90"
    # Objects of an earlier build are not kept when a header of a .cu file has changed.
    with open(project / "csrc" / "conv" / "forward.cuh", "a") as header_of_the_first:
        header_of_the_first.write("#error seeded\n")
    output, _ = build_wheel(project, EFFNET_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0", succeeds=False)
    assert "#error seeded" in output


@needs_compiler
@pytest.mark.skipif(shutil.which("ninja") is None, reason="there is no ninja on PATH")
def test_an_editable_build_compiles_what_has_changed(project):
    for source in project.joinpath("csrc").rglob("*.cpp"):
        if source.parent.name not in ("csrc", "squeeze_excite"):
            source.unlink()
    compiled = project / "build" / "editable" / "csrc"
    module, gate = compiled / "module.o", compiled / "squeeze_excite" / "squeeze_excite_cpu.o"

    def built() -> tuple[int, int]:
        build_wheel(project, editable=True, EFFNET_FAST_CUDA="0")
        assert (project / "effnet_fast" / "_C.abi3.so").exists()
        return module.stat().st_mtime_ns, gate.stat().st_mtime_ns

    first = built()
    assert built() == first
    (project / "csrc" / "module.cpp").touch()
    second = built()
    assert second[0] > first[0] and second[1] == first[1]
    (project / "csrc" / "common" / "simd.h").touch()
    third = built()
    assert third[0] == second[0] and third[1] > second[1]
    edit_setup(project, '"-Wall"', '"-Wall", "-DOTHER_FLAG"')
    fourth = built()
    assert fourth[0] > third[0] and fourth[1] > third[1]


def check_pure(wheels: list[Path]) -> None:
    (wheel,) = wheels
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "effnet_fast/__init__.py" in names and not [name for name in names if name.endswith(".so")]


def test_no_compiler_gives_pure_python(project):
    output, wheels = build_wheel(project, CXX="/nonexistent/c++")
    assert "installing pure Python, without the compiled module: there is no C++ compiler (/nonexistent/c++)" in output
    check_pure(wheels)


@needs_compiler
def test_no_python_header_gives_pure_python(project):
    edit_setup(project, 'sysconfig.get_path("include")', '"/nonexistent"')
    output, wheels = build_wheel(project)
    assert "installing pure Python, without the compiled module: there is no Python.h in /nonexistent" in output
    check_pure(wheels)


def test_missing_nvcc_is_an_error_where_cuda_is_asked_for(project):
    output, wheels = build_wheel(project, EFFNET_FAST_CUDA="1", CUDA_HOME="/nonexistent", succeeds=False)
    assert "EFFNET_FAST_CUDA=1, but the CUDA kernels cannot be built: there is no nvcc in /nonexistent/bin" in output
    assert not wheels


def test_without_torch_one_line(project):
    edit_setup(project, "    import torch\n", "    sys.modules['torch'] = None\n    import torch\n")  # raises ModuleNotFoundError
    output, wheels = build_wheel(project, succeeds=False)
    assert output.strip() == ("effnet_fast: building needs torch: install it first, then run: pip install --no-build-isolation .")
    assert not wheels


def test_old_setuptools_one_line(project):
    edit_setup(project, "import setuptools\n", "import setuptools\n\nsetuptools.__version__ = '65.5.0'\n")
    output, wheels = build_wheel(project, succeeds=False)
    assert output.strip() == "effnet_fast: building needs setuptools >= 77, this is 65.5.0: pip install -U setuptools"
    assert not wheels


@needs_compiler
def test_compile_failure_is_an_error(project):
    for source in project.joinpath("csrc").rglob("*.cpp"):
        source.unlink()
    (project / "csrc" / "module.cpp").write_text("#error seeded\n")
    output, wheels = build_wheel(project, EFFNET_FAST_CUDA="0", succeeds=False)
    assert "#error seeded" in output and not wheels
