"""The CUDA kernel of expand_depthwise_conv_bn_act: when a block runs it, and on a GPU the family's shapes against plain PyTorch by
the 2x rule. tests/test_emulator_expand_depthwise.py runs its source without one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import cases
import pytest
import torch
from plain import conv as plain_conv
from plain import misaligned, norm, wide
from tolerance import assert_2x

import effnet_fast
from effnet_fast import ops
from effnet_fast.benchmark import calibrate, nets
from effnet_fast.benchmark import images as images_of
from effnet_fast.models import FAMILY, create_model
from effnet_fast.nn import fused
from effnet_fast.nn.blocks import MBConv
from effnet_fast.ops import backends, expand_depthwise, gpu
from effnet_fast.ops.expand_depthwise import is_one_kernel, launch
from effnet_fast.ops.pointwise import HALVES
from effnet_fast.scaling.config import BlockConfig

NAME = "expand_depthwise_conv_bn_act"
OP = torch.ops.effnet_fast.expand_depthwise_conv_bn_act
H100, L4 = 227 << 10, 99 << 10  # bytes of shared memory that a block may have
TRIALS = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "expand-depthwise-cuda.json").read_text())
H200_L2 = 60 << 20


def shapes() -> list[tuple[int, cases.Case]]:
    """Every distinct expansion with its depthwise convolution of B0 to B7 at its own resolution: input channels, and that of one
    image."""
    found: dict[tuple[int, cases.Case], None] = {}
    for config in (FAMILY[f"efficientnet_b{number}"] for number in range(8)):
        size = (config.resolution + 1) // 2
        for block in config.blocks():
            kernel = block.kernel_size
            if block.expanded_channels != block.in_channels:
                case = cases.Case(1, block.expanded_channels, size, size, kernel, block.stride, cases.symmetric(kernel))
                found[block.in_channels, case] = None
            size = (size + block.stride - 1) // block.stride
    return list(found)


def test_shared_memory_suffices_for_b0():
    """On any GPU but for the last blocks, which on the small ones run as two kernels."""
    wanted = {
        inputs: launch.shared_bytes(inputs, case.kernel, case.stride, -(-case.width // case.stride))
        for inputs, case in shapes()
        if case.channels in {block.expanded_channels for block in FAMILY["efficientnet_b0"].blocks()}
    }
    assert max(bytes for inputs, bytes in wanted.items() if inputs <= 40) <= L4
    assert max(wanted.values()) <= H100


def test_the_cpu_runs_one_op_after_the_other():
    x, expand, weight = torch.randn(1, 16, 9, 9), torch.randn(96, 16, 1, 1), torch.randn(96, 1, 3, 3)
    with effnet_fast.backend("native", strict=True):
        assert not is_one_kernel(x, expand, weight, 1, (1, 1, 1, 1))
    assert backends.reasons("cpu")["native"][NAME] == "the kernel is one of CUDA"


def one_kernel(trial: dict, dtype: torch.dtype = torch.bfloat16) -> bool:
    """For one of TRIALS."""
    batch, inputs, channels, size, kernel, stride = (
        trial[name] for name in ("batch", "in_channels", "channels", "size", "kernel", "stride")
    )
    x = torch.empty(batch, inputs, size, size, dtype=dtype, device="meta")
    expand, weight = torch.empty(channels, inputs, 1, 1), torch.empty(channels, 1, kernel, kernel)
    return is_one_kernel(x, expand, weight, stride, cases.symmetric(kernel))


@pytest.fixture
def as_on_an_h200(monkeypatch):
    """What decides between one kernel and two: a native backend that can run, and the size of L2."""
    monkeypatch.setattr(expand_depthwise, "_native_can_run", lambda x: None if x.dtype in HALVES else "no half type")
    monkeypatch.setattr(launch, "cache_bytes", lambda device: H200_L2)


@pytest.mark.usefixtures("as_on_an_h200")
def test_one_kernel_runs_where_an_h200_was_faster_with_it():
    """Never where it was slower, and on all but what differs by little."""
    chosen = [trial for trial in TRIALS["trials"] if one_kernel(trial)]
    left = [trial for trial in TRIALS["trials"] if not one_kernel(trial)]
    assert {trial["net"] for trial in chosen} == {"b0", "b5"} and len(left) > len(chosen) > 4
    assert all(trial["one_kernel_us"] < trial["two_kernels_us"] for trial in chosen)
    assert all(trial["one_kernel_us"] > 0.95 * trial["two_kernels_us"] for trial in left)


@pytest.mark.usefixtures("as_on_an_h200")
def test_a_request_decides_between_one_kernel_and_two():
    best = min(TRIALS["trials"], key=lambda trial: trial["one_kernel_us"] / trial["two_kernels_us"])
    worst = max(TRIALS["trials"], key=lambda trial: trial["one_kernel_us"] / trial["two_kernels_us"])
    assert one_kernel(best) and not one_kernel(worst)
    assert not one_kernel(best, torch.float16) and not one_kernel(best, torch.float32)
    with effnet_fast.backend("reference"):
        assert not one_kernel(best)
    with effnet_fast.backend("native"):
        assert one_kernel(best) and not one_kernel(worst)
    with effnet_fast.backend("native", strict=True):
        assert one_kernel(best) and one_kernel(worst) and not one_kernel(worst | {"channels": 100})


def given(inputs: int, case: cases.Case, dtype: torch.dtype, weight_dtype: torch.dtype | None = None):
    """x, and the two weights each with its norm."""
    torch.manual_seed(case.channels + case.height)
    channels, kernel, weights = case.channels, case.kernel, weight_dtype or dtype
    norms = [ops.Norm(*(v.cuda() if torch.is_tensor(v) else v for v in norm(channels))) for _ in range(2)]
    x = torch.randn(case.images, inputs, case.height, case.width, device="cuda").to(dtype)
    expand = (torch.randn(channels, inputs, 1, 1, device="cuda") / inputs**0.5).to(weights)
    weight = (torch.randn(channels, 1, kernel, kernel, device="cuda") / kernel).to(weights)
    return x.contiguous(memory_format=torch.channels_last), expand, norms[0], weight, norms[1]


def check(inputs, case, dtype, activation="silu", weight_dtype=None):
    arguments = given(inputs, case, dtype, weight_dtype)
    with ops.backend("native", strict=True):
        y, partial = ops.expand_depthwise_conv_bn_act(
            *arguments, stride=case.stride, padding=case.padding, activation=activation, squeeze=True
        )

    def plain(x, expand, expand_norm, weight, norm):
        h = plain_conv(x, expand, expand_norm, activation=activation)
        return plain_conv(h, weight, norm, case.stride, case.padding, case.channels, activation)

    assert_2x(y, plain(*arguments), plain(*map(wide, arguments)), f"{inputs} to {case} {activation}")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_2x(partial.sum(1), y.float().sum((2, 3)), y.double().sum((2, 3)), f"{inputs} to {case}: the partial sums")


def block_of(stride: int) -> MBConv:
    torch.manual_seed(0)
    config = BlockConfig(0, 0, 0, "mbconv", 3, stride, 24, 96, 40, 6, 0.0)
    return MBConv(config, torch.nn.BatchNorm2d, torch.nn.SiLU, "same").eval()


CHANGED = {
    "as it is": (lambda block: None, True),
    "another activation in front": (lambda block: setattr(block, "act1", torch.nn.ReLU()), False),
    "a wide expansion": (lambda block: setattr(block, "conv_pw", torch.nn.Conv2d(24, 96, 3, padding=1, bias=False)), False),
    "an expansion with a stride": (lambda block: setattr(block, "conv_pw", torch.nn.Conv2d(24, 96, 2, 2, bias=False)), False),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_block_runs_it_for_what_it_computes(change, monkeypatch):
    """And gives what its children give, also where the expansion changes the size that the padding follows from."""
    monkeypatch.setattr(fused, "is_one_kernel", lambda *args: True)
    spoil, runs = CHANGED[change]
    for stride in (1, 2):
        block = block_of(stride)
        spoil(block)
        x = torch.randn(2, 24, 18, 22)
        with torch.inference_mode(), backends.tracing() as trace:
            torch.testing.assert_close(block(x), block.forward_children(x))
        assert (NAME in {choice.op for choice in trace if not isinstance(choice, str)}) == runs


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu", "fresh_memory_is_nan")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("inputs", "case"), shapes()[::2], ids=str)
def test_family_on_a_gpu(inputs, case, dtype):
    kernel, stride, width = case.kernel, case.stride, -(-case.width // case.stride)
    if launch.shared_bytes(inputs, kernel, stride, width) > gpu.shared_memory(0):
        assert launch.why_too_large(torch.empty(1, inputs, case.height, case.width, device="cuda"), inputs, kernel, stride, width)
        pytest.skip("a block of this GPU has too little shared memory for it")
    check(inputs, case._replace(images=3), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu", "fresh_memory_is_nan")
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("case", [case for case in cases.nasty() if case.channels % 8 == 0], ids=str)
def test_nasty_cases_on_a_gpu(case, activation):
    for inputs in (8, 24, 80):
        if case.images:
            check(inputs, case, torch.bfloat16, activation, torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_views_and_the_out_form_on_a_gpu():
    x, expand, expand_norm, weight, n = given(24, cases.Case(3, 48, 9, 9, 3, 1, (1, 1, 1, 1)), torch.bfloat16)
    rest = (1, [1, 1, 1, 1], "silu", 2)
    expected = OP.native(x, expand, *expand_norm, weight, *n, *rest)
    for other in (x.contiguous(), misaligned(x)):
        made = OP.native(other, misaligned(expand), *expand_norm, misaligned(weight), *n, *rest)
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    y, partial = (torch.full_like(t, float("nan")) for t in expected)
    OP.native_out(x, expand, *expand_norm, weight, *n, *rest, y=y, partial=partial)
    assert torch.equal(y, expected[0]) and torch.equal(partial, expected[1])
    torch.library.opcheck(OP.native, (x, expand, *expand_norm, weight, *n, *rest))


WRONG = {  # of the overload's arguments, by place; and what the error says
    "expand_weight": (1, lambda t: t[:, :16], r"expand_weight has shape \[48, 16, 1, 1\], expected \[48, 24, 1, 1\]"),
    "expand_weight of 3x3": (1, lambda t: t.expand(48, 24, 3, 3), r"expand_weight has shape \[48, 24, 3, 3\]"),
    "expand_norm_weight": (2, lambda t: t[:8], r"expand_norm_weight has shape \[8\], expected \[48\]"),
    "expand_norm_mean": (4, lambda t: t[:8], r"expand_norm_mean has shape \[8\], expected \[48\]"),
    "expand_norm_var": (5, lambda t: t.half(), "expand_norm_var must have the dtype of expand_norm_mean"),
    "expand_norm_bias": (3, lambda t: t.cpu(), "expand_norm_bias is on another device"),
    "weight": (7, lambda t: t.expand(48, 2, 3, 3), r"weight has shape \[48, 2, 3, 3\], expected \[K, 1, k, k\]"),
    "a kernel of 7x7": (7, lambda t: t.new_ones(48, 1, 7, 7), "kernel 3 or 5 and stride 1 or 2, got kernel 7"),
    "stride": (13, lambda stride: 3, "kernel 3 or 5 and stride 1 or 2, got kernel 3 and stride 3"),
    "x": (0, torch.Tensor.float, "takes x of bfloat16 or float16"),
    "activation": (15, lambda name: "gelu", "activation must be silu, relu, relu6 or identity, got 'gelu'"),
    "pieces": (16, lambda pieces: 4, "pieces is 4"),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("argument", WRONG)
def test_the_kernel_says_what_is_wrong_on_a_gpu(argument):
    x, expand, expand_norm, weight, n = given(24, cases.Case(1, 48, 9, 40, 3, 1, (1, 1, 1, 1)), torch.bfloat16)
    arguments = [x, expand, *expand_norm, weight, *n, 1, [1, 1, 1, 1], "silu", 3]
    OP.native(*arguments)
    at, spoil, message = WRONG[argument]
    arguments[at] = spoil(arguments[at])
    with pytest.raises(RuntimeError, match=f"^{NAME}: .*{message}"):
        OP.native(*arguments)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("images", [1, 64])
def test_a_network_on_a_gpu(images):
    """Where native kernels are asked for strictly the blocks that shared memory suffices for run it, else those that are faster
    with it; the results are right."""
    torch.manual_seed(0)
    model = calibrate(create_model("efficientnet_b0"), (224, 224)).cuda().to(torch.bfloat16)
    x = images_of(images, (224, 224)).cuda().to(torch.bfloat16)
    plain = nets.plain_net("efficientnet_b0").eval().cuda()
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        exact, plainly = copy.deepcopy(plain).double()(x.double()), plain.to(torch.bfloat16)(x)
        with effnet_fast.backend("native", strict=True), backends.tracing() as trace:
            y = model(x)
        with backends.tracing() as unasked:
            by_speed = model(x)
    ran = [choice for choice in trace if not isinstance(choice, str) and choice.op == NAME]
    size, fitting, faster = 112, 0, 0
    for block in FAMILY["efficientnet_b0"].blocks():
        x = torch.empty(images, block.in_channels, size, size, dtype=torch.bfloat16, device="cuda")
        size = -(-size // block.stride)
        wanted = launch.shared_bytes(block.in_channels, block.kernel_size, block.stride, size)
        if block.expanded_channels != block.in_channels and wanted <= gpu.shared_memory(0):
            fitting += 1
            faster += launch.is_faster(x, block.expanded_channels, block.stride)
    assert len(ran) == fitting > 6 and {choice.backend for choice in ran} == {"native"}
    unasked = [choice for choice in unasked if not isinstance(choice, str) and choice.op == NAME]
    assert len(unasked) == faster and {choice.backend for choice in unasked} <= {"native"}
    assert_2x(y, plainly, exact, "one kernel each")
    assert_2x(by_speed, plainly, exact, "one kernel or two")
