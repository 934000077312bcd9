"""The ops: each backend against the fp64 reference, registration, dtypes, strides, bad input, the choice of backend."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_2x, largest

import effnet_fast
from effnet_fast import ops
from effnet_fast.ops import backends, native

OPS = torch.ops.effnet_fast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOME = [case for case in cases.REDUCED if case in cases.nasty()] + cases.REDUCED[len(cases.nasty()) :: 6]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def norm(channels: int, dtype: torch.dtype = torch.float32) -> ops.Norm:
    return ops.Norm(*((torch.rand(channels) + shift).to(dtype) for shift in (0.5, -0.5, -0.5, 0.5)), 1e-3)


def wide(value):
    """Tensors in float64, the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.double()
    return ops.Norm(*map(wide, value)) if isinstance(value, ops.Norm) else value


def plain_conv(x, weight, n, stride, padding, groups, activation, residual=None):
    """What PyTorch's modules compute, written without the package's reference."""
    top, bottom, left, right = padding
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight.to(x.dtype), stride=stride, groups=groups)
    y = F.batch_norm(y, n.mean, n.var, n.weight, n.bias, eps=n.eps)
    y = {"silu": F.silu, "relu": F.relu, "relu6": F.relu6, "identity": lambda t: t}[activation](y)
    return y if residual is None else y + residual


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values behind other strides."""
    if how == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if how == "sliced":
        larger = torch.full((x.shape[0], x.shape[1] + 3, x.shape[2] + 1, x.shape[3] + 2), float("nan"), dtype=x.dtype)
        view = larger[:, 1:-2, 1:, 1:-1]
        return view.copy_(x)
    if how == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_depthwise(case, dtype):
    torch.manual_seed(0)
    x = torch.randn(case.images, case.channels, case.height, case.width).to(dtype)
    weight, n = torch.randn(case.channels, 1, case.kernel, case.kernel), norm(case.channels)
    args = {"stride": case.stride, "padding": case.padding}
    for activation in ops.ACTIVATIONS:
        y, partial = ops.depthwise_conv_bn_act(x, weight, n, activation=activation, squeeze=True, **args)
        plain = plain_conv(x, weight, n, **args, groups=case.channels, activation=activation)
        ref = plain_conv(wide(x), wide(weight), wide(n), **args, groups=case.channels, activation=activation)
        assert_2x(y, plain, ref, f"y, {activation}")
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert partial.dtype == torch.float32 and partial.shape[1] >= 1
        # The squeeze is of the stored y.
        total = y.double().sum((2, 3))
        assert largest(partial.double().sum(1) - total) <= 2 * largest(y.float().sum((2, 3)) - total) + 1e-6 * largest(total)
    y, partial = ops.depthwise_conv_bn_act(x, weight, n, activation="silu", squeeze=False, **args)
    assert partial.numel() == 0


@pytest.mark.parametrize("how", ["channels_last", "sliced", "misaligned"])
def test_strides_do_not_matter(how):
    torch.manual_seed(0)
    x, n = torch.randn(2, 24, 9, 7), norm(24)
    w3, w1 = torch.randn(24, 1, 3, 3), torch.randn(24, 24, 1, 1)
    args = {"stride": 2, "padding": (1, 1, 0, 1), "activation": "silu"}
    y, partial = ops.depthwise_conv_bn_act(x, w3, n, squeeze=True, **args)
    y2, partial2 = ops.depthwise_conv_bn_act(strided(x, how), strided(w3, how), n, squeeze=True, **args)
    torch.testing.assert_close(y2, y)
    torch.testing.assert_close(partial2, partial)
    gate = torch.rand(2, 24)
    z = ops.pointwise_conv_bn_act(x, w1, n, gate=gate, residual=x, activation="silu")
    z2 = ops.pointwise_conv_bn_act(strided(x, how), w1, n, gate=gate, residual=strided(x, how), activation="silu")
    torch.testing.assert_close(z2, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 7, 5, 24), (1, 40, 1, 1, 8), (0, 16, 4, 4, 16), (3, 13, 3, 9, 17)], ids=str)
def test_pointwise(shape, dtype):
    torch.manual_seed(0)
    images, channels, height, width, out = shape
    x, residual = torch.randn(images, channels, height, width).to(dtype), torch.randn(images, out, height, width).to(dtype)
    weight, n, gate = torch.randn(out, channels, 1, 1), norm(out), torch.rand(images, channels)
    for activation, g, r in (("silu", None, None), ("identity", gate, residual), ("relu6", gate, None), ("relu", None, residual)):
        y = ops.pointwise_conv_bn_act(x, weight, n, gate=g, residual=r, activation=activation)
        gated = x if g is None else x * g.to(dtype)[:, :, None, None]
        gated64 = wide(x) if g is None else wide(x) * wide(g)[:, :, None, None]
        plain = plain_conv(gated, weight, n, 1, (0, 0, 0, 0), 1, activation, r)
        assert_2x(y, plain, plain_conv(gated64, wide(weight), wide(n), 1, (0, 0, 0, 0), 1, activation, wide(r)), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(12, 9), (1, 1), (33, 32)], ids=str)
def test_conv(size, dtype):
    torch.manual_seed(0)
    x, weight, n = torch.randn(2, 3, *size).to(dtype), torch.randn(16, 3, 3, 3), norm(16)
    for stride, padding in ((2, (1, 1, 1, 1)), (2, (0, 1, 1, 1)), (1, (1, 1, 1, 1))):
        if min(size) + 1 < 3 and padding[0] == 0:
            continue
        plain = plain_conv(x, weight, n, stride, padding, 1, "silu")
        residual = torch.randn_like(plain)
        y = ops.conv_bn_act(x, weight, n, stride=stride, padding=padding, activation="silu", residual=residual)
        ref = plain_conv(wide(x), wide(weight), wide(n), stride, padding, 1, "silu", wide(residual))
        assert_2x(y, plain + residual, ref)


@pytest.mark.parametrize("name", backends.BACKENDS)
@pytest.mark.parametrize("shape", [(2, 1, 32, 8), (1, 3, 13, 1), (0, 1, 16, 4), (4, 2, 96, 4)], ids=str)
def test_gate(shape, name):
    reason = backends.reasons()[name]["squeeze_excite_gate"]
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    images, pieces, channels, squeezed = shape
    partial = torch.randn(images, pieces, channels) * 20
    weights = torch.randn(squeezed, channels, 1, 1), torch.randn(squeezed), torch.randn(channels, squeezed, 1, 1), None

    def plain(p, rw, rb, ew, eb, act):
        hidden = F.linear(p.sum(1) / 49, rw.flatten(1), rb)
        return torch.sigmoid(F.linear(F.silu(hidden) if act == "silu" else F.relu(hidden), ew.flatten(1), eb))

    for activation in ("silu", "relu"):
        with effnet_fast.backend(name, strict=True):
            gate = ops.squeeze_excite_gate(partial, 49, *weights, activation=activation)
        assert_2x(gate, plain(partial, *weights, activation), plain(*map(wide, (partial, *weights)), activation), name)


def _example(op: str, dtype: torch.dtype, images: int) -> tuple:
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x, n = torch.randn(images, 16, 9, 7).to(dtype), norm(16, parameters)
    if op == "depthwise_conv_bn_act":
        return x, torch.randn(16, 1, 5, 5).to(parameters), *n, 2, [1, 2, 2, 2], "silu", 1
    if op == "pointwise_conv_bn_act":
        gate = torch.rand(images, 16, dtype=parameters)
        return x, torch.randn(16, 16, 1, 1).to(parameters), *n, gate, x.clone(), "identity"
    if op == "conv_bn_act":
        return x, torch.randn(16, 16, 3, 3).to(parameters), *n, None, 2, [0, 1, 1, 1], "relu6"
    reduce, expand = torch.randn(4, 16, 1, 1).to(parameters), torch.randn(16, 4, 1, 1).to(parameters)
    return torch.randn(images, 2, 16, dtype=parameters), 63, reduce, torch.randn(4).to(parameters), expand, None, "silu"


@pytest.mark.parametrize("images", [2, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", sorted(backends._KERNELS))
def test_opcheck(op, dtype, images):
    torch.manual_seed(0)
    args = _example(op, dtype, images)
    for kernel in backends._KERNELS[op]:
        if kernel.can_run(args[0]) is None:
            torch.library.opcheck(getattr(getattr(OPS, op), kernel.backend), args)


def outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", sorted(backends._KERNELS))
def test_out_forms_write_what_the_op_returns(op):
    """Into memory that was NaN; and they refuse a tensor of another shape."""
    torch.manual_seed(0)
    args = _example(op, torch.float32, 2)
    for kernel in backends._KERNELS[op]:
        if kernel.can_run(args[0]) is not None:
            continue
        made = outputs(kernel.run(*args))
        out_form = getattr(getattr(OPS, op), f"{kernel.backend}_out")
        names = [argument.name for argument in out_form._schema.arguments if argument.is_out]
        given = {name: torch.full_like(tensor, float("nan")) for name, tensor in zip(names, made, strict=True)}
        assert out_form(*args, **given) is None
        for name, tensor in zip(names, made, strict=True):
            torch.testing.assert_close(given[name], tensor)
        torch.library.opcheck(out_form, args, given)
        with pytest.raises((ValueError, RuntimeError), match=names[0]):
            out_form(*args, **{**given, names[0]: torch.empty(1, 1)})


def in_double(op: str, args: tuple, norms: bool) -> list:
    """The weights and biases in float64, and the norm's vectors where asked for; the values stay the same."""
    names = [argument.name for argument in getattr(OPS, op).reference._schema.arguments]
    chosen = [name.endswith(("weight", "bias")) and not name.startswith("norm_") for name in names]
    chosen = [one or (norms and name.startswith("norm_")) for one, name in zip(chosen, names, strict=True)]
    return [wide(value) if one else value for one, value in zip(chosen, args, strict=True)]


