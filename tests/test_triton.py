"""The Triton kernels: interpreted on the CPU, compiled ahead of time for GPUs that are not here, and run where one is."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import needs
import pytest
import torch

from effnet_fast import ops
from effnet_fast.ops import backends, triton_backend

HERE = Path(__file__).parent
FILES = "triton_kernels.py", "triton_training.py"
PARTS = 2  # of an architecture's launches, each a test, so that two workers end at about the same time
ALL_LAUNCHES = "EFFNET_FAST_TEST_ALL_LAUNCHES"
EVERYTHING = os.environ.get(ALL_LAUNCHES) == "1"
needs_triton = pytest.mark.skipif(triton_backend.REASON is not None, reason=str(triton_backend.REASON))


def pytest_of(file: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of FILES in a process of its own: triton takes its interpreter, or not, once a process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env={**os.environ, **environment})


@needs_triton
@pytest.mark.parametrize(("file", "selection"), [(FILES[0], "test_depthwise"), (FILES[0], "not test_depthwise"), (FILES[1], "")])
def test_interpreted(file, selection):
    done = pytest_of(file, "-k", selection, TRITON_INTERPRET="1")
    mismatch = "only 0-dimensional arrays can be converted" in done.stdout and "triton/runtime/interpreter.py" in done.stdout
    if mismatch and "triton" not in needs.REQUIRED:
        pytest.skip(f"the interpreter of triton {version('triton')} does not run with NumPy {version('numpy')}: its own code fails")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]


def specialized(tensor, optional, integer, number, CONSTANT: tl.constexpr):  # noqa: F821
    """A kernel's parameters of each kind."""


@needs_triton
def test_compiled_kernels_are_told_apart_as_triton_does():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from effnet_fast.ops.triton_common import specialization

    kernel = triton.jit(specialized)
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    aligned = torch.zeros(64)
    tensors = aligned, aligned[4:], aligned[1:], aligned.bfloat16(), torch.nn.Parameter(aligned)
    integers = 0, 1, 2, 15, 16, -16, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1
    triton_s = {}
    for *args, constant in itertools.product(tensors, (None, aligned, aligned[1:]), integers, (0.5, 1.0), (2, "silu")):
        key = specialization(kernel, tuple(args), {"CONSTANT": constant})
        _, theirs, _ = bind(*args, CONSTANT=constant)
        assert triton_s.setdefault(key, theirs) == theirs
    assert len(triton_s) == len({str(theirs) for theirs in triton_s.values()})


@needs_triton
def test_a_second_launch_goes_to_what_was_compiled(monkeypatch):
    """With all arguments and constants in the order of the parameters, a table of compiled kernels for each device."""
    from effnet_fast.ops import triton_common

    launches = []

    class Compiled(triton_common.CompiledKernel):
        module = None

        def __init__(self):
            pass

        def __getitem__(self, grid):
            return lambda *args: launches.append((grid, *args))

    class Kernel:
        fn, arg_names, compiles = specialized, ["tensor", "optional", "integer", "number", "FIRST", "SECOND"], 0

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *args, **constants):
            self.compiles += 1
            return Compiled()

    monkeypatch.setattr(triton_common, "_COMPILED", {})
    kernel, tensor = Kernel(), torch.zeros(16)
    for programs, integer, number in ((3, 5, 0.5), (4, 7, 1.5), (5, 16, 0.5)):
        triton_common.run(kernel, programs, tensor, None, integer, number, SECOND="silu", FIRST=8, num_warps=4)
    assert kernel.compiles == 2 and launches == [((4, 1, 1), tensor, None, 7, 1.5, 8, "silu")]
    triton_common.run(kernel, 1, tensor, None, 5, 0.5, SECOND="silu", FIRST=8, num_warps=8)
    assert kernel.compiles == 3


@needs_triton
@pytest.mark.gpu
def test_a_second_launch_on_a_gpu(monkeypatch):
    """Triton is not asked again: not on another stream, nor while a graph is captured; its hooks are."""
    import triton

    x, weight = torch.randn(2, 24, 9, 9, device="cuda"), torch.randn(40, 24, 1, 1, device="cuda")
    n = [torch.rand(40, device="cuda") + 0.5 for _ in range(4)]

    def launch():
        return torch.ops.effnet_fast.pointwise_conv_bn_act.triton(x, weight, *n, 1e-3, None, None, "silu")

    seen, hook = [], triton.knobs.runtime.launch_enter_hook
    expected = launch()
    monkeypatch.setattr(triton.JITFunction, "run", None)
    hook.add(seen.append)
    try:
        assert torch.equal(launch(), expected)
    finally:
        hook.remove(seen.append)
    assert len(seen) == 1
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(launch(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch()
    x.neg_()
    graph.replay()
    assert torch.equal(captured, launch())


@pytest.fixture(scope="module")
def outcomes_on_a_gpu(tmp_path_factory) -> dict[str, list[str]]:
    """Of each test in FILES, each run in one process: what went wrong in which case; missing where it did not run."""
    outcomes: dict[str, list[str]] = {}
    for file in FILES:
        report = tmp_path_factory.mktemp("gpu") / "report.xml"
        done = pytest_of(file, f"--junitxml={report}", TRITON_INTERPRET="0")
        assert report.exists(), done.stdout[-6000:] + done.stderr[-2000:]
        for case in ElementTree.parse(report).iter("testcase"):
            wrong = outcomes.setdefault(f"{file}::{case.attrib['name'].partition('[')[0]}", [])
            bad = [element for element in case if element.tag in ("failure", "error", "skipped")]
            wrong += [f"{case.attrib['name']}: {element.tag}: {(element.text or '')[-1500:]}" for element in bad]
    return outcomes


def names_in(file: str) -> list[str]:
    """The tests of one of FILES, which this process may not be able to import."""
    return [f"{file}::{name}" for name in re.findall(r"^def (test_\w+)", (HERE / file).read_text(), re.MULTILINE)]


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for file in FILES for name in names_in(file)])
def test_on_a_gpu(name, outcomes_on_a_gpu):
    wrong = outcomes_on_a_gpu.get(name, ["it did not run"])
    assert not wrong, f"{len(wrong)} cases of {name}:\n" + "\n".join(wrong[:5])


