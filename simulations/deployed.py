"""A coordinator and hospitals as processes of their own on loopback, without TLS: for tests, benchmarks and trials."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from simulations.flower import app_folder
from tat_core.environment import MESSAGE_ENVIRONMENT, QUIET_ENVIRONMENT

BINARIES = Path(sys.executable).parent
PORT_SECONDS = 60.0


@dataclass
class Deployment:
    """What `deploy` started, and what it saw.

    Attributes
    ----------
    stopped : list of int
        Exit codes of the hospitals' processes.
    peak_bytes : dict of str to int
        Largest resident memory of the SuperLink and of the ServerApp.
    """

    stopped: list[int] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=lambda: {"superlink": 0, "serverapp": 0})


def flower_client(site: Path, address: str) -> list[str]:
    """The command of a hospital."""
    return [str(BINARIES / "flower-client"), "--site", str(site), "--superlink", address, "--insecure"]


def stock_node(site: Path, address: str) -> list[str]:
    """Flower's own SuperNode, as one would start it without `flower-client`: it starts a new Python for each message."""
    node = [str(BINARIES / "flower-supernode"), "--insecure", "--superlink", address, "--port", str(free_port())]
    return [*node, "--node-config", f'site="{site}"']


def deploy(
    hospitals: Sequence[Path],
    preset: str,
    overrides: Sequence[str],
    folder: Path,
    *,
    node: Callable[[Path, str], list[str]] = flower_client,
    on_poll: Callable[[], None] = lambda: None,
    timeout_s: float = 500.0,
) -> Deployment:
    """Start a SuperLink and the hospitals, submit a run, wait for its end, and stop the hospitals.

    Whether the run went well is in what it wrote, not in an exit code.

    Parameters
    ----------
    hospitals : sequence of Path
        Site folders.
    preset, overrides
        The run's configuration.
    folder : Path
        Work folder; every process logs to ``<name>.log`` there.
    node : callable
        The command of a hospital, given its site file and the coordinator's address.
    on_poll : callable
        Called a few times a second.
    timeout_s : float
    """
    port = free_port()
    address = f"127.0.0.1:{port}"
    home = folder / "flwr"
    (home / "run").mkdir(parents=True)
    connection = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    (home / "run" / "config.toml").write_text(connection)
    environment = {**os.environ, **QUIET_ENVIRONMENT, "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}"}

    def start(name: str, command: Sequence[str], more: Mapping[str, str] = {}) -> subprocess.Popen[bytes]:
        with open(folder / f"{name}.log", "wb") as log:
            own = environment | {"FLWR_HOME": str(home / name), **more}
            return subprocess.Popen(command, env=own, stdout=log, stderr=log, cwd=folder)

    seen = Deployment()
    listen = ["--insecure", "--host", "127.0.0.1", "--port", str(port)]
    superlink = start("superlink", [str(BINARIES / "flower-superlink"), *listen], MESSAGE_ENVIRONMENT)
    wait_for_port(port)
    clients = [start(place.name, node(place / "site.yaml", address)) for place in hospitals]
    run_config = f'preset="{preset}" overrides="{" ".join(overrides)}"'
    run = start("run", [str(BINARIES / "flwr"), "run", str(app_folder()), "here", "--stream", "--run-config", run_config])
    deadline = time.monotonic() + timeout_s
    while run.poll() is None and time.monotonic() < deadline:
        on_poll()
        _watch(superlink.pid, seen.peak_bytes)
        time.sleep(0.2)
    for client in clients:
        client.send_signal(signal.SIGTERM)
    seen.stopped = [client.wait(60) for client in clients]
    superlink.terminate()
    superlink.wait(30)
    return seen


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for_port(port: int) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + PORT_SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise ValueError(f"deploy: expected a listener on port {port}, got none after {PORT_SECONDS:.0f} s; see superlink.log")


def _watch(superlink: int, peak_bytes: dict[str, int]) -> None:
    """Note the memory of the SuperLink and of the ServerApp that it started."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(superlink)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                is_app = any("flwr-serverapp" in part for part in process.cmdline())
                name = "serverapp" if is_app else "superlink"
                if is_app or process.pid == superlink:
                    peak_bytes[name] = max(peak_bytes[name], process.memory_info().rss)