def check_parameters_in_double(op: str, backend: str, args: tuple) -> None:
    """The reference takes a norm as PyTorch's batch norm does: not in float64 beside another x."""
    run = getattr(getattr(OPS, op), backend)
    for norms in (False, True) if backend != "reference" else (False,):
        for made, expected in zip(outputs(run(*in_double(op, args, norms))), outputs(run(*args)), strict=True):
            assert torch.equal(made, expected) and made.dtype == expected.dtype, backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", sorted(backends._KERNELS))
def test_parameters_in_double_beside_another_x(op, dtype):
    torch.manual_seed(0)
    args = _example(op, dtype, 2)
    # The processor may be one on which another backend is faster, but not one that the native kernel cannot run on.
    for backend in ["reference"] if native.REASON is not None else ["native", "reference"]:
        check_parameters_in_double(op, backend, args)


def test_flop_formulas():
    from torch.utils.flop_counter import FlopCounterMode

    expected = {
        "depthwise_conv_bn_act": 2 * 2 * 4 * 4 * 16 * 25,
        "pointwise_conv_bn_act": 2 * 2 * 9 * 7 * 16 * 16,
        "conv_bn_act": 2 * 2 * 4 * 4 * 16 * 16 * 9,
        "squeeze_excite_gate": 2 * 2 * 2 * 16 * 4,
    }
    for op, flops in expected.items():
        with FlopCounterMode(display=False) as counter:
            getattr(OPS, op).reference(*_example(op, torch.float32, 2))
        assert counter.get_total_flops() == flops, op


