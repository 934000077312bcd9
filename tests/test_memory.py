"""Large results of the native kernels take turns in memory that the compiled module keeps: about what was in use at once."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from plain import norm
from torch import Tensor

from effnet_fast.ops import native

pytestmark = [
    pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON)),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]

IN_USE = """
def in_use():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
"""

RESULT = """
import torch
import effnet_fast.ops.pointwise

weight, one = torch.ones(256, 4, 1, 1), torch.ones(256)
x = torch.ones(1, 4, 164, 1024).to(memory_format=torch.channels_last)

def result(rows):  # rows * 1 MB
    y = torch.ops.effnet_fast.pointwise_conv_bn_act.native(x[:, :, :rows], weight, one, one, one, one, 0.0, None, None, "identity")
    assert y.numel() * 4 == rows << 20 and y[0, 0, 0, 0] == 4
    return y

"""

CHANGES = """
kept = result(160)
before = in_use()
del kept
for rows in range(100, 164):
    result(rows)
    assert in_use() < before + (40 << 20), rows
two = result(40), result(40)
assert in_use() < before + (40 << 20)
print("bounded")
"""

PLANNED = """
import torch, effnet_fast
from effnet_fast.benchmark.timing import held

model = effnet_fast.create_model("efficientnet_b0").eval()
x = torch.zeros(1, 3, 448, 448).to(memory_format=torch.channels_last)
with torch.no_grad():
    model(x[:, :, :32, :32])  # what is loaded and made once
before = held("cpu")
optimized = effnet_fast.optimize_for_inference(model)
optimized(x)
print(held("cpu") - before, sum(optimized.memory()))
"""

FAULTS = """
import resource

def faults(cycles):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(cycles):
        y = result(80)
        for rows in (40, 12, 30, 7, 64, 3, 90):  # each made while the one before it is there, as in a network
            y = result(rows)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(2)
print(min(faults(1) for _ in range(10)))
"""

LIMITED = """
import resource

with open("/proc/self/statm") as sizes:
    limit = int(sizes.read().split()[0]) * resource.getpagesize() + (3 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
made = [result(rows) for rows in (40, 12, 40)]
assert len({y.data_ptr() for y in made}) == 3
before = in_use()
del made
assert before - in_use() > 80 << 20
assert len(bytes(2 << 30)) == 2 << 30  # addresses are left for others
print("made")
"""

REST = """
import time

kept = result(160)
before = in_use()
del kept
time.sleep(5.2)
two = result(2)
print((before - in_use()) >> 20)
"""

STEPS = """
import torch
import effnet_fast

model = effnet_fast.efficientnet_b0(num_classes=10).train()
x = torch.randn(8, 3, 128, 128)
used = []
for step in range(24):
    model(x).square().mean().backward()
    used.append(in_use())
print((max(used[12:]) - max(used[4:8])) >> 20)
"""


FORKS = """
import os
import signal
import threading
import torch
import effnet_fast.ops.pointwise

torch.set_num_threads(1)
one, weight = torch.ones(256), torch.ones(256, 1, 1, 1)
inputs = [torch.ones(1, 1, rows, 256).to(memory_format=torch.channels_last) for rows in range(4, 12)]  # a MB and more

def result(x):
    return torch.ops.effnet_fast.pointwise_conv_bn_act.native(x, weight, one, one, one, one, 1e-3, None, None, "identity")

def work():
    while not done:
        for x in inputs:  # under the lock most of the time
            result(x)

done, held = False, result(inputs[0])
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(200):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # and not wait for ever
        del held
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
done = True
for thread in threads:
    thread.join()
print("forked")
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", IN_USE + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def result():
    x = torch.ones(1, 4, 32, 256).to(memory_format=torch.channels_last)
    one = torch.ones(256)
    return torch.ops.effnet_fast.pointwise_conv_bn_act.native(
        x, torch.ones(256, 4, 1, 1), one, one, one, one, 1e-3, None, None, "identity"
    )


def test_a_result_takes_the_memory_of_the_last_one():
    gc.collect()  # what an earlier test left would make room below
    first = result()
    at, expected = first.data_ptr(), first.clone()
    view = first[:, :, 1:]
    first.fill_(torch.nan)
    del first
    second = result()
    assert second.data_ptr() != at  # a view of the first is alive
    del view
    third = result()
    assert third.data_ptr() == at
    assert torch.equal(second, expected) and torch.equal(third, expected)


def test_results_of_many_threads_are_apart():
    wrong = []

    def work(number):
        for _ in range(50):
            made = [result() for _ in range(3)]
            for k, y in enumerate(made):
                y.fill_(10 * number + k)
            wrong.extend((number, k) for k, y in enumerate(made) if not bool((y == 10 * number + k).all()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_sizes_that_change_take_no_more_than_the_largest():
    assert run(RESULT + CHANGES) == "bounded"


def test_sizes_that_come_again_find_filled_pages():
    """Of any size, as long as they come in the same order; a page that is not there costs as much as what is written to it."""
    assert int(run(RESULT + FAULTS)) < 100


def test_where_addresses_are_limited_none_are_reserved():
    assert run(RESULT + LIMITED) == "made"


def test_what_nobody_takes_goes_back_after_some_seconds():
    assert int(run(RESULT + REST)) > 120


def test_a_plan_leaves_nothing_of_what_was_recorded():
    """What each kernel gave meanwhile, 175 MB for these images."""
    grown, held = map(int, run(IN_USE + PLANNED).split())
    assert held > 4e7 and grown < held + 120e6


def test_training_steps_do_not_grow():
    """What malloc keeps did, by some MB a step, to four times what is in use."""
    assert int(run(STEPS)) <= 16


def test_a_fork_finds_nothing_locked():
    """While another thread takes and gives back, as under a loader of data."""
    assert run(FORKS) == "forked"


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "free", "small", "maps", "mapped", "a", "b", "used", "left", "top")]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="there is no mallinfo2")
def test_a_call_leaves_nothing_in_malloc():
    """torch's boxing of a string that an op is given forgets one, 48 bytes; ours does not."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    ops, x, n = torch.ops.effnet_fast, torch.randn(1, 16, 8, 8), norm(16)
    partial, window = torch.randn(1, 1, 16), (1, [1, 1, 1, 1], "silu")
    calls = {
        "conv": lambda: ops.conv_bn_act.native(x, torch.ones(16, 16, 3, 3), *n, None, *window, None),
        "depthwise": lambda: ops.depthwise_conv_bn_act.native(x, torch.ones(16, 1, 3, 3), *n, *window, 1),
        "pointwise": lambda: ops.pointwise_conv_bn_act.native(x, torch.ones(16, 16, 1, 1), *n, None, None, "silu"),
        "gate": lambda: ops.squeeze_excite_gate.native(
            partial, 64, torch.ones(4, 16, 1, 1), torch.ones(4), torch.ones(16, 4, 1, 1), torch.ones(16), "silu"
        ),
    }

    def in_use(call: Callable[[], Tensor], times: int) -> int:
        for _ in range(times):
            call()
        gc.collect()
        told = mallinfo()
        return told.used + told.mapped

    with torch.no_grad():
        for name, call in calls.items():
            before = in_use(call, 200)
            assert (in_use(call, 2000) - before) / 2000 < 8, name
