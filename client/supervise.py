"""Keep processes running: start, watch, restart with longer and longer pauses, stop."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger("fed_tat.launcher")

LONGEST_PAUSE_S, GRACE_S, LOOK_S = 60.0, 20.0, 0.2
PARENT_VARIABLE = "FED_TAT_PARENT"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Flower's, which would only disturb in a log


class Group:
    """Processes that live and die together: when one of them ends, the others are ended, and all are started again.

    Parameters
    ----------
    commands : callable
        Gives the command line of each by name, anew for every start; they are stopped in this order.
    environment : mapping
    first_pause_s : float
        Between an end and the next start; it doubles up to a minute, and is forgotten by a group that lasted longer than that.
        Flower refuses a node that it believes to be active still, for about a minute after a crash: the pauses outlast that.
    """

    def __init__(
        self, commands: Callable[[], dict[str, list[str]]], environment: Mapping[str, str], first_pause_s: float
    ) -> None:
        self._commands, self._environment, self._first_pause_s = commands, environment, first_pause_s
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started = self._due = 0.0
        self._pause_s = first_pause_s

    def look(self) -> None:
        """Start what is due; notice what ended."""
        now = time.monotonic()
        if not self._processes:
            if now >= self._due:
                self._start(now)
            return
        ended = {name: code for name, process in self._processes.items() if (code := process.poll()) is not None}
        if not ended:
            return
        self.stop()
        if now - self._started > LONGEST_PAUSE_S:
            self._pause_s = self._first_pause_s
        self._due = now + self._pause_s
        for name, code in ended.items():
            log.warning("%s ended with code %s; next start in %.1f s", name, code, self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def stop(self) -> None:
        """End all of them and all that they started."""
        for name, process in self._processes.items():
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                log.warning("%s did not stop in %.0f s and is killed", name, GRACE_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes = {}

    def _start(self, now: float) -> None:
        self._started = now
        for name, command in self._commands().items():
            self._processes[name] = process = subprocess.Popen(
                command,
                env={**self._environment, PARENT_VARIABLE: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            threading.Thread(target=_relay, args=(name, process), daemon=True).start()
            log.info("%s started", name)


def keep_running(groups: Sequence[Group], stopping: threading.Event) -> None:
    """Keep the groups running until told to stop, then stop them in their order."""
    while not stopping.wait(LOOK_S):
        for group in groups:
            group.look()
    for group in groups:
        group.stop()
    log.info("stopped")


def is_orphan() -> bool:
    """Whether whoever started this process by a `Group` is gone; also when that happened before this process could look."""
    return PARENT_VARIABLE in os.environ and os.getppid() != int(os.environ[PARENT_VARIABLE])


def _relay(name: str, process: subprocess.Popen[bytes]) -> None:
    """What a process prints becomes lines of our log."""
    assert process.stdout is not None
    for line in process.stdout:
        if text := _COLOUR.sub("", line.decode(errors="replace")).rstrip():
            log.info("%s: %s", name, text)
