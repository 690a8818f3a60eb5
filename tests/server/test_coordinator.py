"""coordinator.yaml, the bundle, the service that keeps a process going, and the files of deploy/."""

from __future__ import annotations

import errno
import inspect
import io
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from operator import attrgetter
from pathlib import Path

import psutil
import pytest
import yaml
from flwr.cli.build import build_fab_from_files
from flwr.supernode.fleet_http_client import FleetHttpClient
from rule_sites import RuleSites

import server
from server import journal, strategy
from server.consortium import found, utc_now
from server.coordinator import (
    EXAMPLE,
    FILE,
    CoordinatorConfig,
    proxy_command,
    proxy_configuration,
    proxy_executable,
    read_coordinator,
)
from server.service import MARK, Service
from server.superlink import PROJECT
from server.supervise import _Run, supervise
from tat_core.checkpoint import read_model
from tat_core.code import CODE_HEADER, code_hash
from tat_core.files import hold

ROOT = Path(__file__).parents[2]


def test_the_example_says_what_the_defaults_are(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(EXAMPLE)
    example = read_coordinator(tmp_path / FILE)
    (tmp_path / FILE).write_text("{}")
    assert read_coordinator(tmp_path / FILE) == example


def test_a_run_resumes_by_itself_under_the_coordinators_folder(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("preset: smoke\noverrides: [name=first, output_dir=/elsewhere]\n")
    run = read_coordinator(tmp_path / FILE).run
    assert run is not None
    assert (run.name, run.output_dir, run.resume) == ("first", str(tmp_path / "runs"), True)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "listen: 8443", "listen: nowhere", "superlink_port: x", "superlink_port: true", "superlink_port: 0", "ports: 1",
     "overrides: name=a", "overrides: [1]", "a: [", "preset: none-such", "preset: smoke\noverrides: [num_rounds=0]"],
)  # fmt: skip
def test_wrong_files_are_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"(?s)(coordinator|config): expected .+, got .+; "):
        read_coordinator(tmp_path / FILE)


def test_the_coordinators_bundle_is_the_projects_and_holds_no_code() -> None:
    ours, projects = (tomllib.loads(text)["tool"]["flwr"]["app"] for text in (PROJECT, (ROOT / "pyproject.toml").read_text()))
    del projects["fab-exclude"]  # there is nothing to leave out
    assert ours == projects
    content, _ = build_fab_from_files({"pyproject.toml": PROJECT.format(version="0.1.0").encode()})
    names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    assert [name for name in names if not name.startswith(".info/")] == ["pyproject.toml"]


def test_one_for_each_folder(tmp_path: Path) -> None:
    with hold(tmp_path / "coordinator.lock") as lock:
        assert lock is not None
        with pytest.raises(ValueError, match="expected to be the only one for"):
            supervise(CoordinatorConfig(tmp_path), threading.Event())


