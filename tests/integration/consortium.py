"""A consortium of processes for tests: `tat coordinator up` with everything in front of it, and a `flower-client` a hospital."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from client.site import load_site
from tat_core.environment import QUIET_ENVIRONMENT

BINARIES = Path(sys.executable).parent


def environment() -> dict[str, str]:
    """Of every process that a test starts."""
    return {**os.environ, **QUIET_ENVIRONMENT, "PATH": f"{BINARIES}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


def tat(*arguments: object) -> str:
    """`tat …`, which must succeed; what it printed."""
    done = subprocess.run(
        [BINARIES / "tat", *map(str, arguments)], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Consortium:
    """A coordinator with approved hospitals, not started yet.

    Parameters
    ----------
    folder : Path
        New.
    hospitals : sequence of Path
        Site folders; they get state folders of their own here.
    overrides : sequence of str
        Of the ``smoke`` preset.
    host : str
        The coordinator's address.
    inside : callable
        What to put before the command of ``"coordinator"`` or of a hospital: how it gets into its own network, say.
    """

    def __init__(
        self,
        folder: Path,
        hospitals: Sequence[Path],
        overrides: Sequence[str] = (),
        host: str = "127.0.0.1",
        inside: Callable[[str], list[str]] = lambda _who: [],
    ) -> None:
        self.folder, self._inside = folder, inside
        self.coordinator = folder / "coordinator"
        self.address = f"{host}:{_free_port()}"
        self.run = self.coordinator / "runs" / "smoke"
        self.overrides = [f"federation.num_sites={len(hospitals)}", *overrides]
        self.sites: dict[str, Path] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        tat("provision", "init", "--folder", self.coordinator, "--name", host)
        self.configure(preset="smoke", overrides=self.overrides)
        for hospital in hospitals:
            self.admit(hospital)

    def configure(self, **settings: Any) -> None:
        """Write coordinator.yaml."""
        self.superlink_port = _free_port()
        content = {"listen": self.address, "superlink_port": self.superlink_port, **settings}
        (self.coordinator / "coordinator.yaml").write_text(yaml.safe_dump(content))

    def admit(self, hospital: Path) -> None:
        """Give a hospital a folder of its own, and let it in."""
        site = self.new_site(hospital)
        fingerprint = self.enroll(site)
        tat(
            "provision",
            "approve",
            site.parent / f"{hospital.name}.csr",
            "--folder",
            self.coordinator,
            "--fingerprint",
            fingerprint,
        )

    def new_site(self, hospital: Path, name: str | None = None) -> Path:
        """A site.yaml that shares the hospital's data and has its own state."""
        site = self.folder / (name or hospital.name) / "site.yaml"
        site.parent.mkdir()
        content = yaml.safe_load((hospital / "site.yaml").read_text())
        content |= {
            "data": {task: str(path) for task, path in load_site(hospital / "site.yaml").data.items()},
            "state_dir": "state",
        }
        site.write_text(yaml.safe_dump(content))
        self.sites[name or hospital.name] = site
        return site

    def enroll(self, site: Path) -> str:
        """`tat site enroll`; the fingerprint that it prints."""
        printed = tat("site", "enroll", site, "-o", site.parent)
        found = re.search(r"SHA256:\S+", printed)
        assert found, printed
        return found[0]

    def start_coordinator(self) -> subprocess.Popen[bytes]:
        """`tat coordinator up`."""
        return self._start("coordinator", "tat", "coordinator", "up", "--config", str(self.coordinator / "coordinator.yaml"))

    def start_site(self, name: str, prefix: Sequence[str] = (), authority: Path | None = None) -> subprocess.Popen[bytes]:
        """`flower-client` of a hospital."""
        site = self.sites[name]
        command = (
            *("flower-client", "--site", str(site), "--superlink", self.address),
            *("--root-certificates", str(authority or self.coordinator / "authority" / "ca.pem")),
            *("--key", str(site.parent / "state" / "node.key")),
        )
        return self._start(name, *command, prefix=prefix)

    def start(self) -> None:
        """Everything."""
        self.start_coordinator()
        for name in self.sites:
            self.start_site(name)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until something holds.

        Raises
        ------
        AssertionError
            It did not in time; with the ends of all logs.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not after {timeout_s} s\n{self.logs()}"
            time.sleep(0.2)

    def wait_for_end(self, timeout_s: float = 240.0) -> list[str]:
        """Wait for the end of `tat coordinator up`, which must be good; the hash of the model after every round."""
        self.wait_for(lambda: self.processes["coordinator"].poll() is not None, timeout_s, "the end of the run")
        assert self.processes["coordinator"].returncode == 0, self.logs()
        return hashes(self.run)

    def records(self) -> list[dict[str, Any]]:
        """The run's record so far."""
        return read_rounds(self.run)

    def log_of(self, who: str) -> str:
        """What the coordinator's or a hospital's process printed."""
        path = self.folder / f"{who}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """The ends of all logs."""
        files = [
            *self.folder.glob("*.log"),
            *(self.coordinator / "logs").glob("*.log"),
            *(self.coordinator / "proxy").glob("e*.log"),
        ]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files if path.exists())

    def find(self, who: str, command: str) -> list[psutil.Process]:
        """The processes with a word in their command line, among those that a hospital's or the coordinator's process started."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            belongs = (process.info["environ"] or {}).get("FED_TAT_TEST_WHO") == who
            if belongs and command in " ".join(process.info["cmdline"] or []):
                found.append(process)
        return found

    def stop(self) -> dict[str, int]:
        """SIGTERM to the hospitals, then to the coordinator; their exit codes."""
        for name in [*self.sites, "coordinator"]:
            if name in self.processes and self.processes[name].poll() is None:
                self.processes[name].send_signal(signal.SIGTERM)
        return {name: process.wait(40) for name, process in self.processes.items()}

    def _start(self, who: str, *command: str, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{who}.log", "ab") as log:
            process = subprocess.Popen(
                [*self._inside(who), *prefix, str(BINARIES / command[0]), *command[1:]],
                env={**environment(), "FED_TAT_TEST_WHO": who},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        self.processes[who] = process
        return process


def post(consortium: Consortium, path: str) -> int:
    """The status of a request for exactly this path; a client library would tidy it first."""
    host, _, port = consortium.address.rpartition(":")
    context = ssl.create_default_context(cafile=consortium.coordinator / "authority" / "ca.pem")
    with socket.create_connection((host, int(port)), 10) as plain, context.wrap_socket(plain, server_hostname=host) as wire:
        wire.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        return int(wire.recv(4096).split()[1])


def read_rounds(run: Path) -> list[dict[str, Any]]:
    """A run's record."""
    path = run / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def hashes(run: Path) -> list[str]:
    """The hash of a run's model after every round."""
    return [line["model_sha256"] for line in read_rounds(run)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
