"""The Triton kernels against plain PyTorch by the 2x rule: on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).

The interpreter is chosen before triton is imported, so test_triton.py runs this file in a pytest of its own.
"""

from __future__ import annotations

import itertools

import cases
import pytest
import torch
from plain import DTYPES, VIEWS, norm, transposed, wide
from plain import conv as plain_conv
from test_ops import check_bad_input, check_every_tensor, check_parameters_in_double, having, outputs
from tolerance import assert_2x
from uint8 import check_refusals, check_stem

import effnet_fast
from effnet_fast import ops
from effnet_fast.ops import backends, triton_backend
from effnet_fast.ops.depthwise import triton as depthwise
from effnet_fast.ops.pointwise import triton as pointwise
from effnet_fast.ops.squeeze_excite import triton as squeeze_excite

OPS = torch.ops.effnet_fast
DEVICE = "cpu" if triton_backend.INTERPRETED else "cuda"


def depthwise_cases() -> list[tuple[cases.Case, str, tuple[torch.dtype, ...]]]:
    """Cases, activations and storage types: on a GPU the reduced cases with an activation in turn, and the full ones with SiLU;
    interpreted the nasty cases with a type in turn too, and of each kernel and stride the family's smallest with SiLU."""
    if not triton_backend.INTERPRETED:
        in_turn = [(case, ops.ACTIVATIONS[i % 4], DTYPES) for i, case in enumerate(cases.REDUCED)]
        return in_turn + [(case, "silu", DTYPES) for case in cases.depthwise_shapes()]
    some = [(case, ops.ACTIVATIONS[i % 4], (DTYPES[i % 3],)) for i, case in enumerate(cases.nasty())]
    for window in itertools.product((3, 5), (1, 2)):
        of_window = [case for case in map(cases.reduced, cases.depthwise_shapes()) if (case.kernel, case.stride) == window]
        smallest = min(of_window, key=lambda case: case.channels * case.height * case.width)
        some.append((smallest._replace(images=3), "silu", DTYPES))  # the largest error of the few sums of one image is luck
    return some


def pointwise_cases() -> list[cases.Pointwise]:
    """All of the family on a GPU; interpreted, a sixth of it, of few pixels and channels."""
    full = cases.pointwise_shapes()
    return list(dict.fromkeys(map(cases.reduced_pointwise, full)))[::6] if triton_backend.INTERPRETED else full


@pytest.fixture(autouse=True)
def strictly_triton():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with effnet_fast.backend("triton", strict=True):
        yield


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def norm_on_device(channels: int, dtype: torch.dtype = torch.float32) -> ops.Norm:
    return ops.Norm(*(value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in norm(channels, dtype)))


@pytest.mark.parametrize(("case", "activation", "dtypes"), depthwise_cases(), ids=str)
def test_depthwise(case, activation, dtypes):
    for dtype in dtypes:
        x, weight = rand(*case[:4], dtype=dtype), rand(case.channels, 1, case.kernel, case.kernel)
        n = norm_on_device(case.channels)
        args = {"stride": case.stride, "padding": case.padding, "activation": activation}
        y, partial = ops.depthwise_conv_bn_act(x, weight, n, squeeze=True, **args)
        plain = plain_conv(x, weight, n, **args, groups=case.channels)
        assert_2x(y, plain, plain_conv(wide(x), wide(weight), wide(n), **args, groups=case.channels), str(dtype))
        assert y.is_contiguous(memory_format=torch.channels_last)
        total = y.double().sum((2, 3))
        assert_2x(partial.sum(1), y.float().sum((2, 3)), total, "partial")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_pieces(dtype):
    """Any number of pieces, more than there are tiles too, covers the image; none leaves the sums out; y stays the same."""
    x, weight, n = rand(2, 35, 9, 8, dtype=dtype), rand(35, 1, 3, 3, dtype=dtype), norm_on_device(35, dtype)
    expected, whole = OPS.depthwise_conv_bn_act.triton(x, weight, *n, 1, [1] * 4, "silu", 1)
    for pieces in (0, 2, 5):
        y, partial = OPS.depthwise_conv_bn_act.triton(x, weight, *n, 1, [1] * 4, "silu", pieces)
        assert torch.equal(y, expected) and partial.shape == (2, pieces, 35)
        if pieces:
            torch.testing.assert_close(partial.sum(1), whole[:, 0], rtol=1e-6, atol=1e-5)


