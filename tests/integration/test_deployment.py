"""A coordinator and hospitals as processes of their own on loopback: `flower-superlink`, `flower-client`, `flwr run`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from server.strategy import run
from simulations.flower import app_folder
from simulations.inprocess import LocalSites
from simulations.processes import no_process_left
from simulations.report import write_report
from tat_core.config import load_config
from tat_core.environment import QUIET_ENVIRONMENT

BINARIES = Path(sys.executable).parent


@pytest.mark.slow  # every message starts a process that imports torch
@pytest.mark.timeout(600)
def test_three_hospitals_end_in_the_same_bits_as_the_simulation(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    hospitals = [smoke_hospitals[i] for i in (0, 2, 4)]
    overrides = ["federation.num_sites=3", f"output_dir={tmp_path / 'deployed'}"]
    with no_process_left():
        consortium = _deploy(hospitals, tmp_path)
        consortium.wait(consortium.submit(overrides))
        stopped_cleanly = consortium.stop()
    config = load_config("smoke", ["federation.num_sites=3"])
    run(config, LocalSites(hospitals, config), tmp_path / "alone")
    logs = "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert _hashes(tmp_path / "deployed" / "smoke") == _hashes(tmp_path / "alone"), logs
    assert stopped_cleanly == [0, 0, 0], logs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_process_killed_in_mid_round_costs_time_and_no_bits(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    hospitals = [smoke_hospitals[i] for i in (0, 2)]
    overrides = ["federation.num_sites=2", f"output_dir={tmp_path / 'deployed'}"]
    kill = _KillOnce("mri-pd", tmp_path / "mri-pd.log")
    with no_process_left():
        consortium = _deploy(hospitals, tmp_path)
        consortium.wait(consortium.submit(overrides), on_poll=kill)
        consortium.stop()
    logs = "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert kill.done, logs
    # The ClientApp asks the trainer that is started in its place, which repeats the round exactly.
    config = load_config("smoke", ["federation.num_sites=2"])
    run(config, LocalSites(hospitals, config), tmp_path / "alone")
    assert _hashes(tmp_path / "deployed" / "smoke") == _hashes(tmp_path / "alone"), logs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hospital_that_restarts_under_another_number_is_asked_again(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    """Without a key every start of a SuperNode is a new node for Flower, and nobody can answer the old one's messages."""
    hospitals = [smoke_hospitals[i] for i in (0, 2)]
    overrides = ["federation.num_sites=2", "num_rounds=1", f"output_dir={tmp_path / 'deployed'}"]
    kill = _KillOnce("mri-pd", tmp_path / "mri-pd.log", "client.node supernode")
    with no_process_left():
        consortium = _deploy(hospitals, tmp_path)
        consortium.wait(consortium.submit(overrides), on_poll=kill)
        consortium.stop()
    logs = "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert kill.done, logs
    assert "mri-pd was lost; it is asked again when it is back" in logs
    config = load_config("smoke", ["federation.num_sites=2", "num_rounds=1"])
    run(config, LocalSites(hospitals, config), tmp_path / "alone")
    assert _hashes(tmp_path / "deployed" / "smoke") == _hashes(tmp_path / "alone"), logs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_coordinator_killed_in_mid_round_goes_on_to_the_same_bits(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    hospitals = [smoke_hospitals[i] for i in (0, 2, 4)]
    overrides = ["federation.num_sites=3", f"output_dir={tmp_path / 'deployed'}", "resume=true"]
    folder = tmp_path / "deployed" / "smoke"
    spooled_at_death: list[str] = []

    def kill_in_round_two() -> None:
        spooled = [path.stem for path in (folder / "spool" / "000002").glob("*.safetensors")]
        if spooled and not spooled_at_death:
            spooled_at_death.extend(spooled)
            for process in psutil.Process(consortium.superlink.pid).children(recursive=True):
                if "flwr-serverapp" in " ".join(process.cmdline()):
                    process.kill()

    with no_process_left():
        consortium = _deploy(hospitals, tmp_path)
        submitted = consortium.submit(overrides)  # with resume=true also the first time: a supervisor need not know which it is
        consortium.wait(submitted, on_poll=lambda: kill_in_round_two() if not spooled_at_death else submitted.kill())
        done_at_death = len(_hashes(folder))
        write_report(folder)
        report = (folder / "report.html").read_text()
        consortium.wait(consortium.submit(overrides))
        consortium.stop()
    logs = "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert 0 < len(spooled_at_death) < 3, logs
    assert done_at_death == 1, logs
    assert "not finished: 1 of 2 rounds" in report
    config = load_config("smoke", ["federation.num_sites=3"])
    run(config, LocalSites(hospitals, config), tmp_path / "alone")
    assert _hashes(folder) == _hashes(tmp_path / "alone"), logs
    assert "resume: round 1 is on disk, going on with round 2" in logs


class _KillOnce:
    """Kill a process of one hospital, by default the one that trains, when its first training message is there."""

    def __init__(self, hospital: str, log: Path, program: str = "client.trainer") -> None:
        self.hospital, self.log, self.program, self.done = hospital, log, program, False

    def __call__(self) -> None:
        if self.done or "Receiving: train message" not in self.log.read_text():
            return
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or [])
            if self.program in command and self._serves(process):
                process.kill()
                self.done = True

    def _serves(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return any(self.hospital in " ".join(parent.cmdline()) for parent in process.parents())
        return False


@dataclass
class _Consortium:
    """A SuperLink, and hospitals as `flower-client` runs them."""

    superlink: subprocess.Popen[bytes]
    clients: list[subprocess.Popen[bytes]]
    start: Callable[..., subprocess.Popen[bytes]]

    def submit(self, overrides: list[str]) -> subprocess.Popen[bytes]:
        """Submit a run."""
        run_config = f'preset="smoke" overrides="{" ".join(overrides)}"'
        return self.start("run", "flwr", "run", str(app_folder()), "here", "--stream", "--run-config", run_config)

    def wait(self, submitted: subprocess.Popen[bytes], on_poll: Callable[[], None] = lambda: None) -> None:
        """Wait until the run that was submitted has ended, however it did."""
        deadline = time.monotonic() + 400
        while submitted.poll() is None and time.monotonic() < deadline:
            on_poll()
            time.sleep(0.02)

    def stop(self) -> list[int]:
        """Stop the hospitals as an operator would; their exit codes."""
        for client in self.clients:
            client.send_signal(signal.SIGTERM)
        return [client.wait(30) for client in self.clients]


def _deploy(hospitals: list[Path], tmp_path: Path) -> _Consortium:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = {**os.environ, **QUIET_ENVIRONMENT, "FLWR_HOME": str(home), "PATH": f"{BINARIES}:{os.environ['PATH']}"}

    def start(name: str, *command: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [str(BINARIES / command[0]), *command[1:]], env=environment, stdout=log, stderr=log, cwd=tmp_path
            )

    superlink = start("superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
    _wait_for_port(port)
    clients = [
        start(folder.name, "flower-client", "--site", str(folder / "site.yaml"), "--superlink", address, "--insecure")
        for folder in hospitals
    ]
    return _Consortium(superlink, clients, start)


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the SuperLink did not open its port")


def _hashes(folder: Path) -> list[str]:
    return [json.loads(line)["model_sha256"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
