"""Processes that a simulation starts, and their certain end."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from types import FrameType
from typing import Any

from tat_core.processes import end_marked

MARK = "FED_TAT_PROCESSES"
AGAIN_SECONDS = 5.0


@contextlib.contextmanager
def no_process_left() -> Iterator[None]:
    """End every process started inside the block, however it ends.

    Flower and Ray detach their daemons into sessions of their own, so process groups do not reach them. An environment
    variable is inherited by all of them: whoever carries our mark when the block ends is killed. SIGTERM and SIGHUP end the
    block as Ctrl-C does. An interrupt can be lost, where a library swallows it or waits for a lock that the interrupted code
    never gave back, so it is raised every five seconds until the block has ended.
    """
    mark = uuid.uuid4().hex
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
    alarm = signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        # Another interrupt must not stop the cleaning.
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, *alarm)
        end_marked(MARK, mark)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.pop(MARK)
        if before is not None:
            os.environ[MARK] = before


@contextlib.contextmanager
def pool_of(workers: int, **options: Any) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, started afresh, that are killed when the block ends by an error or interrupt.

    Without this, leaving would wait for jobs that nobody wants any more.
    """
    pool = ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn"), **options)
    try:
        yield pool
    except BaseException:
        for process in mp.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
    raise KeyboardInterrupt