def test_depthwise_of_an_image_beyond_32_bits(monkeypatch):
    """The wide form of the offsets gives the same; the image itself is only so large on a GPU."""
    x, weight, n = rand(1, 24, 9, 7), rand(24, 1, 5, 5), norm_on_device(24)
    expected = OPS.depthwise_conv_bn_act.triton(x, weight, *n, 2, [2] * 4, "silu", 1)
    run = depthwise.run
    monkeypatch.setattr(depthwise, "run", lambda *args, **constants: run(*args, **{**constants, "WIDE": True}))
    torch.testing.assert_close(OPS.depthwise_conv_bn_act.triton(x, weight, *n, 2, [2] * 4, "silu", 1), expected, rtol=0, atol=0)


# images, channels, height, width, outputs; a tile has 64 rows or fewer, so the first spans two images and the second many.
POINTWISE = [(3, 24, 7, 11, 40), (4, 32, 5, 5, 16), (1, 40, 1, 1, 8), (0, 16, 4, 4, 16), (3, 13, 3, 9, 17), (1, 136, 7, 7, 130)]


def check_pointwise(images, channels, height, width, out, dtype, parts):
    """With each of the parts: an activation, and whether there are a gate and a residual."""
    x, residual = rand(images, channels, height, width, dtype=dtype), rand(images, out, height, width, dtype=dtype)
    weight, n, gate = rand(out, channels, 1, 1) / channels**0.5, norm_on_device(out), torch.rand(images, channels).to(DEVICE)
    for activation, gated, added in parts:
        args = {"activation": activation, "gate": gate if gated else None, "residual": residual if added else None}
        y = ops.pointwise_conv_bn_act(x, weight, n, **args)
        ref64 = plain_conv(wide(x), wide(weight), wide(n), **{name: wide(value) for name, value in args.items()})
        assert_2x(y, plain_conv(x, weight, n, **args), ref64, activation)
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "processors"), [*((shape, 1) for shape in POINTWISE), ((3, 24, 5, 5, 20), 132)], ids=str)
def test_pointwise(shape, dtype, processors, monkeypatch):
    monkeypatch.setattr(pointwise, "processors", lambda device: processors)
    parts = ("silu", False, False), ("identity", True, True), ("relu6", True, False), ("relu", False, True)
    check_pointwise(*shape, dtype, parts)


@pytest.mark.parametrize("case", pointwise_cases(), ids=str)
def test_pointwise_family(case):
    for dtype in DTYPES:
        parts = ("identity" if case.gate else "silu", case.gate, case.residual)
        check_pointwise(2, case.channels, case.side, case.side, case.out, dtype, [parts])


def test_pointwise_gates_each_image_by_its_own():
    """Gates of one image, then zeros for the next: no row of a tile that spans both takes the other's."""
    x, weight = torch.ones(2, 16, 9, 8, device=DEVICE), torch.ones(16, 16, 1, 1, device=DEVICE)
    n = ops.Norm(None, None, torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE), 0.0)
    gate = torch.tensor([[1.0], [0.0]], device=DEVICE).expand(2, 16)
    y = ops.pointwise_conv_bn_act(x, weight, n, gate=gate, activation="identity")
    assert (y[0] == 16).all() and (y[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "outputs"), [((2, 3, 33, 32), 32), ((1, 1, 7, 9), 13), ((2, 4, 12, 9), 72), ((1, 3, 1, 1), 16)])
def test_stem(shape, outputs, dtype):
    for view, padding in (("channels_last", (1, 1, 1, 1)), ("sliced", (1, 2, 1, 1)), ("nchw", (1, 1, 2, 2))):
        x, weight, n = VIEWS[view](rand(*shape, dtype=dtype)), rand(outputs, shape[1], 3, 3), norm_on_device(outputs)
        args = {"stride": 2, "padding": padding, "activation": "silu"}
        plain = plain_conv(x, weight, n, **args, groups=1)
        residual = torch.randn_like(plain) if view == "sliced" else None
        for w in (weight, weight.contiguous(memory_format=torch.channels_last)):
            y = ops.conv_bn_act(x, w, n, **args, residual=residual)
            ref = plain_conv(wide(x), wide(weight), wide(n), **args, groups=1, residual=wide(residual))
            assert_2x(y, plain if residual is None else plain + residual, ref, view)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.STEMS, ids=str)
def test_stem_of_uint8(case, dtype):
    check_stem(case, dtype, "triton", DEVICE)


def test_uint8_arguments_are_checked():
    check_refusals("triton", DEVICE)


