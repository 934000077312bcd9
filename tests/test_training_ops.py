"""Training's ops: each backend by the 2x rule against autograd in fp64; registration; bad input."""

from __future__ import annotations

import cases
import pytest
import torch
import torch.nn.functional as F
from plain import channels_last
from tolerance import assert_2x

from effnet_fast.ops import backends, native, training

OPS = torch.ops.effnet_fast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [case for case in cases.REDUCED if case.images] + [
    cases.Case(3, 48, 30, 31, 5, 2, cases.symmetric(5)),  # of several groups of rings, and rows that no window sees
    cases.Case(1, 144, 9, 10, 3, 2, (0, 0, 0, 0)),
    cases.Case(2, 160, 16, 16, 5, 1, (3, 1, 0, 4)),
]
POINTWISE = [  # images, in, out, height, width
    (2, 16, 24, 7, 9),
    (3, 40, 13, 5, 5),
    (1, 13, 40, 12, 31),
    (2, 1, 3, 3, 2),
    (2, 33, 67, 23, 29),
    (5, 96, 24, 8, 8),
    (2, 900, 48, 6, 5),  # more than a slice of the GEMM's, and of weights more than a panel
    (4, 8, 8, 1, 1),
    (1, 304, 24, 5, 4),  # just more than the backward's columns, and two of those and more
    (2, 300, 8, 3, 5),
    (1, 620, 40, 7, 6),
]
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "relu6": F.relu6, "identity": lambda x: x}