X, W, N = torch.ones(2, 16, 8, 8), torch.ones(16, 1, 3, 3), norm(16)
PW = torch.ones(8, 16, 1, 1)
GOOD = {"stride": 1, "padding": (1, 1, 1, 1), "activation": "silu", "squeeze": True}
BAD = [
    (lambda: ops.depthwise_conv_bn_act(X[:, :8], W, N, **GOOD), ValueError, "weight has 16 channels, x has 8"),
    (lambda: ops.depthwise_conv_bn_act(X[0], W, N, **GOOD), ValueError, "x has 3 dimensions"),
    (lambda: ops.depthwise_conv_bn_act(X[None], W, N, **GOOD), ValueError, "x has 5 dimensions"),
    (lambda: ops.depthwise_conv_bn_act(X.int(), W, N, **GOOD), TypeError, "x is torch.int32"),
    (lambda: ops.depthwise_conv_bn_act(X, W.repeat(1, 2, 1, 1), N, **GOOD), ValueError, r"weight is \(16, 2, 3, 3\)"),
    (lambda: ops.depthwise_conv_bn_act(X, W, N, **{**GOOD, "padding": (-1, 0, 0, 0)}), ValueError, "padding is"),
    (lambda: ops.depthwise_conv_bn_act(X, W, N, **{**GOOD, "padding": (1, 1)}), ValueError, "four numbers"),
    (lambda: ops.depthwise_conv_bn_act(X, W, N, **{**GOOD, "stride": 0}), ValueError, "stride is 0"),
    (lambda: ops.depthwise_conv_bn_act(X, W, N, **{**GOOD, "activation": "gelu"}), ValueError, "'gelu'"),
    (lambda: ops.depthwise_conv_bn_act(X[:, :, :1], W, N, **{**GOOD, "padding": (0,) * 4}), ValueError, "larger than the padded"),
    (lambda: ops.depthwise_conv_bn_act(X, W, norm(8), **GOOD), ValueError, "norm has 8 channels"),
    (lambda: ops.depthwise_conv_bn_act(X, W.to("meta"), N, **GOOD), ValueError, "weight on meta"),
    (lambda: ops.depthwise_conv_bn_act(X.double(), W, N, **GOOD), TypeError, "the norm is torch.float32"),
    (lambda: ops.depthwise_conv_bn_act(X.clone().requires_grad_(), W, N, **GOOD), RuntimeError, "no gradient"),
    (lambda: ops.pointwise_conv_bn_act(X, W, N, activation="silu"), ValueError, "weight has 1 channels"),
    (lambda: ops.pointwise_conv_bn_act(X, PW, norm(8), gate=torch.ones(2, 8), activation="silu"), ValueError, "gate is"),
    (lambda: ops.pointwise_conv_bn_act(X, PW, norm(8), residual=X, activation="silu"), ValueError, "residual is"),
    (lambda: ops.pointwise_conv_bn_act(X, torch.ones(16, 16, 3, 3), N, activation="silu"), ValueError, r"\[K, C, 1, 1\]"),
    (lambda: ops.conv_bn_act(X, PW, norm(8), stride=1, padding=(0,) * 4, activation="silu", residual=X), ValueError, "residual is"),
    (lambda: ops.squeeze_excite_gate(X, 4, PW, None, PW, None, activation="silu"), ValueError, "partial is"),
    (
        lambda: ops.squeeze_excite_gate(torch.ones(1, 1, 4), 4, PW, None, PW, None, activation="silu"),
        ValueError,
        "reduce_weight is",
    ),
    (
        lambda: ops.squeeze_excite_gate(torch.ones(1, 1, 16), 0, PW, None, PW, None, activation="silu"),
        ValueError,
        "count is 0",
    ),
]


