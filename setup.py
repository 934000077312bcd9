"""Builds effnet_fast and, where it can, its compiled module effnet_fast._C. Project metadata is in pyproject.toml.

The module uses torch's stable ABI alone: one binary (cp310-abi3) serves torch 2.11 and up, CPU-only or CUDA. It is skipped, with
the reason printed, where there is no C++ compiler or no Python.h; its CUDA kernels are skipped where there is no nvcc.

Environment: EFFNET_FAST_CUDA=0 leaves the CUDA kernels out, =1 makes it an error if they cannot be built;
TORCH_CUDA_ARCH_LIST (default "8.0;9.0;10.0+PTX"); MAX_JOBS; CXX.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

# pip does not look at [build-system] requires under --no-build-isolation, and older releases cannot read pyproject.toml.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"effnet_fast: building needs setuptools >= 77, this is {setuptools.__version__}: pip install -U setuptools")

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    sys.exit("effnet_fast: building needs torch: install it first, then run: pip install --no-build-isolation .")

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET = "0x020b000000000000ULL"  # torch 2.11
PYTHON_TARGET = "0x030A0000"  # CPython 3.10


def missing_for_cpp() -> str | None:
    """Why no compiled module can be built here, or None."""
    if sys.platform != "linux":
        return f"it is built on Linux only, this is {sys.platform}"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        return f"it needs torch 2.11 or newer, this is {torch.__version__}"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        return f"there is no Python.h in {include}"
    return None


def cuda_root() -> tuple[str | None, str]:
    """The CUDA toolkit's folder, or None and the reason why there is none to use."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return None, f"there is no nvcc in {home}/bin" if home else "there is no nvcc on PATH"
    # nvcc on PATH may be a wrapper script in another folder: the toolkit's own word counts.
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr + dryrun.stdout, re.MULTILINE)
    if top is None:
        return None, f"{nvcc} does not run"
    if torch.version.hip:
        return None, "this torch is built for ROCm"
    root = os.path.realpath(top[1].strip())
    release = re.search(
        r"release (\d+)\.", subprocess.run([f"{root}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    )
    if release and torch.version.cuda and torch.version.cuda.split(".")[0] != release[1]:
        return None, f"{nvcc} is CUDA {release[1]} and torch was built for CUDA {torch.version.cuda}"
    return root, ""


def cuda_architectures() -> list[str]:
    """What torch will have nvcc make: sm_90 is machine code, compute_100 PTX."""
    return [flag.rpartition(",code=")[2] for flag in cpp_extension._get_cuda_arch_flags()]


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, which misses changed headers of .cu files: beside a CPU-only torch it has nvcc write no dependency file.

    The objects of an editable install stay in build/, so that the next one compiles what has changed since.
    """

    def build_extensions(self):
        if self.editable_mode:
            self.build_temp = str(ROOT / "build" / "editable")
        newest = max(path.stat().st_mtime for path in CSRC.rglob("*.*h"))
        for source in CSRC.rglob("*.cu"):
            built = Path(self.build_temp, source.relative_to(ROOT).with_suffix(".o"))
            if built.exists() and built.stat().st_mtime < newest:
                built.unlink()
        super().build_extensions()


def compiled_module():
    """The Extension to build, or None; what is left out is printed with the reason."""
    wish = os.environ.get("EFFNET_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"effnet_fast: EFFNET_FAST_CUDA must be 0 or 1, got {wish!r}")
    root, no_cuda = (None, "EFFNET_FAST_CUDA=0") if wish == "0" else cuda_root()
    no_cpp = missing_for_cpp()
    if wish == "1" and (no_cpp or root is None):
        sys.exit(f"effnet_fast: EFFNET_FAST_CUDA=1, but the CUDA kernels cannot be built: {no_cpp or no_cuda}")
    if no_cpp:
        print(f"effnet_fast: installing pure Python, without the compiled module: {no_cpp}", file=sys.stderr)
        return None

    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PYTHON_TARGET}"]
    link = ["-Wl,--as-needed", f"-Wl,--version-script={CSRC / 'exports.map'}", "-s", "-ldl"]
    sources = sorted(CSRC.rglob("*.cpp"))
    if root:
        cpp_extension.CUDA_HOME = root  # which torch does not look for where it is CPU-only
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        sources += sorted(CSRC.rglob("*.cu"))
        defines.append("-DEFFNET_FAST_CUDA")
        link += [f"-L{root}/lib64", "-l:libcudart_static.a", "-lrt", "-lpthread"]
    else:
        print(f"effnet_fast: building without CUDA kernels: {no_cuda}", file=sys.stderr)
    # -Wno-psabi: vectors wider than the baseline's registers are passed only between functions that are always inlined.
    cxx = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    nvcc = ["-std=c++20", "-O3", "-Xcompiler", "-fvisibility=hidden"]
    if root:
        cxx.append(f"-DEFFNET_FAST_CUDA_ARCHITECTURES={','.join(cuda_architectures())}")  # nvcc would cut it at the commas
    return cpp_extension.CppExtension(
        "effnet_fast._C",
        [str(path.relative_to(ROOT)) for path in sources],
        depends=[str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.*h"))],
        py_limited_api=True,
        extra_compile_args={"cxx": cxx + defines, "nvcc": nvcc + defines},
        extra_link_args=link,
    )


module = compiled_module()
setuptools.setup(
    ext_modules=[module] if module else [],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if module else {},
)
