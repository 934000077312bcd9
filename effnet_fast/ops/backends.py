"""Which backend runs an op: an ordered list of kernels, each with a reason why it cannot run, or none.

The table is filled once, at import. A choice looks at x's dtype and device and at what the op says of its other arguments; it is
made above the dispatcher, so that ``torch.compile(fullgraph=True)`` sees one op, or the plain PyTorch of the reference, and nothing
of how it was chosen.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

BACKENDS = ("native", "triton", "reference")  # best first
ENVIRONMENT = "EFFNET_FAST_BACKEND"


class Kernel(NamedTuple):
    """One op on one backend.

    run       ``torch.ops.effnet_fast.OP.BACKEND``, or the reference as a plain function
    can_run   ``can_run(x)`` gives None, or why it cannot take this ``x``
    pieces    for an op that makes a squeeze's partial sums: how many an image, from x's and y's shape
    """

    backend: str
    run: Callable[..., Any]
    can_run: Callable[[torch.Tensor], str | None]
    pieces: Callable[[torch.Tensor, int, int], int] | None = None


class Choice(NamedTuple):
    """What :func:`choose` decided: the backend that runs ``op`` and, for each other one, the reason why it does not."""

    op: str
    backend: str
    refused: dict[str, str]


class _State(threading.local):
    """A thread's own. Where the class had attributes of these names, torch 2.11's compiler would read those instead."""

    environment: str | None = None

    def __init__(self) -> None:
        self.requested = self.environment
        self.strict = False
        self.trace: list[Choice | str] | None = None


_KERNELS: dict[str, list[Kernel]] = {}
_STATE = _State()


def register(op: str, kernel: Kernel) -> None:
    """Add a kernel to the table. Called by each op's folder at import."""
    _KERNELS.setdefault(op, []).append(kernel)
    _KERNELS[op].sort(key=lambda kernel: BACKENDS.index(kernel.backend))


def kernels(op: str) -> tuple[Kernel, ...]:
    """The registered kernels of ``op``, best first."""
    return tuple(_KERNELS[op])


def always(x: torch.Tensor) -> str | None:
    """``can_run`` of the reference kernels."""
    return None


def choose(
    op: str, x: torch.Tensor, unsupported: Mapping[str, str] | None = None, slower: Mapping[str, str] | None = None
) -> Kernel:
    """The kernel of ``op`` that runs for ``x``: the asked-for backend if it can, else the best that can.

    unsupported  the backends that do not take the op's other arguments, each with the reason
    slower       the backends that are slower than the ones after them, each with the reason: they run only where they are asked for

    Raises RuntimeError where the asked-for backend cannot run and the request was strict.
    """
    kernels = _KERNELS[op]
    if _STATE.requested is None and _STATE.trace is None:  # nobody asks for the reasons, and every call comes here
        for kernel in kernels:
            name = kernel.backend
            if name == "reference" or (
                (slower is None or name not in slower)
                and (unsupported is None or name not in unsupported)
                and kernel.can_run(x) is None
            ):
                return kernel
    if _STATE.requested is not None:
        kernels = sorted(kernels, key=lambda kernel: kernel.backend != _STATE.requested)
    chosen = None
    refused = dict.fromkeys(BACKENDS, "no kernel of this op")
    for kernel in kernels:
        reason = kernel.can_run(x) or (unsupported or {}).get(kernel.backend)
        if kernel.backend not in ("reference", _STATE.requested):
            reason = reason or (slower or {}).get(kernel.backend)
        if reason is None and chosen is None:
            chosen = kernel
        refused[kernel.backend] = reason or "another backend comes first"
        if chosen is not None and _STATE.trace is None:
            break
    assert chosen is not None  # every op has a reference kernel, and that one always runs
    if _STATE.strict and chosen.backend != _STATE.requested:
        raise RuntimeError(
            f"{op}: backend {_STATE.requested!r} was asked for strictly and cannot run: {refused[_STATE.requested or '']}"
        )
    if _STATE.trace is not None:
        refused.pop(chosen.backend)
        _STATE.trace.append(Choice(op, chosen.backend, refused))
    return chosen


def refuse_strictly(what: str, reason: str) -> None:
    """Raise RuntimeError where a backend is asked for strictly, and ``what`` would not run on it for that reason."""
    if _STATE.strict:
        raise RuntimeError(f"{what}: backend {_STATE.requested!r} was asked for strictly and cannot run: {reason}")


def note(line: str) -> None:
    """Tell a running :func:`tracing` why no op is called here."""
    if _STATE.trace is not None:
        _STATE.trace.append(line)


@contextmanager
def tracing() -> Iterator[list[Choice | str]]:
    """Collect every choice made inside, in order."""
    before, _STATE.trace = _STATE.trace, []
    try:
        yield _STATE.trace
    finally:
        _STATE.trace = before


def is_tracing() -> bool:
    """Whether a :func:`tracing` collects what is chosen now."""
    return _STATE.trace is not None


def reasons(device: str = "cpu") -> dict[str, dict[str, str | None]]:
    """For each backend and op: None where a float32 tensor on ``device`` can run there, else why not."""
    probe: Any = _Probe(torch.float32, device)
    table: dict[str, dict[str, str | None]] = {}
    for backend in BACKENDS:
        table[backend] = {}
        for op, kernels in _KERNELS.items():
            kernel = next((kernel for kernel in kernels if kernel.backend == backend), None)
            table[backend][op] = "no kernel of this op" if kernel is None else kernel.can_run(probe)
    return table


class _Probe:
    """Stands for a tensor of a dtype on a device that this machine may not have."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.is_cuda = self.device.type == "cuda"


@contextmanager
def backend(name: str, strict: bool = False) -> Iterator[None]:
    """Ask for a backend inside the ``with``, in this thread.

    It runs every op that has a kernel for it there; with ``strict=True`` an op that has none raises RuntimeError with the reason.
    A backend that has no kernel at all on this machine raises at once.
    """
    _check_request(name)
    with asking(name, strict):
        yield


@contextmanager
def asking(name: str | None, strict: bool) -> Iterator[None]:
    """As :func:`requested` told of another thread: autograd runs a backward on a GPU in one of its own."""
    before = requested()
    _STATE.requested, _STATE.strict = name, strict
    try:
        yield
    finally:
        _STATE.requested, _STATE.strict = before


def requested() -> tuple[str | None, bool]:
    """The backend that is asked for in this thread, if one is, and whether strictly."""
    return _STATE.requested, _STATE.strict


def _check_request(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not a backend; one of {', '.join(BACKENDS)} would do")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    refusals = [reason for device in devices for reason in reasons(device)[name].values()]
    if all(reason is not None for reason in refusals):
        raise RuntimeError(f"backend: {name!r} cannot run any op on this machine: {'; '.join(sorted(set(refusals)))}")  # type: ignore[arg-type]


def read_environment() -> None:
    """Take ``EFFNET_FAST_BACKEND`` as the request of every thread. Called once, when all kernels are registered."""
    name = os.environ.get(ENVIRONMENT)
    if name:
        _check_request(name)
        _State.environment = _STATE.requested = name
