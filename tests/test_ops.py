"""The ops: each backend against the fp64 reference, registration, dtypes, strides, bad input, the choice of backend."""

from __future__ import annotations

from pathlib import Path

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_2x
from torch.autograd import forward_ad

import effnet_fast
from effnet_fast import ops
from effnet_fast.ops import backends, native

OPS = torch.ops.effnet_fast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OF_INFERENCE = sorted(op for op in backends._KERNELS if hasattr(ops, op))  # the others are in test_training_ops.py
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
        larger = x.new_full((x.shape[0], x.shape[1] + 3, x.shape[2] + 1, x.shape[3] + 2), float("nan"))
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
        assert_2x(partial.sum(1), y.float().sum((2, 3)), total, f"partial, {activation}")
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


def example(op: str, dtype: torch.dtype, images: int) -> tuple:
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x, n = torch.randn(images, 16, 9, 7).to(dtype), norm(16, parameters)
    if op == "global_average_pool":
        return (x,)
    if op == "depthwise_conv_bn_act":
        return x, torch.randn(16, 1, 5, 5).to(parameters), *n, 2, [1, 2, 2, 2], "silu", 1
    if op == "expand_depthwise_conv_bn_act":
        wide_norm, expand = norm(24, parameters), torch.randn(24, 16, 1, 1).to(parameters)
        return x, expand, *wide_norm, torch.randn(24, 1, 3, 3).to(parameters), *wide_norm, 1, [1, 1, 0, 1], "relu6", 1
    if op == "pointwise_conv_bn_act":
        gate = torch.rand(images, 16, dtype=parameters)
        return x, torch.randn(16, 16, 1, 1).to(parameters), *n, gate, x.clone(), "identity"
    if op == "conv_bn_act":
        return x, torch.randn(16, 16, 3, 3).to(parameters), *n, None, 2, [0, 1, 1, 1], "relu6", None
    reduce, expand = torch.randn(4, 16, 1, 1).to(parameters), torch.randn(16, 4, 1, 1).to(parameters)
    return torch.randn(images, 2, 16, dtype=parameters), 63, reduce, torch.randn(4).to(parameters), expand, None, "silu"


def having(backend: str) -> list[str]:
    """The ops that have a kernel for it."""
    return [op for op in OF_INFERENCE if any(kernel.backend == backend for kernel in backends._KERNELS[op])]


@pytest.mark.parametrize("images", [2, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OF_INFERENCE)
def test_opcheck(op, dtype, images):
    torch.manual_seed(0)
    args = example(op, dtype, images)
    for kernel in backends._KERNELS[op]:
        if kernel.can_run(args[0]) is None:
            torch.library.opcheck(getattr(getattr(OPS, op), kernel.backend), args)


def outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def in_double(op: str, args: tuple, norms: bool) -> list:
    """The weights and biases in float64, and the norm's vectors where asked for; the values stay the same."""
    names = [argument.name for argument in getattr(OPS, op).reference._schema.arguments]
    chosen = [name.endswith(("weight", "bias")) and "norm_" not in name for name in names]
    chosen = [one or (norms and "norm_" in name) for one, name in zip(chosen, names, strict=True)]
    return [wide(value) if one else value for one, value in zip(chosen, args, strict=True)]


def check_parameters_in_double(op: str, backend: str, args: tuple) -> None:
    """The reference takes a norm as PyTorch's batch norm does: not in float64 beside another x."""
    run = getattr(getattr(OPS, op), backend)
    for norms in (False, True) if backend != "reference" else (False,):
        for made, expected in zip(outputs(run(*in_double(op, args, norms))), outputs(run(*args)), strict=True):
            assert torch.equal(made, expected) and made.dtype == expected.dtype, backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OF_INFERENCE)
def test_parameters_in_double_beside_another_x(op, dtype):
    torch.manual_seed(0)
    args = example(op, dtype, 2)
    # The processor may be one on which another backend is faster, but not one that the native kernel cannot run on.
    for backend in ["reference"] if native.REASON is not None or op == "expand_depthwise_conv_bn_act" else ["native", "reference"]:
        check_parameters_in_double(op, backend, args)