def made(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(shape) * scale + shift


def norm_of(channels: int) -> torch.Tensor:
    return torch.stack([made(channels), torch.rand(channels) + 0.5, made(channels)])


def plain_read(x, norm, activation, gate):
    """As modules would, in x's dtype: normalised, activated, gated."""
    if norm is None:
        return x
    mean, scale, bias = (row.to(x.dtype).view(1, -1, 1, 1) for row in norm)
    a = ACTIVATIONS[activation]((x - mean) * scale + bias)
    return a if gate is None else a * gate.to(x.dtype)[:, :, None, None]


def plain_conv(x, weight, norm, activation, gate, stride, padding):
    top, bottom, left, right = padding
    a = F.pad(plain_read(x, norm, activation, gate), (left, right, top, bottom))
    return F.conv2d(a, weight.to(x.dtype), stride=stride, groups=x.shape[1] // weight.shape[1])


def wide(*values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


def of_channel(vector):
    return vector.view(1, -1, 1, 1)


def plain_gradient(grad, y, y_norm, coefficients, y_activation, y_gate, y_pool):
    """The gradient of y, by autograd through the norm and activation, in y's dtype."""
    u = (y - of_channel(y_norm[0].to(y.dtype))) * of_channel(y_norm[1].to(y.dtype)) + of_channel(y_norm[2].to(y.dtype))
    u.requires_grad_()
    g = grad if y_gate is None else grad * y_gate.to(y.dtype)[:, :, None, None]
    g = g if y_pool is None else g + y_pool.to(y.dtype)[:, :, None, None]
    with torch.enable_grad():
        (g,) = torch.autograd.grad(ACTIVATIONS[y_activation](u), u, g)
    a, b, c = (of_channel(row.to(y.dtype)) for row in coefficients)
    return a * g + b * (y - of_channel(y_norm[0].to(y.dtype))) + c


def plain_backward(grad, y, y_norm, coefficients, y_activation, y_gate, y_pool, x, weight, norm, activation, gate, residual, *conv):
    """grad_x, grad_weight and the sums, by autograd, in x's dtype; sums as the package says."""
    g = plain_gradient(grad, y, y_norm, coefficients, y_activation, y_gate, y_pool)
    weight = weight.to(x.dtype).requires_grad_()
    with torch.enable_grad():
        a = plain_read(x, norm, activation, gate).detach().requires_grad_()
        z, grad_weight = torch.autograd.grad(plain_conv(a, weight, None, "identity", None, *conv), (a, weight), g)
    sums, total = torch.empty(0), torch.float64 if x.dtype == torch.float64 else torch.float32
    if norm is not None:
        mean, scale, bias = (of_channel(row) for row in norm)
        u = ((x.to(total) - mean) * scale + bias).requires_grad_()
        with torch.enable_grad():
            value = ACTIVATIONS[activation](u)
            (slope,) = torch.autograd.grad(value.sum(), u) if activation != "identity" else (torch.ones_like(u),)
        centred, product = x.to(total) - mean, z.to(total) * slope
        if gate is None:
            z = product.to(x.dtype)
            sums = torch.stack([product.sum((0, 2, 3)), (product * centred).sum((0, 2, 3))])
        else:
            terms = (z.to(total) * value.detach(), product, slope, product * centred, slope * centred)
            sums = torch.stack([term.sum((2, 3)) for term in terms], 1)
    return z if residual is None else z + residual, grad_weight, sums


def check_stats(x, weight, norm, activation, gate, stride, padding):
    """Returns what it made of it."""
    y, mean, var = training.conv_stats(x, weight, norm, activation=activation, gate=gate, stride=stride, padding=padding)
    conv = (x, weight, norm, activation, gate, stride, padding)
    assert_2x(y, plain_conv(*conv), plain_conv(*wide(*conv)), "y")
    assert y.is_contiguous(memory_format=torch.channels_last)
    plain_var, plain_mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert_2x(mean, plain_mean, exact_mean, "mean")
    assert_2x(var, plain_var, exact_var, "var")
    return y, mean, var


def check_conv(x, weight, norm, activation, gate, stride, padding, y_parts=(), residual=False, dtype=torch.float32):
    x = channels_last(x.to(dtype))
    y, *_ = check_stats(x, weight, norm, activation, gate, stride, padding)

    y_activation, with_gate, with_pool = y_parts or ("identity", False, False)
    images, outs = y.shape[:2]
    y_gate = torch.rand(images, outs) + 0.5 if with_gate else None
    y_pool = made(images, outs) if with_pool else None
    scale = 0.25 if dtype == torch.float16 else 1.0  # or gradients of weights overflow
    args = [channels_last(made(*y.shape).to(dtype)), y, norm_of(outs), made(3, outs, scale=scale), y_activation, y_gate, y_pool]
    args += [x, weight, norm, activation, gate, channels_last(made(*x.shape).to(dtype)) if residual else None]
    keywords = {"activation": activation, "gate": gate, "stride": stride, "padding": padding, "residual": args[-1]}
    keywords |= {"y_activation": y_activation, "y_gate": y_gate, "y_pool": y_pool}
    out = training.conv_backward(*args[:4], x, weight, norm, **keywords)
    plain = plain_backward(*args, stride, padding)
    exact = plain_backward(*wide(*args), stride, padding)
    for name, ours, theirs, reference in zip(("grad_x", "grad_weight", "sums"), out, plain, exact, strict=True):
        assert_2x(ours, theirs.to(ours.dtype), reference.double(), f"{name} {keywords['stride']}")
    only_x, none, sums = training.conv_backward(*args[:4], x, weight, norm, **keywords, need_weight=False)
    assert none.shape == (0,) and torch.equal(only_x, out[0]) and torch.equal(sums, out[2])
    none, only_weight, sums = training.conv_backward(*args[:4], x, weight, norm, **keywords, need_x=False)
    assert none.shape == sums.shape == (0,) and torch.equal(only_weight, out[1])


@pytest.fixture(params=["reference", "native"], autouse=True)
def backend(request):
    if request.param == "native" and native.REASON is not None:
        pytest.skip(native.REASON)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    with backends.backend(request.param, strict=request.param == "native"), torch.no_grad():
        yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_depthwise(case, dtype, backend):
    torch.manual_seed(0)
    x = made(case.images, case.channels, case.height, case.width)
    scale = 1 / case.kernel if dtype == torch.float16 else 1.0  # or its gradients overflow
    weight = made(case.channels, 1, case.kernel, case.kernel, scale=scale)
    for activation in ("silu", "relu6"):
        parts = ("silu", True, True) if activation == "silu" else ("identity", False, False)
        check_conv(x, weight, norm_of(case.channels), activation, None, case.stride, case.padding, parts, dtype=dtype)
    check_conv(x, weight, None, "identity", None, case.stride, case.padding, ("silu", True, True), residual=True, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", POINTWISE, ids=str)
def test_pointwise(shape, dtype):
    torch.manual_seed(0)
    images, channels, outs, height, width = shape
    x, weight = made(images, channels, height, width), made(outs, channels, 1, 1, scale=channels**-0.5)
    gate, rest = torch.rand(images, channels), (1, (0, 0, 0, 0))
    check_conv(x, weight, None, "identity", None, *rest, residual=True, dtype=dtype)
    check_conv(x, weight, norm_of(channels), "silu", None, *rest, ("silu", True, False), dtype=dtype)
    check_conv(x, weight, norm_of(channels), "silu", gate, *rest, ("identity", True, True), dtype=dtype)
    check_conv(x, weight, norm_of(channels), "relu", gate, *rest, ("relu6", False, True), residual=True, dtype=dtype)


FAMILY = sorted({(case.channels, case.out, case.gate) for case in cases.pointwise_shapes()})


@pytest.mark.parametrize("part", range(4))
def test_pointwise_of_the_family(part, backend):
    """Every width of B0 to B7, of few pixels."""
    if backend == "reference":
        pytest.skip("of the kernels")
    torch.manual_seed(0)
    for channels, outs, gated in FAMILY[part::4]:
        x, weight = made(2, channels, 4, 3), made(outs, channels, 1, 1, scale=channels**-0.5)
        norm, gate = (norm_of(channels), torch.rand(2, channels)) if gated else (None, None)
        activation = "silu" if gated else "identity"
        check_conv(x, weight, norm, activation, gate, 1, (0, 0, 0, 0), residual=not gated)


@pytest.mark.parametrize("case", [case for case in cases.depthwise_shapes() if case.height <= 112][::4], ids=str)
def test_depthwise_at_full_size(case, backend):
    if backend == "reference":
        pytest.skip("of the kernels")
    torch.manual_seed(0)
    x, weight = made(2, case.channels, case.height, case.width), made(case.channels, 1, case.kernel, case.kernel)
    check_conv(x, weight, norm_of(case.channels), "silu", None, case.stride, case.padding, ("silu", True, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_dense(stride, dtype):
    torch.manual_seed(0)
    x, weight = made(2, 6, 9, 8), made(10, 6, 3, 3, scale=0.2)
    for padding in ((1, 1, 1, 1), (1, 1, 0, 1)):
        check_conv(x, weight, norm_of(6), "silu", None, stride, padding, ("silu", False, True), residual=True, dtype=dtype)
    check_conv(x, weight, None, "identity", None, stride, (0, 2, 1, 0), ("relu", True, False), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 24, 7, 9), (2, 13, 5, 1), (4, 3, 7, 5), (2, 160, 20, 20)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norm_act(activation, shape, dtype):
    torch.manual_seed(0)
    y, norm, gate = channels_last(made(*shape).to(dtype)), norm_of(shape[1]), torch.rand(shape[:2])
    for g, residual in ((None, None), (gate, channels_last(made(*shape).to(dtype)))):
        out = training.norm_act(y, norm, activation, g, residual)

        def plain(y, norm, g, residual):
            a = plain_read(y, norm, activation, g)
            return a if residual is None else a + residual

        assert_2x(out, plain(y, norm, g, residual), plain(*wide(y, norm, g, residual)), "norm_act")
        assert out.is_contiguous(memory_format=torch.channels_last)
        grad = channels_last(made(*shape).to(dtype))
        sums = training.norm_act_sums(grad, y, norm, activation, g)
        coefficients = torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, shape[1])

        def plain_sums(grad, y, norm, coefficients, g):
            made = plain_gradient(grad, y, norm, coefficients, activation, g, None)
            centred = y - of_channel(norm[0])
            return torch.stack([made.sum((0, 2, 3)), (made * centred).sum((0, 2, 3))])

        arguments = (grad.float(), y.float(), norm, coefficients, g)
        assert_2x(sums, plain_sums(*arguments), plain_sums(*wide(*arguments)), "norm_act_sums")
    mean = training.norm_act_mean(y, norm, activation)
    plain_mean, exact = (
        plain_read(*wide_or_not, activation, None).mean((2, 3)) for wide_or_not in ((y.float(), norm), wide(y, norm))
    )
    assert_2x(mean, plain_mean, exact, "norm_act_mean")


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("channels", [1, 13, 128, 1153])
def test_norm_vectors(channels, dtype):
    """Of weights and biases of any dtype and strides, or none."""
    torch.manual_seed(0)
    mean, var = made(channels), torch.rand(2 * channels)[::2]
    for affine in ((None, None), (made(channels).to(dtype), made(2 * channels).to(dtype)[::2])):
        norm, inverse = training.norm_vectors(mean, var, *affine, 1e-3)
        plain, exact = plain_vectors(mean, var, *affine), plain_vectors(*wide(mean, var, *affine))
        assert torch.equal(norm[0], mean) and norm.is_contiguous()
        for name, found, *expected in zip(("inverse", "scale", "bias"), (inverse, *norm[1:]), plain, exact, strict=True):
            assert_2x(found, *expected, name)


def plain_vectors(mean, var, weight, bias):
    inverse = 1 / torch.sqrt(var + 1e-3)
    scale = inverse if weight is None else inverse * weight.to(mean.dtype)
    return inverse, scale, torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)


@pytest.mark.parametrize("values", [None, 1, 37, 2**33])
@pytest.mark.parametrize("channels", [1, 13, 128, 1153])
def test_norm_coefficients(channels, values):
    torch.manual_seed(0)
    sums, norm, inverse = made(2, channels, scale=10), norm_of(channels), (torch.rand(2 * channels) + 0.1)[::2]
    coefficients, grad_weight = training.norm_coefficients(sums, norm, inverse, values)
    plain, exact = plain_coefficients(sums, norm, inverse, values), plain_coefficients(*wide(sums, norm, inverse, values))
    assert torch.equal(coefficients[0], norm[1]) and coefficients.is_contiguous()
    for name, found, *expected in zip(("of y", "shift", "weight"), (*coefficients[1:], grad_weight), plain, exact, strict=True):
        assert_2x(found, *expected, name)


def plain_coefficients(sums, norm, inverse, values):
    """arXiv 1502.03167, section 3: the mean's and the variance's gradients, times what of them depends on y."""
    if values is None:
        return torch.zeros_like(inverse), torch.zeros_like(inverse), sums[1] * inverse
    of_var, of_mean = -norm[1] * sums[1] * inverse**2 / 2, -norm[1] * sums[0]
    return of_var * 2 / values, of_mean / values, sums[1] * inverse


def test_vectors_that_are_not_finite_go_through():
    var = torch.tensor([float("inf"), float("nan"), 0.0, -1.0])
    _, inverse = training.norm_vectors(var, var, None, None, 0.0)
    torch.testing.assert_close(inverse, torch.rsqrt(var), equal_nan=True)
    sums, norm = torch.stack([var, torch.ones_like(var)]), torch.ones(3, 4)
    coefficients, grad_weight = training.norm_coefficients(sums, norm, inverse, 4)
    torch.testing.assert_close(coefficients, torch.stack([norm[1], inverse * inverse / -4, var / -4]), equal_nan=True)
    torch.testing.assert_close(grad_weight, inverse, equal_nan=True)


def test_statistics_far_from_zero():
    """Whose squares lose all digits in float32: var is that of the values, not of a difference of large numbers."""
    torch.manual_seed(0)
    x = channels_last(made(4, 16, 20, 20, scale=1e-3, shift=100.0))
    for weight in (torch.eye(16)[:, :, None, None], torch.zeros(16, 1, 3, 3).index_fill(2, torch.tensor(1), 1 / 3)):
        padding = (0,) * 4
        y, mean, var = training.conv_stats(x, weight, None, activation="identity", padding=padding)
        exact, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(var.double(), exact, rtol=1e-4, atol=0)
        torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)


def test_threads_change_rounding_alone(backend):
    """As many threads give the same to the bit; another number of them sums in another order."""
    if backend == "reference":
        pytest.skip("PyTorch's own kernels")
    torch.manual_seed(0)
    x, weight, before = channels_last(made(3, 40, 19, 17)), made(24, 40, 1, 1), torch.get_num_threads()
    taps, grad = made(40, 1, 5, 5), channels_last(made(3, 40, 19, 17))

    norm, gate, coefficients = norm_of(40), torch.rand(3, 40), made(3, 40)
    narrow, narrow_norm, narrow_coefficients = channels_last(made(3, 24, 19, 17)), norm_of(24), made(3, 24)

    def run():
        return (
            *training.conv_stats(x, weight, norm, activation="silu", gate=gate),
            *training.conv_stats(x, taps, norm, activation="silu", padding=(2,) * 4),
            *training.conv_backward(grad, x, norm, coefficients, x, taps, norm, activation="silu", padding=(2,) * 4),
            *training.conv_backward(
                narrow, narrow, narrow_norm, narrow_coefficients, x, weight, norm, activation="silu", gate=gate
            ),
            training.norm_act_sums(grad, x, norm, "silu", gate),
            training.norm_act_mean(x, norm, "silu"),
        )

    try:
        of = {}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            of[threads] = run()
            assert all(torch.equal(a, b) for a, b in zip(of[threads], run(), strict=True))
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        for a, b in zip(of[1], of[threads], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def _arguments(kind: str) -> tuple[list, list]:
    """Of the forward and the backward op."""
    torch.manual_seed(0)
    x = channels_last(made(2, 16, 6, 5))
    weight = {"depthwise_": made(16, 1, 3, 3), "pointwise_": made(24, 16, 1, 1), "": made(24, 16, 3, 3)}[kind]
    gate = torch.rand(2, 16) if kind == "pointwise_" else None
    padding = (0, 0, 0, 0) if kind == "pointwise_" else (1, 1, 1, 1)
    outs = weight.shape[0]
    forward = [x, weight, norm_of(16), "silu", gate, 1, padding]
    grad, y = channels_last(made(2, outs, 6, 5)), channels_last(made(2, outs, 6, 5))
    backward = [grad, y, norm_of(outs), made(3, outs), "silu", torch.rand(2, outs), made(2, outs)]
    return forward, [*backward, x, weight, norm_of(16), "silu", gate, channels_last(made(2, 16, 6, 5)), 1, padding, True, True]


def check_out_form(form, args, results: dict[str, torch.Tensor]) -> None:
    """It writes those, into memory that was NaN; and refuses one of another shape or dtype."""
    out = {name: torch.empty_like(result).fill_(float("nan")) for name, result in results.items()}
    torch.library.opcheck(form, args, out)
    form(*args, **out)
    assert all(torch.equal(made, out[name]) for name, made in results.items()), form
    for name, result in results.items():
        for bad in (result.new_empty([*result.shape[:-1], result.shape[-1] + 1]), result.double()):
            with pytest.raises((ValueError, TypeError, RuntimeError), match=name):
                form(*args, **{**out, name: bad})


@pytest.mark.parametrize("kind", ["depthwise_", "pointwise_", ""])
def test_convolutions_are_registered(kind, backend):
    for what, args in zip(("stats", "backward"), _arguments(kind), strict=True):
        packet = getattr(OPS, f"{kind}conv_{what}")
        torch.library.opcheck(getattr(packet, backend), args)
        if what == "backward":
            for needs in ((False, True), (True, False)):
                torch.library.opcheck(getattr(packet, backend), [*args[:-2], *needs])
        ungated = [None if i == (4 if what == "stats" else 11) else arg for i, arg in enumerate(args)]
        torch.library.opcheck(getattr(packet, backend), ungated)
        results = getattr(packet, backend)(*args)
        names = ("y", "mean", "var") if what == "stats" else ("grad_x", "grad_weight", "sums")
        check_out_form(getattr(packet, f"{backend}_out"), args, dict(zip(names, results, strict=True)))


def test_the_others_are_registered(backend):
    torch.manual_seed(0)
    y, norm, gate = channels_last(made(2, 16, 6, 5)), norm_of(16), torch.rand(2, 16)
    grad, residual, pool = channels_last(made(2, 16, 6, 5)), channels_last(made(2, 16, 6, 5)), made(2, 16)
    for name, results, args in (
        ("norm_act", ["out"], [y, norm, "silu", gate, residual]),
        ("norm_act_mean", ["mean"], [y, norm, "silu"]),
        ("norm_act_sums", ["sums"], [grad, y, norm, "silu", gate]),
        ("norm_act_image_sums", ["sums"], [grad, y, norm, "silu"]),
        ("norm_act_backward", ["grad_x", "sums"], [grad, y, norm, "silu", residual]),
        ("norm_gradient", ["grad_y"], [grad, y, norm, made(3, 16), "silu", gate, pool]),
        ("batch_stats", ["mean", "var"], [y]),
        ("norm_vectors", ["norm", "inverse"], [norm[0], norm[1], norm[2], None, 1e-3]),
        ("norm_coefficients", ["coefficients", "grad_weight"], [norm[:2], norm, norm[1], 60]),
        ("norm_coefficients", ["coefficients", "grad_weight"], [norm[:2], norm, norm[1], None]),
    ):
        packet = getattr(OPS, name)
        overload = backend if backend in packet.overloads() else "reference"  # what is of size K has no native kernel
        torch.library.opcheck(getattr(packet, overload), args)
        found = getattr(packet, overload)(*args)
        found = found if isinstance(found, tuple) else (found,)
        check_out_form(getattr(packet, f"{overload}_out"), args, dict(zip(results, found, strict=True)))
        assert all(torch.isfinite(tensor).all() for tensor in found)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1]}, TypeError, "x is list; a torch.Tensor would do"),
        ({"weight": None}, TypeError, "weight is NoneType; a torch.Tensor would do"),
        ({"padding": 1}, ValueError, "padding is 1; four integers"),
        ({"padding": (1.5, 0, 0, 0)}, ValueError, r"padding is \(1.5, 0, 0, 0\); four integers"),
        ({"x": torch.ones(3)}, ValueError, r"x is \(3,\); \[N, C, H, W\]"),
        ({"x": torch.ones(2, 16, 6)}, ValueError, r"x is \(2, 16, 6\); \[N, C, H, W\]"),
        ({"x": torch.ones(0, 16, 6, 5)}, ValueError, r"x is \(0, 16, 6, 5\)"),
        ({"x": torch.ones(2, 16, 6, 5, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"weight": torch.ones(24, 15, 1, 1)}, ValueError, r"weight is \(24, 15, 1, 1\); \[K, 16, k, k\]"),
        ({"norm": torch.ones(2, 16)}, ValueError, r"norm is \(2, 16\); \(3, 16\) would do"),
        ({"norm": torch.ones(3, 16).double()}, TypeError, "norm is torch.float64"),
        ({"norm": None}, ValueError, "norm is None beside activation 'silu'"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'"),
        ({"gate": torch.ones(16)}, ValueError, r"gate is \(16,\); \(2, 16\) would do"),
        ({"stride": 0}, ValueError, "stride is 0"),
        ({"padding": (0, -1, 0, 0)}, ValueError, r"padding is \(0, -1, 0, 0\)"),
        ({"weight": torch.ones(16, 1, 9, 9)}, ValueError, "kernel 9x9 is larger than the padded x, 6x5"),
    ],
    ids=str,
)
def test_bad_input_is_named(changes, error, message):
    arguments = {"x": torch.ones(2, 16, 6, 5), "weight": torch.ones(24, 16, 1, 1), "norm": torch.ones(3, 16), "activation": "silu"}
    arguments |= changes
    x, weight, norm = (arguments.pop(name) for name in ("x", "weight", "norm"))
    with pytest.raises(error, match=message), backends.backend("reference"):
        training.conv_stats(x, weight, norm, **arguments)


def test_bad_gradients_are_named():
    _, backward = _arguments("pointwise_")
    names = ("grad", "y", "y_norm", "y_coefficients", None, "y_gate", "y_pool", None, None, "norm", None, "gate", "residual")
    for place, name in enumerate(names):
        if name is not None:
            bad = list(backward)
            bad[place] = torch.ones(1)
            with pytest.raises(ValueError, match=rf"pointwise_conv_backward: {name} is \(1,\)"):
                OPS.pointwise_conv_backward.reference(*bad)


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        ("norm_vectors", {"mean": [1.0]}, TypeError, "mean is list; a torch.Tensor would do"),
        ("norm_vectors", {"mean": torch.ones(2, 8)}, ValueError, r"mean is \(2, 8\); \[K\] with K >= 1 would do"),
        ("norm_vectors", {"mean": torch.ones(0)}, ValueError, r"mean is \(0,\); \[K\]"),
        (
            "norm_vectors",
            {"mean": torch.ones(8).half()},
            TypeError,
            "mean is torch.float16; torch.float32 or torch.float64 would do",
        ),
        ("norm_vectors", {"var": torch.ones(7)}, ValueError, r"var is \(7,\); \(8,\) would do"),
        ("norm_vectors", {"var": torch.ones(8).double()}, TypeError, "var is torch.float64; torch.float32 would do"),
        ("norm_vectors", {"weight": torch.ones(8, dtype=torch.int32)}, TypeError, "weight is torch.int32"),
        ("norm_vectors", {"bias": torch.ones(1)}, ValueError, r"bias is \(1,\); \(8,\) would do"),
        ("norm_vectors", {"eps": "1e-3"}, TypeError, "eps is '1e-3'; a number would do"),
        ("norm_coefficients", {"sums": None}, TypeError, "sums is NoneType; a torch.Tensor would do"),
        ("norm_coefficients", {"sums": torch.ones(8)}, ValueError, r"sums is \(8,\); \[2, K\] with K >= 1 would do"),
        ("norm_coefficients", {"norm": torch.ones(2, 8)}, ValueError, r"norm is \(2, 8\); \(3, 8\) would do"),
        ("norm_coefficients", {"inverse": torch.ones(8).double()}, TypeError, "inverse is torch.float64"),
        ("norm_coefficients", {"values": 0}, ValueError, "values is 0; an integer >= 1 would do"),
    ],
    ids=str,
)
def test_bad_vectors_are_named(op, changes, error, message):
    vector = torch.ones(8)
    arguments = {
        "norm_vectors": {"mean": vector, "var": vector, "weight": vector, "bias": None, "eps": 1e-3},
        "norm_coefficients": {"sums": torch.ones(2, 8), "norm": torch.ones(3, 8), "inverse": vector, "values": 4},
    }[op]
    with pytest.raises(error, match=f"{op}: {message}"):
        getattr(training, op)(*(arguments | changes).values())


