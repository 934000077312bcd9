"""The small grid search for the law's coefficients (arXiv 1905.11946, section 3.3, step 1): alpha, beta, gamma >= 1 with
alpha * beta^2 * gamma^2 ~ 2 at phi = 1, each judged by a callable, in parallel, and resumable."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effnet_fast.scaling.config import B0, BaseNet, as_real, is_real, is_whole
from effnet_fast.scaling.cost import Cost
from effnet_fast.scaling.law import CompoundScaling, ScaledNet
from effnet_fast.settings import differing, plain

TARGET = 2.0  # of alpha * beta^2 * gamma^2


@dataclass(frozen=True)
class GridPoint:
    """One law's net at phi = 1: what it scored, the seconds that took, and its exact cost, which rounding bends away from 2."""

    alpha: float
    beta: float
    gamma: float
    accuracy: float
    seconds: float
    macs: int
    parameters: int


@dataclass(frozen=True)
class Grid:
    """All points of the grid, in its order, and the base that they scale."""

    base: BaseNet
    points: tuple[GridPoint, ...]

    @property
    def ranked(self) -> tuple[GridPoint, ...]:
        """The most accurate first; equals by fewer MACs, then by the order of the grid."""
        return tuple(sorted(self.points, key=lambda point: (-point.accuracy, point.macs)))

    @property
    def best(self) -> CompoundScaling:
        """The law of the first of them: ``grid.best.at(phi)`` scales on (step 2)."""
        first = self.ranked[0]
        return CompoundScaling(first.alpha, first.beta, first.gamma, self.base)


def grid_search(
    accuracy: Callable[[ScaledNet], float],
    base: BaseNet = B0,
    *,
    step: float = 0.1,
    tolerance: float = 0.1,
    processes: int = 1,
    file: str | os.PathLike[str] | None = None,
    same: Mapping[str, Any] | None = None,
) -> Grid:
    """Judge every law on the grid by its net at phi = 1.

    accuracy   picklable, of a net: larger is better. It is called in processes of its own, and what it returns must follow from the
               net alone: then neither their number nor a resumption changes the result
    step       of each coefficient, from 1
    tolerance  by which alpha * beta^2 * gamma^2 may be off 2
    file       JSON that is replaced whole after each point; where it is there, its points are not judged again. Its ``seconds`` are
               the search's own, until its last point, of all calls together
    same       what else a resumed search must have in common, plain values or dataclasses by name: epochs, seeds, a recipe, ...

    Progress is told on stderr where that is a terminal (tqdm). Raises ValueError for a bad argument, a grid without a point (with
    the nearest product there is), and a file that is damaged or of another search. Where ``accuracy`` raises an error, no other
    point is begun, those that are being judged are finished, and a ValueError names the point, or says that a process
    died; the file has what was judged.
    """
    if not is_whole(processes):
        raise ValueError(f"grid_search: processes is {processes!r}; a whole number >= 1 would do")
    laws = grid_laws(base, step, tolerance)
    path = None if file is None else Path(file)
    asked = {"base": base, "step": step, "tolerance": tolerance, **(same or {})}
    known, seconds = ({}, 0.0) if path is None or not path.exists() else _load(path, asked, laws)
    todo = {"alpha {:g}, beta {:g}, gamma {:g}".format(*_key(law)): law for law in laws if _key(law) not in known}
    started = time.perf_counter()
    for name, score in judged(accuracy, {name: law.at(1) for name, law in todo.items()}, processes, len(known)):
        law, cost = todo[name], Cost.of(todo[name].at(1).config)
        known[_key(law)] = GridPoint(*_key(law), *score, cost.macs, cost.parameters)
        if path is not None:
            points = [asdict(known[_key(law)]) for law in laws if _key(law) in known]
            write_json(path, {"search": plain(asked), "points": points, "seconds": seconds + time.perf_counter() - started})
    return Grid(base, tuple(known[_key(law)] for law in laws))