class _SuperLink:
    """What the supervisor asks of a SuperLink, which says of every run that it has ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.submitted = 0
        monkeypatch.setattr("server.supervise.start_run", self._start)
        monkeypatch.setattr("server.supervise.run_status", lambda _client, _id: ("finished", "said the SuperLink"))

    def _start(self, *_arguments: object) -> int:
        self.submitted += 1
        return self.submitted


def _coordinator(folder: Path, num_rounds: int = 2) -> CoordinatorConfig:
    overrides = ["name=run", f"num_rounds={num_rounds}", "federation.baseline=false", "federation.fine_tune_steps=0"]
    (folder / FILE).write_text(yaml.safe_dump({"preset": "smoke", "overrides": overrides}))
    return read_coordinator(folder / FILE)


def _train(config: CoordinatorConfig) -> None:
    run = config.run
    assert run is not None
    strategy.run(run, RuleSites(), Path(run.output_dir) / run.name)


def _fill_up(patch: pytest.MonkeyPatch, unwritten: str, round_number: int) -> None:
    """Leave no room for what a function of the server writes after a round."""
    write = attrgetter(unwritten)(server)

    def may_write(*arguments: object) -> None:
        if any(getattr(argument, "round", 0) == round_number for argument in arguments):
            raise OSError(errno.ENOSPC, "no space left on device")
        write(*arguments)

    patch.setattr(f"server.{unwritten}", may_write)


@pytest.mark.parametrize("unwritten", ["journal.save_state", "strategy.release", "journal.finish"])
def test_a_run_without_the_last_rounds_model_has_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unwritten: str
) -> None:
    """The disk fills up once the last round is on record; there is room when the run is submitted again."""
    config = _coordinator(tmp_path)
    run, superlink = _Run(config), _SuperLink(monkeypatch)
    with monkeypatch.context() as patch:
        _fill_up(patch, unwritten, 2)
        with pytest.raises(OSError, match="no space"):
            _train(config)
    assert not run.tend(None)
    assert superlink.submitted == 1
    _train(config)
    assert not run.tend(None)  # it sees that the run has ended
    assert run.tend(None)
    assert superlink.submitted == 1
    assert read_model(tmp_path / "runs" / "run" / "model.safetensors").metadata["extra"]["round"] == 2


def test_a_finished_run_is_not_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, superlink = _coordinator(tmp_path), _SuperLink(monkeypatch)
    _train(config)
    assert _Run(config).tend(None)
    assert superlink.submitted == 0
    assert not _Run(_coordinator(tmp_path, num_rounds=3)).tend(None)
    assert superlink.submitted == 1


def test_a_run_that_finished_before_there_was_a_marker_is_submitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, superlink = _coordinator(tmp_path), _SuperLink(monkeypatch)
    _train(config)
    (tmp_path / "runs" / "run" / journal.FINISHED).unlink()
    run = _Run(config)
    assert not run.tend(None)
    _train(config)
    assert not run.tend(None)
    assert run.tend(None)
    assert superlink.submitted == 1


def test_a_run_that_goes_on_has_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last state is damaged, so that it takes the last round again, and ends in it."""
    config = _coordinator(tmp_path)
    _train(config)
    (tmp_path / "runs" / "run" / "journal" / "000002.json").write_text("{")
    with monkeypatch.context() as patch:
        _fill_up(patch, "journal.save_state", 2)
        with pytest.raises(OSError, match="no space"):
            _train(config)
    assert journal.finished_rounds(tmp_path / "runs" / "run") == 0


DETACHES_AND_DIES = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
time.sleep(0.5)
"""


def test_what_a_dead_service_left_behind_ends_before_it_starts_again(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    service = Service("x", [sys.executable, "-c", DETACHES_AND_DIES], tmp_path)
    deadline = time.monotonic() + 30
    marks: list[str] = []
    while service.starts < 2 and time.monotonic() < deadline:
        service.keep()
        marks += [mark for process in psutil.Process().children() if (mark := _mark(process))]
        time.sleep(0.1)
    assert service.starts == 2
    assert not [process for process in psutil.process_iter() if _mark(process) == marks[0]]
    service.stop()
    assert not [process for process in psutil.process_iter() if _mark(process) in marks]


def test_the_proxys_configuration_is_valid_and_passes_what_a_node_calls(tmp_path: Path) -> None:
    if proxy_executable() is None:
        pytest.skip("nginx is not installed")
    found(tmp_path, ["localhost"], utc_now())
    config = CoordinatorConfig(tmp_path, listen="127.0.0.1:8443")
    text = proxy_configuration(config)
    (tmp_path / "proxy" / "temporary").mkdir(parents=True)
    (tmp_path / "proxy" / "nginx.conf").write_text(text)
    checked = subprocess.run([*proxy_command(config), "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    called = set(re.findall(r'"/v1/fleet/([a-z-]+)"', inspect.getsource(FleetHttpClient)))
    (passed,) = re.findall(r"\^/v1/fleet/\((.+)\)\$ \{", text)
    # Nodes that register themselves are not wanted: the coordinator approves them.
    assert set(passed.split("|")) == called - {"register-node", "unregister-node"}
    assert f"add_header {CODE_HEADER} {code_hash()} always;" in text


def test_units_are_valid() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in sorted((ROOT / "deploy" / "systemd").glob("*.service")):
        printed = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False).stderr
        assert [line for line in printed.splitlines() if "is not executable: No such file" not in line] == []


def test_compose_names_dockerfiles_that_copy_only_what_is_there() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    for service in services.values():
        recipe = (ROOT / service["build"]["dockerfile"]).read_text()
        assert re.findall(r"^(?:FROM|RUN|ENTRYPOINT|USER)\b", recipe, re.M)
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        (entry,) = re.findall(r'^ENTRYPOINT \["([^"]+)"', recipe, re.M)
        assert entry in scripts


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None