def test_kernels_other_than_the_reference_take_no_7x7(backend):
    x, weight = torch.ones(1, 8, 9, 9), torch.ones(8, 1, 7, 7)
    if backend == "native":
        with pytest.raises(RuntimeError, match="kernel 7x7, stride 1: it takes 3x3 and 5x5"):
            training.conv_stats(x, weight, None, activation="identity")
    else:
        assert "7x7" in (training.why_no_kernel(x, 8, weight, 1) or "")


def test_gradients_are_refused():
    x, norm = torch.ones(1, 8, 2, 2, requires_grad=True), norm_of(8)
    for call in (
        lambda: training.conv_stats(x, torch.ones(8, 8, 1, 1), None, activation="identity"),
        lambda: training.norm_act(x, norm, "silu"),
        lambda: training.norm_act_mean(x.detach(), norm.clone().requires_grad_(), "silu"),
        lambda: training.norm_vectors(norm[0], norm[1], norm[2].clone().requires_grad_(), None, 1e-3),
    ):
        with torch.enable_grad(), pytest.raises(RuntimeError, match="it has no gradient"):
            call()


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
def test_results_share_no_memory():
    forward, backward = _arguments("pointwise_")
    y, mean = torch.empty(2, 24, 6, 5).contiguous(memory_format=torch.channels_last), torch.empty(24)
    for out, name in (({"mean": mean, "var": mean}, "var"), ({"mean": forward[2][0][:1].expand(1), "var": mean}, "mean")):
        with pytest.raises(RuntimeError, match=name):
            OPS.pointwise_conv_stats.native_out(*forward, y=y, **out)
    grads = {"grad_x": torch.empty_like(forward[0]), "grad_weight": backward[8], "sums": torch.empty(2, 5, 16)}
    with pytest.raises(RuntimeError, match="grad_weight shares memory with an argument"):
        OPS.pointwise_conv_backward.native_out(*backward, **grads)