def test_flop_formulas():
    from torch.utils.flop_counter import FlopCounterMode

    expected = {
        "depthwise_conv_bn_act": 2 * 2 * 4 * 4 * 16 * 25,
        "expand_depthwise_conv_bn_act": 2 * 2 * (9 * 7 * 24 * 16 + 9 * 6 * 24 * 9),
        "pointwise_conv_bn_act": 2 * 2 * 9 * 7 * 16 * 16,
        "conv_bn_act": 2 * 2 * 4 * 4 * 16 * 16 * 9,
        "squeeze_excite_gate": 2 * 2 * 2 * 16 * 4,
        "global_average_pool": 2 * 16 * 9 * 7,
    }
    for op, flops in expected.items():
        with FlopCounterMode(display=False) as counter:
            getattr(OPS, op).reference(*example(op, torch.float32, 2))
        assert counter.get_total_flops() == flops, op


def good(op: str, device: str = "cpu") -> dict:
    """Arguments that every kernel of the op takes, by their names in its schema."""
    sizes = {
        "depthwise_conv_bn_act": {"x": (2, 16, 8, 8), "weight": (16, 1, 3, 3)},
        "expand_depthwise_conv_bn_act": {"x": (2, 16, 8, 8), "expand_weight": (16, 16, 1, 1), "weight": (16, 1, 3, 3)},
        "pointwise_conv_bn_act": {"x": (2, 16, 8, 8), "weight": (16, 16, 1, 1), "gate": (2, 16), "residual": (2, 16, 8, 8)},
        "global_average_pool": {"x": (2, 16, 8, 8)},
        "conv_bn_act": {"x": (2, 3, 8, 8), "weight": (16, 3, 3, 3), "residual": (2, 16, 4, 4)},
        "squeeze_excite_gate": {"partial": (2, 3, 16), "reduce_weight": (4, 16, 1, 1), "reduce_bias": 4}
        | {"expand_weight": (16, 4, 1, 1), "expand_bias": 16},
    }[op]
    others = {
        "activation": "silu",
        "norm_eps": 1e-3,
        "expand_norm_eps": 1e-3,
        "stride": 2,
        "padding": [1, 1, 1, 1],
        "pieces": 1,
        "count": 64,
        "pixels": None,
    }
    names = [argument.name for argument in getattr(OPS, op).reference._schema.arguments]
    return {name: others[name] if name in others else torch.ones(sizes.get(name, 16), device=device) for name in names}


def public(op: str, args: dict):
    """The op's public function, called with the arguments of its schema."""
    args = dict(args)
    for norm in ("norm", "expand_norm"):
        if f"{norm}_eps" in args:
            args[norm] = ops.Norm(*(args.pop(f"{norm}_{name}") for name in ("weight", "bias", "mean", "var", "eps")))
    if "pieces" in args:
        args["squeeze"] = args.pop("pieces") > 0
    return getattr(ops, op)(**args)


def check_refused(op: str, backend: str, args: dict, error: type[Exception], says: str) -> None:
    """By the public function whatever backend is asked for, and by the overload; the compiled module has words of its own."""
    with effnet_fast.backend(backend), pytest.raises(error, match=f"^{op}: .*({says})"):
        public(op, args)
    native = backend == "native"
    with pytest.raises((RuntimeError, error) if native else error, match=f"^{op}: " + ("" if native else f".*({says})")):
        getattr(getattr(OPS, op), backend)(*args.values())


SPOILT = {
    "without dimensions": (lambda t: t.sum(), ValueError),
    "with another dimension": (lambda t: t[None], ValueError),
    "longer": (lambda t: torch.cat([t, t[:1]]), ValueError),
    "int32": (lambda t: t.int(), TypeError),
    "complex64": (lambda t: t.to(torch.complex64), TypeError),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), TypeError),
    "on another device": (lambda t: t.to("meta"), ValueError),
}


