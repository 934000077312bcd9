"""The compiled module's kernels on the CPU, against fp64 by the 2x rule."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain import DTYPES, every_second, misaligned, wide
from tolerance import assert_2x

import effnet_fast
from effnet_fast.ops import native, squeeze_excite

pytestmark = pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))

GATE = torch.ops.effnet_fast.squeeze_excite_gate
PIXELS = 49


def gate_arguments(batch, pieces, channels, reduced, dtype=torch.float32, bias=True, activation="silu", seed=0):
    g = torch.Generator().manual_seed(seed + batch + channels)
    shapes = [(batch, pieces, channels), (reduced, channels, 1, 1), (reduced,), (channels, reduced, 1, 1), (channels,)]
    partial, rw, rb, ew, eb = (torch.randn(shape, generator=g) for shape in shapes)
    weights = [rw / channels**0.5, rb if bias else None, ew, eb if bias else None]
    return [partial * PIXELS / pieces**0.5, PIXELS, *(None if w is None else w.to(dtype) for w in weights), activation]


def check_gate(arguments):
    out = GATE.native(*arguments)
    assert out.is_contiguous() and out.dtype == torch.float32
    assert_2x(out, GATE.reference(*arguments), GATE.reference(*wide(arguments)))
    return out


def check_gates(*shape, **options):
    """Over eight draws at once: the largest error of a few numbers is luck."""
    results = []
    for seed in range(0, 8000, 1000):
        arguments = gate_arguments(*shape, **options, seed=seed)
        results.append((GATE.native(*arguments), GATE.reference(*arguments), GATE.reference(*wide(arguments))))
    assert_2x(*(torch.cat(same) for same in zip(*results, strict=True)))


# 1 to 4 images go one by one, more of them as the lanes of vectors of 4, 8 or 16, whatever the machine has.
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 16, 17, 33])
@pytest.mark.parametrize(
    ("pieces", "channels", "reduced"), [(1, 32, 8), (2, 144, 6), (3, 37, 5), (4, 7, 1), (1, 1, 1), (1, 100, 17), (2, 1152, 48)]
)
def test_gate_shapes(batch, pieces, channels, reduced):
    check_gates(batch, pieces, channels, reduced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "relu", "relu6", "identity"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gate_types(dtype, activation, bias):
    for batch in (2, 11):
        check_gates(batch, 2, 75, 9, dtype=dtype, bias=bias, activation=activation)


@pytest.mark.parametrize("batch", [1, 20])
def test_gate_on_several_threads(batch):
    """B7's last blocks: large enough that rows are shared between threads; the result does not depend on how many there are."""
    arguments = gate_arguments(batch, 1, 3840, 160)
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 3):
            torch.set_num_threads(count)
            outs.append(check_gate(arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outs)


def test_gate_of_no_images():
    assert GATE.native(*gate_arguments(0, 2, 24, 6)).shape == (0, 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_of_half_precision_extremes(dtype):
    """Subnormal, largest and signed-zero weights keep their values."""
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, info.smallest_normal / 4, -info.smallest_normal / 2, info.smallest_normal, 1.0, -1.0, 0.5])
    for batch in (1, 16):
        arguments = gate_arguments(batch, 1, 8, 8, dtype, activation="identity")
        arguments[0] = torch.ones_like(arguments[0]) * PIXELS
        arguments[2] = torch.diag(special).to(dtype).reshape(8, 8, 1, 1)
        arguments[3] = arguments[5] = None
        arguments[4] = (
            torch.diag(torch.full((8,), min(1 / info.smallest_normal, 1e30))).to(torch.float32).clamp(max=info.max).to(dtype)
        )
        arguments[4] = arguments[4].reshape(8, 8, 1, 1)
        check_gate(arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gate_carries_non_finite_images(value):
    """A non-finite image spoils its own gate alone, as in the reference."""
    for batch in (2, 18):
        arguments = gate_arguments(batch, 2, 40, 8)
        clean = GATE.native(*arguments)
        arguments[0][1, 0, 3] = value
        out, plain = GATE.native(*arguments), GATE.reference(*arguments)
        keep = torch.arange(batch) != 1
        assert torch.equal(out[keep], clean[keep])
        assert torch.equal(out[1].isnan(), plain[1].isnan())


def test_gate_of_extreme_sums():
    """Pre-activations far beyond the range of exp give 0 and 1, never NaN."""
    for batch, scale in itertools.product((1, 16), (1e3, 1e30)):
        arguments = gate_arguments(batch, 1, 16, 4, activation="relu")
        arguments[0] = arguments[0] * scale
        out = GATE.native(*arguments)
        assert torch.isfinite(out).all() and out.min() < 1e-30 and out.max() == 1
        assert_2x(out, GATE.reference(*arguments), GATE.reference(*wide(arguments)))


@pytest.mark.parametrize("view", [misaligned, every_second])
@pytest.mark.parametrize("batch", [1, 16])
def test_gate_of_views(view, batch):
    arguments = gate_arguments(batch, 2, 50, 10, torch.bfloat16)
    expected = GATE.native(*arguments)
    assert torch.equal(GATE.native(*(view(a) if torch.is_tensor(a) else a for a in arguments)), expected)


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.zeros(2, 24), r"partial has shape \[2, 24\], expected \[N, P, C\]"),
        (0, torch.zeros(2, 1, 24, dtype=torch.float64), "partial must be float32"),
        (0, torch.zeros(2, 0, 24), "P, C and R must be at least 1"),
        (1, 0, "count must be positive, got 0"),
        (2, torch.zeros(6, 20, 1, 1), r"reduce_weight has shape \[6, 20, 1, 1\], expected \[6, 24, 1, 1\]"),
        (2, torch.zeros(6, 24), r"reduce_weight has shape \[6, 24\]"),
        (2, torch.zeros(6, 24, 1, 1, dtype=torch.int32), "reduce_weight must be float32, bfloat16 or float16"),
        (3, torch.zeros(7), r"reduce_bias has shape \[7\], expected \[6\]"),
        (4, torch.zeros(24, 6, 1, 1, dtype=torch.bfloat16), "expand_weight must have the dtype of reduce_weight"),
        (5, torch.zeros(6), r"expand_bias has shape \[6\], expected \[24\]"),
        (6, "gelu", "activation must be silu, relu, relu6 or identity, got 'gelu'"),
    ],
)
def test_gate_refuses(position, bad, message):
    arguments = gate_arguments(2, 1, 24, 6)
    arguments[position] = bad
    with pytest.raises(RuntimeError, match=f"squeeze_excite_gate: .*{message}|squeeze_excite_gate: {message}"):
        GATE.native(*arguments)


