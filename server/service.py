"""A process that is kept running."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

from tat_core.environment import MESSAGE_ENVIRONMENT, QUIET_ENVIRONMENT
from tat_core.processes import end_marked

log = logging.getLogger("fed_tat.coordinator")

MARK = "FED_TAT_SERVICE"
FIRST_PAUSE_S, LONGEST_PAUSE_S, GRACE_S = 2.0, 60.0, 10.0


class Service:
    """A process that is started again when it ends, and everything that it started, which ends with it.

    Parameters
    ----------
    name : str
        For the log; its output goes to ``logs/<name>.log``.
    command : list of str
    folder : Path
        The coordinator's; also the process's working directory.
    """

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name, self._command, self._folder = name, command, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = ""
        self.starts = 0
        self._started = self._next_start = 0.0
        self._pause = FIRST_PAUSE_S

    def keep(self) -> bool:
        """Start the process if it is not there and its pause is over; whether it runs."""
        if self._process is not None and self._process.poll() is not None:
            self._clear_away(self._process.returncode)
        if self._process is None and time.monotonic() >= self._next_start:
            self._start()
        return self._process is not None

    def signal(self, number: int) -> None:
        """Send the process a signal, if it runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def stop(self) -> None:
        """Ask the process to end, insist, and end what it left."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                log.warning("%s does not stop and is killed", self.name)
            end_marked(MARK, self._mark)
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self._mark = uuid.uuid4().hex
        environment = {
            **os.environ,
            **QUIET_ENVIRONMENT,
            **MESSAGE_ENVIRONMENT,
            MARK: self._mark,
            "FLWR_HOME": str(self._folder / "superlink"),
            # Flower finds its other commands by name.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        with open(self._folder / "logs" / f"{self.name}.log", "ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started = time.monotonic()
        self.starts += 1
        log.info("%s started", self.name)

    def _clear_away(self, code: int) -> None:
        # An orphaned ServerApp must not go on writing to a run that is about to be started again.
        end_marked(MARK, self._mark)
        self._process = None
        lasted = time.monotonic() - self._started
        self._pause = FIRST_PAUSE_S if lasted > LONGEST_PAUSE_S else min(2 * self._pause, LONGEST_PAUSE_S)
        self._next_start = time.monotonic() + self._pause
        log.warning("%s ended with code %s; next start in %.0f s", self.name, code, self._pause)