def judged(
    accuracy: Callable[[ScaledNet], float], nets: Mapping[str, ScaledNet], processes: int, known: int = 0
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Each net's name with its accuracy and the seconds that took, when they are there; a bar counts them on from ``known``.

    Raises ValueError for an accuracy that cannot be pickled, fails at a net (which is named) or whose process died: after the nets
    that were being judged by then.
    """
    from tqdm import tqdm

    if not nets:
        return
    try:
        pickle.dumps(accuracy)  # which a pool, asked for more than it can queue, would wait for without end
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"grid_search: accuracy is {accuracy!r}; what pickle takes, as a module's function, would do") from error
    failed: tuple[str, BaseException] | None = None
    futures: dict[Future[tuple[float, float]], str] = {}
    waiting = deque(nets)
    pool = ProcessPoolExecutor(min(processes, len(nets)), multiprocessing.get_context("spawn"))
    try:
        with tqdm(total=known + len(nets), initial=known, unit="net", disable=None, leave=False) as bar:
            while futures or (waiting and not failed):
                while waiting and not failed and len(futures) < processes:  # what is queued in a pool cannot be taken back
                    name = waiting.popleft()
                    futures[pool.submit(_judge, accuracy, nets[name])] = name
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    name, raised = futures.pop(future), future.exception()
                    if raised is None:
                        yield name, future.result()
                        bar.update()
                    else:
                        failed = failed or (name, raised)
    except BrokenProcessPool as error:  # as a net was to be begun
        failed = failed or ("", error)
    finally:
        pool.shutdown()
    if failed is not None:
        name, cause = failed
        if isinstance(cause, BrokenProcessPool):  # nobody knows what it was judging
            raise ValueError(
                "grid_search: a process that judged nets died, as where memory is out; fewer processes, or smaller nets, would do "
                "(and in a script all of it under if __name__ == '__main__')"
            ) from cause
        raise ValueError(f"grid_search: accuracy failed at {name}: {type(cause).__name__}: {cause}") from cause


def grid_laws(base: BaseNet = B0, step: float = 0.1, tolerance: float = 0.1) -> tuple[CompoundScaling, ...]:
    """The laws of the grid, by rising alpha, beta, gamma. Raises ValueError where there is none."""
    if not is_real(step) or not 0.02 <= step <= 1:
        raise ValueError(f"grid_search: step is {step!r}; a number from 0.02 to 1 would do")
    if not is_real(tolerance) or not 0 <= tolerance < 1:
        raise ValueError(f"grid_search: tolerance is {tolerance!r}; a number from 0 and below 1 would do")
    if not isinstance(base, BaseNet):
        raise ValueError(f"grid_search: base is {base!r}; a BaseNet such as effnet_fast.scaling.B0 would do")
    values = [round(1 + step * number, 10) for number in range(int(TARGET / step) + 1)]
    products = {(a, b, c): a * b**2 * c**2 for a, b, c in itertools.product(values, repeat=3)}
    good = tuple(
        CompoundScaling(alpha, beta, gamma, base)
        for (alpha, beta, gamma), product in products.items()
        if abs(product - TARGET) <= tolerance + 1e-9
    )
    if not good:
        nearest = min(products.values(), key=lambda product: abs(product - TARGET))
        raise ValueError(
            f"grid_search: no alpha, beta, gamma in steps of {step:g} have alpha * beta^2 * gamma^2 within {tolerance:g} of "
            f"{TARGET:g}; the nearest product is {nearest:.4g}, {abs(nearest - TARGET):.2g} off: "
            "that as the tolerance, or a smaller step, would do"
        )
    return good


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(value, indent=1) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _judge(accuracy: Callable[[ScaledNet], float], net: ScaledNet) -> tuple[float, float]:
    start = time.perf_counter()
    told = accuracy(net)
    found = as_real(told)
    if found is None:
        raise ValueError(f"it is {told!r}; a finite number would do")
    return found, time.perf_counter() - start


def _key(law: CompoundScaling) -> tuple[float, float, float]:
    return law.alpha, law.beta, law.gamma


def _load(
    path: Path, asked: dict[str, Any], laws: Sequence[CompoundScaling]
) -> tuple[dict[tuple[float, float, float], GridPoint], float]:
    """The points that the file has, and the seconds that finding them took."""

    def check(good: bool, what: str, value: object, would_do: str) -> None:
        if not good:
            raise ValueError(
                f"grid_search: {path} is no file of a grid search: {what} is {value!r:.80}; {would_do}, or another file, would do"
            )

    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"grid_search: {path} is no file of a grid search: no JSON ({error}); another file would do") from error
    check(isinstance(found, dict), "all of it", found, "an object with search, points and seconds")
    there, rows, seconds = (found.get(name) for name in ("search", "points", "seconds"))
    check(isinstance(there, dict), "search", there, "an object of settings")
    check(isinstance(rows, list), "points", rows, "a list")
    check(is_real(seconds) and seconds >= 0, "seconds", seconds, "a number >= 0")
    if told := differing(there, asked):
        raise ValueError(f"grid_search: {path} is of another search ({told}); its settings, or another file, would do")
    names = GridPoint.__annotations__
    for number, row in enumerate(rows):
        check(isinstance(row, dict) and row.keys() == names.keys(), f"point {number}", row, f"an object with {', '.join(names)}")
        for name, value in row.items():
            good = is_whole(value) if name in ("macs", "parameters") else is_real(value)
            check(good, f"{name} of point {number}", value, "a number")
    points = {(point.alpha, point.beta, point.gamma): point for point in (GridPoint(**row) for row in rows)}
    for key in points.keys() - set(map(_key, laws)):
        check(False, "a point", key, "alpha, beta and gamma of the grid")
    return points, seconds