def test_gate_opcheck():
    torch.library.opcheck(GATE.native, gate_arguments(2, 2, 24, 6), test_utils=["test_schema", "test_faketensor"])


def test_public_function_takes_the_native_kernel():
    arguments = gate_arguments(3, 2, 48, 12)
    out = squeeze_excite.squeeze_excite_gate(*arguments[:-1], activation="silu")
    assert torch.equal(out, GATE.native(*arguments))


# How native.py explains itself, each in a module of its own: the real one is loaded once a process.
@pytest.mark.parametrize(
    ("version", "error", "reason"),
    [
        ("2.10.1", None, "torch 2.10.1 is older than the 2.11"),
        ("2.13.0", ModuleNotFoundError("No module named 'effnet_fast._C'"), "was not built"),
        ("2.13.0+cpu", ImportError("undefined symbol: x\nmore"), "cannot be loaded: undefined symbol: x$"),
    ],
)
def test_reason(monkeypatch, version, error, reason):
    def import_module(name):
        assert error is not None and name == "effnet_fast._C"
        raise error

    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(native.importlib, "import_module", import_module)
    text, module = native._load()
    assert re.search(reason, text) and module is None


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ('NAME = "squeeze_excite_gate"', 'NAME = "squeeze_excite_gates"'),  # and the module registers kernels of an op that is not
        ('"Tensor partial, SymInt count,', '"Tensor partial, float count,'),
    ],
    ids=["another op", "another argument"],
)
def test_a_module_of_other_sources_is_not_used(text, replacement, tmp_path):
    """The very module that is built here, beside a package whose op has changed since: the reference runs, and doctor says why."""
    copy = shutil.copytree(
        Path(effnet_fast.__file__).parent, tmp_path / "effnet_fast", ignore=shutil.ignore_patterns("__pycache__")
    )
    source = copy / "ops" / "squeeze_excite" / "__init__.py"
    assert text in source.read_text() and "effnet_fast.squeeze_excite_gate." in source.read_text()
    changed = source.read_text().replace(text, replacement)
    if "gates" in replacement:
        changed = changed.replace("effnet_fast.squeeze_excite_gate.", "effnet_fast.squeeze_excite_gates.")
    source.write_text(changed)
    code = """
import torch, effnet_fast
from effnet_fast.cli import main
model, x = effnet_fast.create_model("efficientnet_b0", num_classes=2).eval(), torch.randn(1, 3, 32, 32)
with torch.no_grad():
    assert model(x).isfinite().all()
print(*(choice.backend for block in effnet_fast.explain(model, x) for choice in block.ops))
main(["doctor"])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    ran, told = done.stdout.split("\n", 1)
    assert set(ran.split()) == {"reference"}
    reason = re.search("compiled module +(.*)", told)[1]
    assert "was built from other sources than this package (squeeze_excite_gate" in reason and "building it again" in reason
    assert f"[1] {reason}" in told and not done.stderr


def test_a_module_that_does_not_say_its_schemas_is_not_used(monkeypatch):
    """One that was built before modules said them."""
    monkeypatch.setattr(native, "_MODULE", SimpleNamespace(CUDA_KERNELS=0))
    monkeypatch.setattr(native, "REASON", None)
    native.require("an_op(Tensor x) -> (Tensor y)")
    assert "(an_op differs)" in native.REASON


def test_module_is_loaded():
    assert "effnet_fast._C" in sys.modules and isinstance(native.CUDA_KERNELS, bool)
