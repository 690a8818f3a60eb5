"""Run one function over many cases with a progress bar, such that no single case can stop the others."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_each(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, label: str
) -> Iterator[tuple[Item, Result | ValueError]]:
    """Yield each item with its result, or with the ValueError that says why there is none.

    Parameters
    ----------
    function : callable
        Must be importable by name when `workers` is above 1.
    items : sequence
    workers : int
        Processes; 1 runs in this one. A worker killed by the system (out of memory, a crashing decoder) costs only the case it
        was at.
    label : str
        What the progress bar says.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=len(items))
        outcomes = _in_processes(function, items, workers) if workers > 1 and len(items) > 1 else _here(function, items)
        for item, outcome in outcomes:
            progress.advance(bar)
            yield item, outcome


def _here(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result | ValueError]]:
    for item in items:
        yield item, _guarded(function, item)


def _guarded(function: Callable[[Item], Result], item: Item) -> Result | ValueError:
    try:
        return function(item)
    except ValueError as error:
        return ValueError(str(error))
    except Exception as error:  # whatever a damaged file makes a decoder do, the other cases go on
        return ValueError(f"{function.__name__}: expected a usable case, got {type(error).__name__}; look at the case by itself")


def _in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result | ValueError]]:
    waiting = list(items)
    while waiting:
        pool = ProcessPoolExecutor(min(workers, len(waiting)), mp_context=multiprocessing.get_context("spawn"))
        try:
            futures: list[Future[Result | ValueError]] = [pool.submit(_guarded, function, item) for item in waiting]
            done = 0
            for item, future in zip(waiting, futures, strict=True):
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    break
                done += 1
                yield item, outcome
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        # A worker died, and which case killed it is not known: those that were at work go on one by one.
        suspects, waiting = waiting[done : done + 2 * workers], waiting[done + 2 * workers :]
        yield from _one_by_one(function, suspects)


def _one_by_one(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result | ValueError]]:
    pool: ProcessPoolExecutor | None = None
    try:
        for item in items:
            pool = pool or ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            try:
                outcome = pool.submit(_guarded, function, item).result()
            except BrokenProcessPool:
                died = "expected a usable case, got one that ended its process (out of memory or a decoder crash)"
                outcome, pool = ValueError(f"{function.__name__}: {died}; look at the case by itself"), None
            yield item, outcome
    finally:
        if pool is not None:
            pool.shutdown()
