"""Keep a coordinator going: the SuperLink, the proxy, the list of hospitals, and the run until it has finished."""

from __future__ import annotations

import logging
import shlex
import signal
import threading
import time
from pathlib import Path

import httpx
from flwr.supercore.control import ControlHttpClient

from server.consortium import AUTHORITY, COORDINATOR, active_keys, expiries, utc_now
from server.coordinator import CoordinatorConfig, proxy_command, proxy_configuration, superlink_command
from server.journal import finished_rounds
from server.service import FIRST_PAUSE_S, LONGEST_PAUSE_S, Service
from server.superlink import control, register_only, run_status, start_run
from tat_core.files import hold, write_file
from tat_core.record import is_run, read_record

log = logging.getLogger("fed_tat.coordinator")

POLL_S = 2.0
DAY_S = 86400.0
SILENT_S = 120.0  # a SuperLink that has not answered for so long is started afresh


def supervise(config: CoordinatorConfig, stopping: threading.Event) -> bool:
    """Run the coordinator until its run has finished, or until told to stop; whether it has finished.

    Raises
    ------
    ValueError
        There is one for this folder already: two would submit the same run twice.
    """
    lock = hold(config.folder / "coordinator.lock")
    if lock is None:
        raise ValueError(f"coordinator up: expected to be the only one for {config.folder}, got another that runs; stop it first")
    for name in ("logs", "proxy/temporary", "superlink", "runs"):
        (config.folder / name).mkdir(parents=True, exist_ok=True)
    write_file(config.folder / "proxy" / "nginx.conf", proxy_configuration(config).encode())
    coordinator = _Coordinator(config)
    try:
        while not stopping.wait(POLL_S):
            if coordinator.tend():
                return True
    finally:
        coordinator.stop()
        lock.close()
    return False


class _Coordinator:
    def __init__(self, config: CoordinatorConfig) -> None:
        self._config, self._folder = config, config.folder
        self._authority = (config.folder / AUTHORITY).read_bytes()
        self._superlink = Service("superlink", superlink_command(config), config.folder)
        self._proxy = Service("proxy", proxy_command(config), config.folder)
        self._run = _Run(config) if config.preset else None
        self._certificate = self._certificate_version()
        self._registered: object = None
        self._answered = self._next_warning = 0.0

    def tend(self) -> bool:
        """See to everything once; whether the run has finished."""
        self._tend_certificates()
        self._tend_database()
        self._proxy.keep()
        starts = self._superlink.starts
        running = self._superlink.keep()
        if self._superlink.starts != starts:
            self._answered = time.monotonic()
            if self._run:
                self._run.forget()
        if not running:
            return False
        try:
            with control(self._config.superlink, self._authority) as client:
                self._tend_hospitals(client)
                finished = self._run is not None and self._run.tend(client)
        except httpx.HTTPStatusError as error:
            log.warning("SuperLink refuses: %s", error.response.text)
            return False
        except httpx.HTTPError:  # it starts, or is gone
            if time.monotonic() - self._answered > SILENT_S:
                log.warning("SuperLink has not answered for %.0f s and is started afresh", SILENT_S)
                self._superlink.stop()
            return False
        self._answered = time.monotonic()
        return finished

    def stop(self) -> None:
        """End both, the proxy first: hospitals then wait and try again."""
        self._proxy.stop()
        self._superlink.stop()

    def _tend_hospitals(self, client: ControlHttpClient) -> None:
        """Register the approved hospitals with a SuperLink that was started, and after a change in ``sites/``."""
        files = sorted((path.name, path.stat().st_mtime_ns) for path in (self._folder / "sites").glob("*.json"))
        if self._registered != (self._superlink.starts, files):
            keys = active_keys(self._folder)
            register_only(client, keys)
            self._registered = (self._superlink.starts, files)
            log.info("%d hospitals may connect: %s", len(keys), ", ".join(sorted(keys)) or "none is approved yet")

    def _tend_certificates(self) -> None:
        if time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + DAY_S
            for name, _, warning in expiries(self._folder, utc_now()):
                if warning:
                    log.warning("certificate %s %s; `tat provision rotate`", name, warning)
        if self._certificate_version() != self._certificate:
            self._certificate = self._certificate_version()
            self._proxy.signal(signal.SIGHUP)
            log.info("the coordinator's certificate was replaced; the proxy has read it")

    def _tend_database(self) -> None:
        """Begin the SuperLink's database anew when it has grown too large; hospitals and run come back by themselves."""
        files = list((self._folder / "superlink").glob("state.db*"))
        size_mb = sum(path.stat().st_size for path in files) // 2**20
        if size_mb > self._config.max_database_mb:
            log.warning("the SuperLink's database has %d MB and is begun anew", size_mb)
            self._superlink.stop()
            for path in files:
                path.unlink(missing_ok=True)

    def _certificate_version(self) -> int:
        return (self._folder / COORDINATOR).stat().st_mtime_ns


class _Run:
    """The run: submitted, watched, and submitted again until it says itself that it has finished."""

    def __init__(self, config: CoordinatorConfig) -> None:
        run = config.run
        assert run is not None, "made for a coordinator that has a run"
        self._preset, self._overrides = run.preset, shlex.join(config.run_overrides)
        self._folder, self._num_rounds = Path(run.output_dir) / run.name, run.num_rounds
        self._id: int | None = None
        self._next_start, self._pause, self._rounds = 0.0, FIRST_PAUSE_S, 0

    def forget(self) -> None:
        """The SuperLink died, and the run with it."""
        self._id = None

    def tend(self, client: ControlHttpClient) -> bool:
        """Submit the run if it does not go on; whether it has finished."""
        if self._id is None:
            if self._is_finished():
                log.info("the run has finished: %s", self._folder)
                return True
            if time.monotonic() >= self._next_start:
                self._id = start_run(client, self._preset, self._overrides)
                log.info("run submitted as %d, from round %d on", self._id, self._rounds_done() + 1)
            return False
        state, reason = run_status(client, self._id)
        if state == "finished":
            self._id = None
            if not self._is_finished():
                self._wait_before_the_next(reason)
        return False

    def _wait_before_the_next(self, reason: str) -> None:
        done = self._rounds_done()
        self._pause = FIRST_PAUSE_S if done > self._rounds else min(2 * self._pause, LONGEST_PAUSE_S)
        self._rounds, self._next_start = done, time.monotonic() + self._pause
        log.warning("the run ended after round %d (%s); it goes on in %.0f s; see logs/superlink.log", done, reason, self._pause)

    def _rounds_done(self) -> int:
        return len(read_record(self._folder).rounds) if is_run(self._folder) else 0

    def _is_finished(self) -> bool:
        """By the run's own word: the last round's line in the record is older than its state, its model and the comparison."""
        return finished_rounds(self._folder) >= self._num_rounds
