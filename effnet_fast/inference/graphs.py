"""A network on CUDA as graphs: the kernels of one pass captured for each shape of a batch, and launched as one from then on.

All graphs of a network share one pool of memory (:class:`CudaPool`): it is as large as the largest of them needs. That is right as
long as they run one after the other, whatever the order, and as nothing that one leaves in the pool is needed after another has
run. So a turn is: copy the images in, launch, copy the results out, and wait for the turn before if that is on another stream. To
copy results out costs less than to let them be written where the caller wants them: an address in a graph is fixed, and logits are
a few KB.
"""

from __future__ import annotations

import statistics
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

FEW = 4  # images
ROUNDS, REPLAYS = 5, 10  # of graphs that are compared
MARGIN = 0.03  # by which the other way must be faster, so that no noise decides
GRAPHS = 16  # that a network keeps: each shape, batch size included, layout and dtype has its own
_CAPTURING = threading.Lock()  # torch allows one capture in a process

Run = Callable[[Tensor], Any]


class Uncapturable(Exception):
    """Why a pass cannot be a CUDA graph: something in it waits for the GPU, say."""


class Key(NamedTuple):
    """What a graph is captured for: images lie in its memory as NCHW or channels_last, whatever the caller's strides."""

    shape: torch.Size
    dtype: torch.dtype
    form: torch.memory_format

    def stored(self, x: Tensor) -> Tensor:
        """A copy of ``x`` as a graph wants it."""
        return torch.empty(self.shape, dtype=self.dtype, device=x.device, memory_format=self.form).copy_(x)

    def noise(self, device: torch.device) -> Tensor:
        """Images of it as good as any, the same each time; nobody else's random numbers change."""
        generator = torch.Generator(device).manual_seed(0)
        x = torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.form)
        return x.normal_(generator=generator) if self.dtype.is_floating_point else x.random_(256, generator=generator)

    def __str__(self) -> str:
        form = "channels_last" if self.form == torch.channels_last else "NCHW"
        return f"{'x'.join(map(str, self.shape))} {form} {self.dtype}"


class Graph(NamedTuple):
    """``replay`` computes ``results`` of what ``x`` holds; all three stay where they are. ``told``: what it is, in words."""

    x: Tensor
    results: Any
    replay: Callable[[], None]
    told: str = "a CUDA graph"

    def static_bytes(self) -> int:
        return sum(t.nbytes for t in tree_flatten((self.x, self.results))[0] if isinstance(t, Tensor))


class Pool(Protocol):
    """Memory for graphs, and the order of their turns on it."""

    def capture(self, run: Run, x: Tensor, key: Key) -> Graph:
        """``run`` as a graph for images like ``x``. It raises what ``run`` raises, OutOfMemoryError, and Uncapturable."""

    def turn(self) -> AbstractContextManager[None]:
        """What the current stream is given inside comes after all turns before this one."""

    def milliseconds(self, graphs: Sequence[Graph]) -> list[float]:
        """That a replay of each takes."""

    def bytes(self) -> int:
        """That it holds of the device's memory."""


class Few(NamedTuple):
    """Another way to run a batch of few images, which may be faster.

    run    its text tells what it does in a pass
    agree  whether its result is that of the plain way but for rounding
    """

    run: Run
    agree: Callable[[Any, Any], bool]


def _forget_workspaces() -> None:
    """cuBLAS keeps one for each stream: a capture is to make its own, in its own pool, and to leave none behind."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # as torch's own graphs of compiled code do
    if clear is not None:
        clear()


class CudaPool:
    """A :class:`Pool` on an NVIDIA GPU."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._pool, self._stream, self._last = torch.cuda.MemPool(), torch.cuda.Stream(), torch.cuda.Event()
        self._device = device

    @contextmanager
    def turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._last)
        try:
            yield
        finally:
            self._last.record(stream)

    def capture(self, run: Run, x: Tensor, key: Key) -> Graph:
        caller = torch.cuda.current_stream(self._device)
        with _CAPTURING, torch.cuda.stream(self._stream), self.turn():
            self._stream.wait_stream(caller)
            _forget_workspaces()
            torch.cuda.empty_cache()  # inside a pool the allocator does not do it when memory runs out
            try:
                # The warm-up takes from the pool all that the capture will want. So it is here that memory runs out, which torch
                # recovers from; a capture that fails so keeps its memory for good (pytorch/pytorch#190348).
                with torch.cuda.use_mem_pool(self._pool, self._device):
                    static = key.stored(x)
                    run(static)
            finally:
                caller.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating: only what this thread does can spoil the capture.
            try:
                with torch.cuda.graph(graph, self._pool.id, self._stream, "thread_local"):  # type: ignore[arg-type]
                    results = run(static)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise Uncapturable(f"{type(error).__name__}: {error}") from error
            finally:
                _forget_workspaces()
        return Graph(static, results, graph.replay)

    def milliseconds(self, graphs: Sequence[Graph]) -> list[float]:
        taken: list[list[float]] = [[] for _ in graphs]
        with torch.cuda.device(self._device), self.turn():
            for _ in range(ROUNDS):
                for graph, times in zip(graphs, taken, strict=True):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    for _ in range(REPLAYS):
                        graph.replay()
                    end.record()
                    end.synchronize()
                    times.append(start.elapsed_time(end) / REPLAYS)
        return [statistics.median(times) for times in taken]

    def bytes(self) -> int:
        return sum(segment["total_size"] for segment in self._pool.snapshot())