def test_other_dense_convolutions_are_refused():
    x, n, n16 = rand(1, 16, 8, 8), norm_on_device(8), norm_on_device(16)
    args = {"stride": 1, "padding": (3,) * 4, "activation": "silu", "squeeze": True}
    with pytest.raises(RuntimeError, match="kernel 3x3 of 16 input channels"):
        ops.conv_bn_act(x, rand(8, 16, 3, 3), n, stride=1, padding=(1,) * 4, activation="silu")
    with pytest.raises(RuntimeError, match="kernel 7x7"):
        ops.depthwise_conv_bn_act(x, rand(16, 1, 7, 7), n16, **args)
    with effnet_fast.backend("triton"):
        assert ops.conv_bn_act(x, rand(8, 16, 3, 3), n, stride=1, padding=(1,) * 4, activation="silu").shape == (1, 8, 8, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "processors"),
    [
        ((2, 1, 32, 8), 1),
        ((1, 3, 13, 1), 132),
        ((0, 1, 16, 4), 1),
        ((4, 2, 596, 4), 6),
        ((1, 1, 556, 119), 132),
        ((19, 2, 556, 119), 1),
    ],
    ids=str,
)
def test_gate(shape, processors, dtype, monkeypatch):
    """The last two have so large weights that they take two launches, for one image or 16 a program; the one before them shares an
    image between programs."""
    monkeypatch.setattr(squeeze_excite, "processors", lambda device: processors)
    images, pieces, channels, squeezed = shape
    partial = rand(images, pieces, channels) * 49
    reduce, expand = (rand(squeezed, channels, 1, 1) / channels**0.5).to(dtype), rand(channels, squeezed, 1, 1).to(dtype)
    activations, biased = ("silu", "relu"), ((None, None), (rand(squeezed, dtype=dtype), rand(channels, dtype=dtype)))
    pairs = zip(activations, biased, strict=True) if triton_backend.INTERPRETED else itertools.product(activations, biased)
    for activation, biases in pairs:
        args = partial, 49, reduce, biases[0], expand, biases[1]
        gate = ops.squeeze_excite_gate(*args, activation=activation)
        ref = OPS.squeeze_excite_gate.reference(*map(wide, args), activation)
        assert_2x(gate, OPS.squeeze_excite_gate.reference(*args, activation), ref, activation)


@pytest.mark.parametrize("how", VIEWS)
def test_strides_do_not_matter(how):
    x, n, w3, w1 = VIEWS["channels_last"](rand(2, 24, 9, 7)), norm_on_device(24), rand(24, 1, 3, 3), rand(24, 24, 1, 1)
    args = {"stride": 2, "padding": (1, 1, 0, 1), "activation": "silu", "squeeze": True}
    for made, expected in zip(
        ops.depthwise_conv_bn_act(VIEWS[how](x), VIEWS[how](w3), n, **args),
        ops.depthwise_conv_bn_act(x, w3, n, **args),
        strict=True,
    ):
        assert torch.equal(made, expected)
    gate = torch.rand(2, 48).to(DEVICE)[:, ::2]
    z = ops.pointwise_conv_bn_act(x, w1, n, gate=gate.contiguous(), residual=x, activation="silu")
    other = VIEWS[how](x)
    assert torch.equal(ops.pointwise_conv_bn_act(other, VIEWS[how](w1), n, gate=gate, residual=other, activation="silu"), z)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_non_finite_values_go_through(activation):
    """Each in a row of its own, and to its own output alone where they are neighbours, in all of a row's places: on a GPU SiLU
    takes values in pairs. Its -1.7e-16 of -inf is NaN in plain PyTorch."""
    eps = 2.0**-60  # 0 is refused on CUDA; 1 + eps is 1
    n = ops.Norm(None, None, torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE), eps)
    x = rand(2, 16, 3, 3)
    x[0, 3, 1, 1], x[1, 2, 0, 0] = float("nan"), float("inf")
    args = torch.eye(16, device=DEVICE)[:, :, None, None].contiguous(), *n, None, None, activation
    made, plain = OPS.pointwise_conv_bn_act.triton(x, *args), OPS.pointwise_conv_bn_act.reference(x, *args)
    assert torch.equal(made.isnan(), plain.isnan()) and torch.equal(made.isinf(), plain.isinf())

    # The norm makes them, so that the product mixes nothing: of ones, a scale and a shift each.
    values = torch.tensor([float("nan"), -3e38, -1e4, float("inf"), 2.0, -30.0, float("-inf"), 0.5], device=DEVICE)
    for turn in range(8):
        bias = torch.cat([values.roll(turn), values.flip(0).roll(turn)])
        args = (
            torch.eye(16, device=DEVICE)[:, :, None, None].contiguous(),
            torch.zeros_like(bias),
            bias,
            *n[2:],
            None,
            None,
            activation,
        )
        x = torch.ones(2, 16, 3, 3, device=DEVICE)
        made, plain = OPS.pointwise_conv_bn_act.triton(x, *args), OPS.pointwise_conv_bn_act.reference(x, *args)
        if activation == "silu":
            negative = (bias == float("-inf"))[:, None, None].expand_as(made)
            assert (made[negative].isnan() | (made[negative].abs() < 1e-15)).all()
            made, plain = made.masked_fill(negative, 0.0), plain.masked_fill(negative, 0.0)
        torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-15, equal_nan=True)


