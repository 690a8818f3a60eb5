"""Processes that a simulation starts, and their certain end."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from types import FrameType

import psutil

MARK = "FED_TAT_PROCESSES"


@contextlib.contextmanager
def no_process_left() -> Iterator[None]:
    """End every process started inside the block, however it ends.

    Flower and Ray detach their daemons into sessions of their own, so process groups do not reach them. An environment
    variable is inherited by all of them: whoever carries our mark when the block ends is killed. SIGTERM and SIGHUP end the
    block as Ctrl-C does.
    """
    mark = uuid.uuid4().hex
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        # A second Ctrl-C must not stop the cleaning.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        _end_marked(mark)
        signal.signal(signal.SIGINT, interrupt)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.pop(MARK)
        if before is not None:
            os.environ[MARK] = before


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def _end_marked(mark: str) -> None:
    """Terminate, then kill; again, since a process may have started another meanwhile."""
    for process in (alive := _marked(mark)):
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(alive, timeout=3)
    for _ in range(5):
        if not (alive := _marked(mark)):
            return
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=3)