@needs_triton
@pytest.mark.parametrize(
    ("arch", "part"),
    [(arch, part) for arch in (80, 90, 100) for part in range(PARTS)] if EVERYTHING else [(90, 0), (90, 1), (80, 0), (100, 1)],
)
def test_launches_compile_within_their_budget(arch, part):
    """Nothing spills, and two programs fit in a multiprocessor's registers (65536) and shared memory.

    By default each configuration of each kernel once, in its fullest form, for sm_90 and one of the other architectures: 290 in two
    parts; with EFFNET_FAST_TEST_ALL_LAUNCHES=1 all of B0 to B7's launches, 820, for every architecture.
    """
    command = [sys.executable, str(HERE / "triton_ahead.py"), str(arch), "all" if EVERYTHING else "covering", str(part), str(PARTS)]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), os.environ["PYTHONPATH"])),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    *kernels, summary = map(json.loads, done.stdout.splitlines())
    print(f"sm_{arch}: {summary}" + ("" if EVERYTHING else f"; all of them with {ALL_LAUNCHES}=1"))
    of_one_launch = {"training._add_up", "training.statistics_finish"}  # in one of the parts
    assert {kernel["kernel"] for kernel in kernels} | of_one_launch == {
        "conv._kernel",
        "depthwise._kernel",
        "pointwise._kernel",
        "squeeze_excite._one_launch",
        "squeeze_excite._reduce",
        "squeeze_excite._expand",
        "squeeze_excite._of_images",
        "training._elements",
        "training.squeeze_excite_of_hidden",
        "training.squeeze_excite_of_channels",
        "training.statistics_of_pieces",
        "training.vectors_norm_coefficients",
        "training.vectors_norm_vectors",
        *of_one_launch,
    }
    capacity = (164 if arch == 80 else 228) * 1024
    for kernel in kernels:
        assert kernel["stack"] == 0, f"spills: {kernel}"
        together = 1 if kernel["kernel"].endswith("squeeze_excite_of_channels") else 2  # it has few programs, not two an SM
        assert together * kernel["registers"] * kernel["num_warps"] * 32 <= 65536, f"registers: {kernel}"
        assert 2 * (kernel["shared"] + 1024) <= capacity, f"shared memory: {kernel}"  # the system takes 1 KB of each program's


def test_reasons(monkeypatch):
    assert set(backends.reasons()["triton"]) == set(backends.reasons()["reference"])
    x = torch.zeros(1, 16, 2, 2)
    monkeypatch.setattr(triton_backend, "REASON", None)
    assert triton_backend.can_run(x) == "x is on 'cpu'; Triton runs kernels on 'cuda'"
    monkeypatch.setattr(triton_backend, "_DEVICE", "cpu")
    assert triton_backend.can_run(x) is None and triton_backend.can_run(x.half()) is None
    assert "torch.float64" in str(triton_backend.can_run(x.double()))
    monkeypatch.setattr(triton_backend, "REASON", "triton is not installed")
    assert triton_backend.can_run(x) == "triton is not installed"


def test_what_kernels_do_not_take_is_the_references(monkeypatch):
    """A kernel that could run is passed by, with the reason."""
    monkeypatch.setattr(triton_backend, "REASON", None)
    monkeypatch.setattr(triton_backend, "_DEVICE", "cpu")
    x, n = torch.ones(1, 16, 8, 8), ops.Norm(None, None, torch.zeros(16), torch.ones(16), 1e-3)
    with backends.tracing() as trace:
        ops.depthwise_conv_bn_act(x, torch.ones(16, 1, 7, 7), n, stride=1, padding=(3,) * 4, activation="relu", squeeze=True)
        ops.conv_bn_act(x, torch.ones(16, 16, 3, 3), n, stride=1, padding=(1,) * 4, activation="relu")
    assert [choice.backend for choice in trace] == ["reference"] * 2
    assert "kernel 7x7" in trace[0].refused["triton"] and "16 input channels" in trace[1].refused["triton"]


def test_importing_the_package_leaves_triton_alone():
    """And the compiler. torch's FLOP counter, which knows the ops, imports triton where that is installed."""
    code = """
import sys
import torch.utils.flop_counter
before = set(sys.modules)
from effnet_fast import *
new = set(sys.modules) - before
print(*(name for name in new if name in ("triton", "torch._dynamo") or name.endswith((".triton", ".triton_common"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