def example(op: str, dtype: torch.dtype) -> tuple:
    x, n = rand(2, 16, 9, 7, dtype=dtype), norm_on_device(16)
    return {
        "depthwise_conv_bn_act": (x, rand(16, 1, 5, 5), *n, 2, [1, 2, 2, 2], "silu", 2),
        "pointwise_conv_bn_act": (x, rand(16, 16, 1, 1), *n, torch.rand(2, 16).to(DEVICE), x.clone(), "identity"),
        "conv_bn_act": (x[:, :3], rand(16, 3, 3, 3), *n, None, 2, [0, 1, 1, 1], "relu6", None),
        "squeeze_excite_gate": (rand(2, 2, 16), 63, rand(4, 16, 1, 1), rand(4), rand(16, 4, 1, 1), None, "silu"),
    }[op]


@pytest.mark.parametrize("op", having("triton"))
def test_both_forms_are_registered(op):
    args = example(op, torch.bfloat16)
    torch.library.opcheck(getattr(OPS, op).triton, args)
    made = outputs(getattr(OPS, op).triton(*args))
    out_form = getattr(OPS, op).triton_out
    names = [argument.name for argument in out_form._schema.arguments if argument.is_out]
    given = {name: torch.full_like(tensor, float("nan")) for name, tensor in zip(names, made, strict=True)}
    out_form(*args, **given)
    assert all(torch.equal(given[name], tensor) for name, tensor in zip(names, made, strict=True))
    for name in names:
        for bad in (torch.empty(1, 1, device=DEVICE), given[name].double(), transposed(given[name])):
            if bad.shape != given[name].shape or bad.dtype != given[name].dtype or bad.stride() != given[name].stride():
                with pytest.raises((ValueError, TypeError), match=name):
                    out_form(*args, **{**given, name: bad})


@pytest.mark.parametrize("op", having("triton"))
def test_bad_input(op):
    """A kernel would read past the end of a short vector."""
    check_every_tensor(op, "triton", DEVICE)
    check_bad_input(op, "triton", DEVICE)
    args = example(op, torch.float32)
    with pytest.raises(TypeError, match=f"^{op}: (x|partial) is torch.float64; .* would do for Triton"):
        getattr(OPS, op).triton(*map(wide, args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", having("triton"))
def test_parameters_in_double_beside_another_x(op, dtype):
    check_parameters_in_double(op, "triton", example(op, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_of_a_net_is_four_ops(dtype):
    """And so it is under torch.compile(fullgraph=True); autocast over float32 weights gives halves."""
    block = effnet_fast.create_model("efficientnet_b0").blocks[1][1].eval().to(DEVICE)
    x = rand(2, 24, 7, 9).to(dtype)
    with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        with backends.tracing() as trace:
            y = block(x)
        assert [choice.backend for choice in trace] == ["triton"] * 4
        graphs = []

        def count(graph, inputs):
            graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
            return graph.forward

        assert torch.equal(torch.compile(block, fullgraph=True, backend=count)(x), y)
        assert sum("triton" in target for target in graphs[0]) == 4 and len(graphs) == 1
    with torch.no_grad(), effnet_fast.backend("reference"):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            plain = block(x)
        assert_2x(y, plain, block.double()(x.double()))


def test_precision_is_as_torch_says_now():
    from effnet_fast.ops.triton_common import matmul_precision

    seen = []
    for setting in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = setting
        seen.append((matmul_precision(torch.float32), matmul_precision(torch.bfloat16)))
    assert seen == [("ieee", "ieee"), ("tf32", "ieee")]
