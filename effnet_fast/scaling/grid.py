"""The small grid search for the law's coefficients (arXiv 1905.11946, section 3.3, step 1): alpha, beta, gamma >= 1 with
alpha * beta^2 * gamma^2 ~ 2 at phi = 1, each judged by a callable, in parallel, and resumable."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effnet_fast.scaling.config import B0, BaseNet, is_real, is_whole
from effnet_fast.scaling.cost import Cost
from effnet_fast.scaling.law import CompoundScaling, ScaledNet

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
    file       JSON that is replaced whole after each point; where it is there, its points are not judged again
    same       what else a resumed search must have in common, as plain values by name: epochs, seeds, ...

    Progress is told on stderr where that is a terminal (tqdm). Raises ValueError for a bad argument, a grid without a point (with
    the nearest product there is), and a file of another search. An error of ``accuracy`` is raised; the file has what was judged.
    """
    from tqdm import tqdm

    if not is_whole(processes):
        raise ValueError(f"grid_search: processes is {processes!r}; a whole number >= 1 would do")
    laws = grid_laws(base, step, tolerance)
    path = None if file is None else Path(file)
    asked = {"base": asdict(base), "step": step, "tolerance": tolerance, **(same or {})}
    asked = json.loads(json.dumps(asked))  # as the file will have it
    known = {} if path is None else _load(path, asked)
    todo = [law for law in laws if _key(law) not in known]

    def so_far() -> tuple[GridPoint, ...]:
        return tuple(known[_key(law)] for law in laws if _key(law) in known)

    if todo:
        try:
            pickle.dumps(accuracy)  # which a pool, asked for more than it can queue, would wait for without end
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"grid_search: accuracy is {accuracy!r}; what pickle takes, as a module's function, would do"
            ) from error
        pool = ProcessPoolExecutor(min(processes, len(todo)), multiprocessing.get_context("spawn"))
        try:
            futures: dict[Future, CompoundScaling] = {pool.submit(_judge, accuracy, law): law for law in todo}
            with tqdm(total=len(laws), initial=len(known), unit="net", disable=None, leave=False) as bar:
                for future in as_completed(futures):
                    known[_key(futures[future])] = future.result()
                    if path is not None:
                        write_json(path, {"search": asked, "points": [asdict(point) for point in so_far()]})
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return Grid(base, so_far())


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


def _judge(accuracy: Callable[[ScaledNet], float], law: CompoundScaling) -> GridPoint:
    net, start = law.at(1), time.perf_counter()
    found = float(accuracy(net))
    if not is_real(found):
        raise ValueError(f"grid_search: accuracy gave {found!r} for {law.alpha:g}, {law.beta:g}, {law.gamma:g}; a number would do")
    cost = Cost.of(net.config)
    return GridPoint(*_key(law), found, time.perf_counter() - start, cost.macs, cost.parameters)


def _key(law: CompoundScaling) -> tuple[float, float, float]:
    return law.alpha, law.beta, law.gamma


def _load(path: Path, asked: dict[str, Any]) -> dict[tuple[float, float, float], GridPoint]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        there, points = found["search"], [GridPoint(**point) for point in found["points"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"grid_search: {path} is no file of a grid search; another name would do") from error
    if differing := [name for name in {**asked, **there} if asked.get(name) != there.get(name)]:
        told = ", ".join(f"{name} {there.get(name)!r}, not {asked.get(name)!r}" for name in differing if name != "base")
        raise ValueError(f"grid_search: {path} is of another search ({told or 'base'}); its settings, or another file, would do")
    return {(point.alpha, point.beta, point.gamma): point for point in points}