@pytest.mark.parametrize(("call", "error", "says"), BAD, ids=[says for _, _, says in BAD])
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_compiled_module_that_is_there_is_used():
    """Or the tests of its kernels would all be skipped where it only wants building again."""
    assert native.REASON is None or list(Path(native.__file__).parent.parent.glob("_C*.so")) == [], native.REASON


def test_backend_choice(monkeypatch):
    partial = torch.zeros(1, 1, 16)
    with backends.tracing() as trace:
        backends.choose("squeeze_excite_gate", partial)
        with effnet_fast.backend("reference"):
            backends.choose("squeeze_excite_gate", partial)
    assert trace[1].backend == "reference"
    assert set(trace[1].refused) == {"native", "triton"}
    with pytest.raises(ValueError, match="'cudnn' is not a backend"), effnet_fast.backend("cudnn"):
        pass
    if all(reason is not None for reason in backends.reasons()["triton"].values()):
        with pytest.raises(RuntimeError, match="'triton' cannot run any op"), effnet_fast.backend("triton"):
            pass


def test_strict_request_names_the_reason():
    if backends.reasons()["native"]["squeeze_excite_gate"] is not None:
        pytest.skip(backends.reasons()["native"]["squeeze_excite_gate"])
    half = torch.zeros(1, 1, 16, dtype=torch.float64)
    with effnet_fast.backend("native"):
        assert backends.choose("squeeze_excite_gate", half).backend == "reference"
    with effnet_fast.backend("native", strict=True), pytest.raises(RuntimeError, match="takes float32"):
        backends.choose("squeeze_excite_gate", half)


def test_request_is_per_thread():
    import threading

    seen = []
    with effnet_fast.backend("reference", strict=True):
        thread = threading.Thread(target=lambda: seen.append(backends._STATE.requested))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize(("value", "says"), [("reference", "reference"), ("nonsense", "not a backend")])
def test_environment(value, says):
    import os
    import subprocess
    import sys

    code = "from effnet_fast.ops import backends; print(backends._STATE.requested)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "EFFNET_FAST_BACKEND": value}, capture_output=True, text=True
    )
    assert says in done.stdout + done.stderr and (done.returncode == 0) == (value == "reference")