def check_every_tensor(op: str, backend: str, device: str) -> None:
    """Each is spoilt in each way; it is then the one that is named, unless the others are held to it."""
    args = good(op, device)
    with effnet_fast.backend(backend, strict=True):
        public(op, args)
    for name, tensor in args.items():
        for how, (spoil, error) in SPOILT.items() if isinstance(tensor, torch.Tensor) else ():
            if op == "global_average_pool" and how in ("longer", "on another device"):
                continue  # as good as before: there is no other tensor
            named = name.replace("norm_", "norm.")
            if name in ("weight", "expand_weight") and "norm_eps" in args and how == "longer":
                named = "norm|weight"
            elif name == "reduce_weight" and how == "longer":
                named = "reduce_bias"
            elif name in ("x", "partial") and how == "on another device":
                named = "weight is on"
            elif name in ("x", "partial") and how == "longer":
                if "residual" not in args:
                    continue  # as good as before
                named = "gate|residual"
            check_refused(op, backend, {**args, name: spoil(tensor)}, error, named)


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("op", OF_INFERENCE)
def test_every_tensor_is_checked(op, backend):
    if (reason := backends.reasons()[backend][op]) is not None:
        pytest.skip(reason)
    check_every_tensor(op, backend, "cpu")


BF16, FP64 = torch.bfloat16, torch.float64
CONV = [
    ("x", (2, 0, 8, 8), ValueError, r"x is \(2, 0, 8, 8\); \[N, C, H, W\] with C, H and W >= 1 would do"),
    ("x", (2, 16, 0, 8), ValueError, "C, H and W >= 1"),
    ("weight", (0, 1, 3, 3), ValueError, "with no size of 0 would do"),
    ("weight", (16, 1, 0, 3), ValueError, "with no size of 0 would do"),
    ("weight", (16, 2, 3, 3), ValueError, r"weight is \(16, 2, 3, 3\); \(16, "),
    ("norm_var", (8,), ValueError, r"norm.var is \(8,\); \(16,\) would do"),
    ("norm_weight", (8,), ValueError, r"norm.weight is \(8,\)"),
    ("norm_mean", (16, 3), ValueError, r"norm.mean is \(16, 3\)"),
    ("norm_var", ((16,), BF16), TypeError, "norm.var is torch.bfloat16; torch.float32 would do"),
    ("norm_bias", ((16,), FP64), TypeError, "norm.bias is torch.float64; torch.float32 would do"),
    ("activation", "gelu", ValueError, "activation is 'gelu'; one of silu, relu, relu6, identity would do"),
]
WINDOW = [
    ("stride", 0, ValueError, "stride is 0; an integer >= 1 would do"),
    ("stride", -1, ValueError, "stride is -1"),
    ("padding", [-1, 0, 0, 0], ValueError, r"padding is \[-1, 0, 0, 0\]; four integers >= 0 \(top, bottom, left, right\) would do"),
    ("padding", [1, 1], ValueError, r"padding is \[1, 1\]"),
    ("padding", [], ValueError, r"padding is \[\]"),
]
BAD = {
    "global_average_pool": [("x", (2, 0, 8, 8), ValueError, r"x is \(2, 0, 8, 8\); \[N, C, H, W\] with C, H and W >= 1 would do")],
    "depthwise_conv_bn_act": [
        *CONV,
        *WINDOW,
        ("x", (2, 8, 8, 8), ValueError, r"weight is \(16, 1, 3, 3\); \(8, 1, 3, 3\) would do"),
        ("weight", (32, 1, 3, 3), ValueError, r"weight is \(32, 1, 3, 3\); \(16, 1, 3, 3\) would do"),
        ("weight", (16, 1, 11, 11), ValueError, r"kernel 11x11 is larger than the padded x, 8x8 and \(1, 1, 1, 1\)"),
        ("pieces", -1, ValueError, "pieces is -1; an integer >= 0 would do"),
    ],
    "expand_depthwise_conv_bn_act": [
        *CONV,
        *WINDOW,
        ("x", (2, 8, 8, 8), ValueError, r"expand_weight is \(16, 16, 1, 1\); \(16, 8, 1, 1\) would do"),
        ("expand_weight", (24, 16, 1, 1), ValueError, r"expand_norm.weight is \(16,\); \(24,\) would do"),
        ("expand_weight", (16, 16, 3, 3), ValueError, r"expand_weight is \(16, 16, 3, 3\); \(16, 16, 1, 1\) would do"),
        ("weight", (24, 1, 3, 3), ValueError, r"weight is \(24, 1, 3, 3\); \(16, 1, 3, 3\) would do"),
        ("expand_norm_mean", (8,), ValueError, r"expand_norm.mean is \(8,\); \(16,\) would do"),
        ("pieces", -1, ValueError, "pieces is -1; an integer >= 0 would do"),
    ],
    "pointwise_conv_bn_act": [
        *CONV,
        ("residual", (2, 16, 8, 7), ValueError, r"residual is \(2, 16, 8, 7\); \(2, 16, 8, 8\) would do"),
        ("residual", ((2, 16, 8, 8), BF16), TypeError, "residual is torch.bfloat16; torch.float32 would do"),
        ("gate", (2, 8), ValueError, r"gate is \(2, 8\); \(2, 16\) would do"),
        ("gate", (2, 16, 1, 1), ValueError, "gate is"),
        ("gate", ((2, 16), BF16), TypeError, "gate is torch.bfloat16; torch.float32 would do"),
        ("gate", ((2, 16), FP64), TypeError, "gate is torch.float64; torch.float32 would do"),
    ],
    "conv_bn_act": [
        *CONV,
        *WINDOW,
        ("weight", (16, 3, 11, 3), ValueError, r"kernel 11x3 is larger than the padded x, 8x8 and \(1, 1, 1, 1\)"),
        ("residual", (2, 16, 8, 8), ValueError, r"residual is \(2, 16, 8, 8\); \(2, 16, 4, 4\) would do"),
        ("residual", ((2, 16, 4, 4), FP64), TypeError, "residual is torch.float64; torch.float32 would do"),
    ],
    "squeeze_excite_gate": [
        ("partial", (2, 0, 16), ValueError, r"partial is \(2, 0, 16\); \[N, P, C\] with P and C >= 1 would do"),
        ("partial", (2, 3, 0), ValueError, "P and C >= 1"),
        ("partial", (2, 3, 8), ValueError, r"reduce_weight is \(4, 16, 1, 1\); \(4, 8, 1, 1\) would do"),
        ("partial", ((2, 3, 16), BF16), TypeError, "partial is torch.bfloat16; torch.float32 or torch.float64 would do"),
        ("count", 0, ValueError, "count is 0; an integer >= 1 would do"),
        ("count", -5, ValueError, "count is -5"),
        ("reduce_weight", (0, 16, 1, 1), ValueError, "R >= 1"),
        ("reduce_weight", (4, 16, 3, 3), ValueError, r"reduce_weight is \(4, 16, 3, 3\); \(4, 16, 1, 1\) would do"),
        ("reduce_bias", (3,), ValueError, r"reduce_bias is \(3,\); \(4,\) would do"),
        ("reduce_bias", ((4,), FP64), TypeError, "reduce_bias is torch.float64; torch.float32 would do"),
        ("expand_weight", (16, 4, 2, 2), ValueError, r"expand_weight is \(16, 4, 2, 2\); \(16, 4, 1, 1\) would do"),
        ("expand_weight", ((16, 4, 1, 1), BF16), TypeError, "expand_weight is torch.bfloat16; torch.float32 would do"),
        ("expand_bias", (3,), ValueError, r"expand_bias is \(3,\); \(16,\) would do"),
        ("activation", "gelu", ValueError, "activation is 'gelu'; one of silu, relu, relu6, identity would do"),
    ],
}


