"""Find and end what a process started, also what detached itself: an environment variable is inherited by all of it."""

from __future__ import annotations

import contextlib
import os

import psutil


def marked(variable: str, value: str) -> list[psutil.Process]:
    """The processes, other than this one, whose environment has the variable with that value."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                found.append(process)
    return found


def end_marked(variable: str, value: str) -> None:
    """Terminate them, then kill them; again, since a process may have started another meanwhile."""
    for process in (alive := marked(variable, value)):
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(alive, timeout=3)
    for _ in range(5):
        if not (alive := marked(variable, value)):
            return
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=3)
