"""Processes that a simulation starts, and their certain end."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from types import FrameType

from tat_core.processes import end_marked

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
        end_marked(MARK, mark)
        signal.signal(signal.SIGINT, interrupt)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.pop(MARK)
        if before is not None:
            os.environ[MARK] = before


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