def check_bad_input(op: str, backend: str, device: str) -> None:
    args = good(op, device)
    for name, value, error, says in BAD[op]:
        if name == "pieces":  # the public functions choose it
            with pytest.raises(RuntimeError if backend == "native" else error, match=name if backend == "native" else says):
                getattr(getattr(OPS, op), backend)(*{**args, name: value}.values())
            continue
        if isinstance(value, tuple):
            shape, dtype = value if isinstance(value[0], tuple) else (value, torch.float32)
            value = torch.ones(shape, dtype=dtype, device=device)
        check_refused(op, backend, {**args, name: value}, error, says)


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("op", OF_INFERENCE)
def test_bad_input(op, backend):
    if (reason := backends.reasons()[backend][op]) is not None:
        pytest.skip(reason)
    check_bad_input(op, backend, "cpu")


# What the schemas have no place for, so that only the public functions can say what would do.
MISTYPED = [
    ("depthwise_conv_bn_act", "stride", (1, 1), r"stride is \(1, 1\); an integer >= 1 would do"),
    ("depthwise_conv_bn_act", "stride", 1.0, "stride is 1.0; an integer"),
    ("depthwise_conv_bn_act", "padding", 1, "padding is 1; four integers"),
    ("conv_bn_act", "padding", (1.0, 1, 1, 1), r"padding is \(1.0, 1, 1, 1\); four integers"),
    ("pointwise_conv_bn_act", "activation", None, "activation is None; one of"),
    ("squeeze_excite_gate", "count", 64.5, "count is 64.5; an integer >= 1 would do"),
    ("pointwise_conv_bn_act", "norm_eps", "1e-3", "norm.eps is '1e-3'; a number would do"),
    *(
        (op, name, value, rf"{name.replace('norm_', 'norm.')} is {kind}; a torch.Tensor would do")
        for op, names in {
            "depthwise_conv_bn_act": ("x", "weight", "norm_weight", "norm_mean", "norm_var"),
            "pointwise_conv_bn_act": ("gate", "residual"),
            "squeeze_excite_gate": ("partial", "reduce_weight", "reduce_bias", "expand_weight"),
        }.items()
        for name in names
        for value, kind in ((np.ones(3), "ndarray"), ([1.0], "list"), (None, "NoneType"))
        if value is not None or name in ("x", "weight", "norm_mean", "norm_var", "partial", "reduce_weight", "expand_weight")
    ),
]


