"""The ``_out`` forms of the ops: what they write, what they refuse to write into, and that autograd is told."""

from __future__ import annotations

import pytest
import torch
from test_ops import OF_INFERENCE, OPS, example, good, outputs

from effnet_fast.ops import backends, native

CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize("op", OF_INFERENCE)
def test_out_forms_write_what_the_op_returns(op):
    """Into memory that was NaN; and they refuse a tensor of another shape, dtype, device or layout."""
    torch.manual_seed(0)
    args = example(op, torch.float32, 2)
    for kernel in backends._KERNELS[op]:
        if kernel.can_run(args[0]) is not None:
            continue
        made = outputs(kernel.run(*args))
        out_form = getattr(getattr(OPS, op), f"{kernel.backend}_out")
        names = [argument.name for argument in out_form._schema.arguments if argument.is_out]
        given = {name: torch.full_like(tensor, float("nan")) for name, tensor in zip(names, made, strict=True)}
        versions = [tensor._version for tensor in given.values()]
        assert out_form(*args, **given) is None
        for name, tensor, before in zip(names, made, versions, strict=True):
            torch.testing.assert_close(given[name], tensor)
            assert given[name]._version > before, "autograd would use what was saved before"
        torch.library.opcheck(out_form, args, given)
        first = given[names[0]]
        transposed = torch.empty(first.transpose(0, -1).shape).transpose(0, -1)
        for bad in (torch.empty(1, 1), first.double(), first.to("meta"), transposed):
            with pytest.raises((ValueError, TypeError, RuntimeError), match=names[0]):
                out_form(*args, **{**given, names[0]: bad})


SHARED = [
    ("depthwise_conv_bn_act", "x"),
    ("pointwise_conv_bn_act", "x"),
    ("pointwise_conv_bn_act", "gate"),
    ("pointwise_conv_bn_act", "residual"),
    ("conv_bn_act", "x"),
    ("conv_bn_act", "residual"),
    ("squeeze_excite_gate", "partial"),
]


def laid(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape at the start of ``memory``, channels_last if it is an image."""
    strides = torch.empty_like(like, memory_format=CHANNELS_LAST if like.dim() == 4 else torch.contiguous_format).stride()
    return memory.as_strided(like.shape, strides)


@pytest.mark.parametrize(("op", "shared"), SHARED)
def test_native_out_forms_refuse_memory_that_they_read(op, shared):
    """One element of it is enough; what lies right behind an argument is taken."""
    if (reason := backends.reasons()["native"][op]) is not None:
        pytest.skip(reason)
    args = good(op)
    made, *others = outputs(getattr(OPS, op).native(*args.values()))
    name = "gate" if op == "squeeze_excite_gate" else "y"
    out = dict(zip(("partial",), map(torch.empty_like, others), strict=False))
    memory, read = torch.empty(made.numel() + args[shared].numel()), args[shared].numel()
    args[shared] = laid(memory, args[shared]).copy_(args[shared])
    out[name] = laid(memory[read:], made)
    getattr(OPS, op).native_out(*args.values(), **out)
    assert torch.equal(out[name], made)
    out[name] = laid(memory[read - 1 :], made)
    with pytest.raises(RuntimeError, match=f"^{op}: {name} shares memory with an argument"):
        getattr(OPS, op).native_out(*args.values(), **out)


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
def test_a_stride_beyond_the_image_reads_nothing_beyond_it():
    args = good("conv_bn_act") | {"residual": None}
    near, far = ({**args, "stride": stride} for stride in (9, 2**25 - 2))
    assert torch.equal(OPS.conv_bn_act.native(*near.values()), OPS.conv_bn_act.native(*far.values()))
    with pytest.raises(RuntimeError, match=r"stride must be from 1 to 2\^25"):
        OPS.conv_bn_act.native(*{**args, "stride": 2**31 + 2}.values())
