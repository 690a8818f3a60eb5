"""`flower-client`: whom it joins, what Flower is told, and that it stops when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from client.coordinator import Coordinator
from client.enroll import read_or_make_key
from client.launcher import groups, only_one, supernode_arguments, whom_to_join
from client.site import Site, load_site

WAIT_S = 120.0


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site("north", {"CT": tmp_path / "CT"}, tmp_path / "state")


def test_what_flower_is_told(tmp_path: Path) -> None:
    secure = Coordinator("there:8443", tmp_path / "ca.pem", tmp_path / "node.key")
    assert supernode_arguments(tmp_path / "site.yaml", secure) == [
        *("--superlink", "there:8443", "--root-certificates", str(tmp_path / "ca.pem")),
        *("--auth-supernode-private-key", str(tmp_path / "node.key"), "--node-config", f'site="{tmp_path / "site.yaml"}"'),
    ]
    insecure = supernode_arguments(tmp_path / "site.yaml", Coordinator("there:8443", insecure=True))
    assert insecure[:3] == ["--superlink", "there:8443", "--insecure"]
    with pytest.raises(ValueError, match="expected a path without quotes"):
        supernode_arguments(tmp_path / 'a"b' / "site.yaml", secure)


def test_flower_knows_these_options(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = groups(tmp_path / "site.yaml", site, Coordinator("there:1", tmp_path / "ca.pem", tmp_path / "node.key"))[
        0
    ]._commands()
    given = commands["SuperNode"][4:]
    parsed = vars(_parse_args_run_supernode().parse_args(given))
    assert parsed["superlink"] == "there:1"
    assert parsed["isolation"] == "process"
    assert parsed["node_config"] == f'site="{tmp_path / "site.yaml"}"'
    # A first message may come before the trainer has begun: it then waits for the socket, in a folder that is there.
    assert (site.state_dir / "trainer").stat().st_mode & 0o777 == 0o700
    assert commands["ClientApps"][-1].endswith(f":{given[given.index('--port') + 1]}")


def test_site_yaml_says_whom_to_join_and_options_overrule_it(tmp_path: Path, site: Site) -> None:
    with pytest.raises(ValueError, match=r"expected coordinator.superlink in site.yaml, or --superlink"):
        whom_to_join(site, None, None, None, False)
    assert whom_to_join(site, "there:1", None, None, False) == Coordinator("there:1")
    ca, key = tmp_path / "ca.pem", tmp_path / "own.key"
    with pytest.raises(ValueError, match="which does not exist; ask the coordinator for it"):
        whom_to_join(site, "there:1", ca, None, False)
    ca.touch()
    key.touch()
    from_file = Site("north", site.data, site.state_dir, coordinator=Coordinator("there:1", ca, accept_other_code=True))
    assert whom_to_join(from_file, None, None, None, False) == Coordinator("there:1", ca, None, False, True)
    assert whom_to_join(from_file, "here:2", None, key, False) == Coordinator("here:2", ca, key, False, True)
    assert whom_to_join(from_file, None, None, None, True) == Coordinator("there:1", None, None, True, True)


def test_a_key_that_was_enrolled_is_found(site: Site) -> None:
    read_or_make_key(site.state_dir / "node.key")
    assert whom_to_join(site, "there:1", None, None, False).key == site.state_dir / "node.key"


def test_one_for_each_site(site: Site) -> None:
    with only_one(site), pytest.raises(ValueError, match="expected to be the only one for north"):
        only_one(site)
    only_one(site).close()


def _start(site_file: Path) -> tuple[subprocess.Popen[bytes], Callable[[], list[str]]]:
    """`flower-client`, whose coordinator nobody is; and what it has logged so far."""
    command = [sys.executable, "-m", "client.launcher", f"--site={site_file}", "--superlink=127.0.0.1:1", "--insecure"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = site_file.parent / "state" / "flower-client.log"
    return process, lambda: [json.loads(line)["message"] for line in log.read_text().splitlines()] if log.exists() else []


def _wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _left(site_file: Path) -> list[list[str]]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(site_file) in " ".join(command) and process.pid != os.getpid():
            found.append(command)
    return found


@pytest.fixture
def site_file(smoke_hospitals: list[Path], tmp_path: Path) -> Path:
    content = yaml.safe_load((smoke_hospitals[0] / "site.yaml").read_text())
    data = {task: str(path) for task, path in load_site(smoke_hospitals[0] / "site.yaml").data.items()}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(content | {"data": data, "state_dir": "state"}))
    return tmp_path / "site.yaml"


def test_it_looks_starts_everything_and_stops_cleanly_on_sigterm(site_file: Path) -> None:
    process, logged = _start(site_file)
    _wait_for(lambda: "Trainer started" in logged(), "it has started everything")
    lines = logged()
    assert any(line.startswith("doctor: FAILED  TLS: 127.0.0.1:1 does not answer") for line in lines)
    assert {"SuperNode started", "ClientApps started"} <= set(lines)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0
    assert logged()[-1] == "stopped"
    assert _left(site_file) == []


def test_it_stops_also_while_the_doctor_still_looks(site_file: Path) -> None:
    process, logged = _start(site_file)
    _wait_for(lambda: any("doctor" in command for command in _left(site_file)), "the doctor looks")
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0
    assert logged() == ["stopped"]
    assert _left(site_file) == []