class Graphs:
    """``run`` for batches on CUDA, any number of threads and streams at the same time.

    dtype   of the images that ``run`` is given, where the caller's are of a floating type
    pool    makes the memory when there is none
    few     for up to ``FEW`` images: both are captured, and that whose replays are faster stays

    The graph that was not used for longest goes where there would be more than ``GRAPHS``.
    """

    def __init__(self, run: Run, dtype: torch.dtype, pool: Callable[[], Pool], few: Few | None = None) -> None:
        self._run, self._dtype, self._make_pool, self._few = run, dtype, pool, few
        self._graphs: OrderedDict[Key, Graph | str] = OrderedDict()  # or why there is none; they go before their pool
        self._pool: Pool | None = None
        self._lock = threading.Lock()

    def key(self, x: Tensor) -> Key:
        last = x.is_contiguous(memory_format=torch.channels_last)
        dtype = self._dtype if x.is_floating_point() else x.dtype
        return Key(x.shape, dtype, torch.channels_last if last else torch.contiguous_format)

    def __call__(self, x: Tensor) -> Any:
        """What ``run`` gives, in tensors that are the caller's."""
        key = self.key(x)
        with self._lock:
            pool = self._pool = self._pool or self._make_pool()
            graph = self._graphs.get(key)
            if graph is None:
                try:
                    graph = self._captured(pool, x, key)
                except Uncapturable as reason:
                    graph = str(reason)
                    warnings.warn(f"{key} runs without a CUDA graph from now on: {graph}", stacklevel=2)
            self._graphs[key] = graph
            self._graphs.move_to_end(key)
            while len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
            if isinstance(graph, str):
                return self._run(key.stored(x))
            with pool.turn():
                graph.x.copy_(x)
                graph.replay()
                return tree_map_only(Tensor, torch.clone, graph.results)

    def _captured(self, pool: Pool, x: Tensor, key: Key) -> Graph:
        plain = pool.capture(self._run, x, key)
        if self._few is None or len(x) > FEW:
            return plain
        try:
            return self._faster(pool, self._few, x, key, plain)
        except Exception as reason:  # whatever it is, there is a graph
            told = f"{type(reason).__name__}: {reason}".splitlines()[0]
            return plain._replace(told=f"{plain.told}; another way failed: {told}")

    def _faster(self, pool: Pool, few: Few, x: Tensor, key: Key, plain: Graph) -> Graph:
        """Of ``plain`` and what ``few`` gives, if that is right."""
        other = pool.capture(few.run, x, key)
        answers = []
        with pool.turn():
            for graph in (other, plain):  # one may lie where the other computes
                graph.x.copy_(key.noise(x.device))
                graph.replay()
                answers.append(tree_map_only(Tensor, torch.clone, graph.results))
        if not few.agree(*answers):
            return plain._replace(told=f"{plain.told}; with {few.run} it would give another result")
        took, instead = pool.milliseconds((plain, other))
        if instead < (1 - MARGIN) * took:
            return other._replace(told=f"{plain.told} with {few.run}, {instead:.3f} ms in place of {took:.3f}")
        return plain._replace(told=f"{plain.told}, {took:.3f} ms; with {few.run} it would take {instead:.3f}")

    def clear(self) -> None:
        """Give all memory back."""
        with self._lock, _CAPTURING:  # torch does not free a pool while it captures
            self._graphs.clear()
            self._pool = None

    def static_bytes(self) -> int:
        """Of all graphs' images and results, which are part of :meth:`bytes`."""
        with self._lock:
            return sum(graph.static_bytes() for graph in self._graphs.values() if isinstance(graph, Graph))

    def bytes(self) -> int:
        with self._lock:
            return self._pool.bytes() if self._pool else 0

    def lines(self) -> list[str]:
        with self._lock:
            graphs = self._graphs.items()
            return [f"  {key}: {graph if isinstance(graph, str) else graph.told}" for key, graph in graphs]


class InPieces:
    """``run`` for a batch, in pieces where memory does not suffice for all of it; from then on for all batches of such images.

    free    called where memory ran out: it may give back what it can, and the same is tried once more before smaller pieces
    """

    def __init__(self, run: Run, free: Callable[[], None]) -> None:
        self._run, self._free = run, free
        self._most: dict[tuple[torch.Size, torch.dtype], int] = {}

    def __call__(self, x: Tensor) -> Any:
        """Raises OutOfMemoryError where memory does not suffice for one image."""
        images = x.shape[1:], x.dtype
        whole = min(len(x), self._most.get(images, len(x)))
        sizes = [whole, whole]
        while sizes[-1] > 1:
            sizes.append((sizes[-1] + 1) // 2)
        while True:
            most = sizes.pop(0)
            try:
                results = [self._run(piece) for piece in x.split(most)]
                break
            except torch.OutOfMemoryError:
                if not sizes:
                    raise
            self._free()  # out here, where nothing of what failed is alive
        if most < whole:
            self._most[images] = most
            shape = "x".join(map(str, x.shape[1:]))
            warnings.warn(f"out of memory for {whole} images of {shape}: {most} run at a time from now on", stacklevel=2)
        return results[0] if len(results) == 1 else _joined(results)


def _joined(results: list[Any]) -> Any:
    """Of pieces, each a tree of tensors of as many rows as it has images."""
    leaves = [tree_flatten(result)[0] for result in results]
    joined = [torch.cat(same) if isinstance(same[0], Tensor) else same[0] for same in zip(*leaves, strict=True)]
    return tree_unflatten(joined, tree_flatten(results[0])[1])