@pytest.mark.parametrize(("op", "name", "value", "says"), MISTYPED, ids=str)
def test_mistyped(op, name, value, says):
    with pytest.raises((ValueError, TypeError), match=f"^{op}: {says}"):
        public(op, {**good(op), name: value})


@pytest.mark.parametrize("op", OF_INFERENCE)
def test_sparse_tensors_are_refused(op):
    args = good(op)
    for name, tensor in args.items():
        if name in ("x", "weight", "gate", "residual", "partial", "reduce_weight", "expand_weight"):
            with pytest.raises(TypeError, match=f"^{op}: {name} is torch.sparse_coo; torch.strided would do"):
                public(op, {**args, name: tensor.to_sparse()})


@pytest.mark.parametrize("op", OF_INFERENCE)
def test_gradients_are_refused(op):
    """In every tensor; and only where they are recorded."""
    args = good(op)
    for name, tensor in args.items():
        if isinstance(tensor, torch.Tensor):
            asking = {**args, name: tensor.clone().requires_grad_()}
            with pytest.raises(RuntimeError, match=f"^{op}: it has no gradient"):
                public(op, asking)
            with torch.no_grad():
                public(op, asking)
            with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match=f"^{op}: it has no gradient"):
                public(op, {**args, name: forward_ad.make_dual(tensor, torch.ones_like(tensor))})


@pytest.mark.parametrize("dtype", [*DTYPES, FP64], ids=str)
@pytest.mark.parametrize("parameters", [*DTYPES, FP64], ids=str)
def test_reference_takes_norms_of_any_dtype(dtype, parameters):
    """Even those that PyTorch's batch norm does not; in fp32, or fp64 beside fp64."""
    torch.manual_seed(0)
    x, weight, n = torch.randn(2, 16, 5, 5).to(dtype), torch.randn(16, 16, 1, 1), norm(16, parameters)
    converted = ops.Norm(*(t.to(FP64 if dtype == FP64 else torch.float32) for t in n[:4]), n.eps)
    with effnet_fast.backend("reference", strict=True):
        y, expected = (ops.pointwise_conv_bn_act(x, weight, some, activation="silu") for some in (n, converted))
    torch.testing.assert_close(y, expected)


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
    with (
        effnet_fast.backend("native", strict=True),
        pytest.raises(RuntimeError, match="float64, but for torch.float32"),
    ):
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
