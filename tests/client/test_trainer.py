"""The warm trainer: the same bits as without it, a socket of its user's alone, and what becomes of a message when it dies."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

from client import wire
from client.answer import answer
from client.coordinator import Coordinator
from client.launcher import groups
from client.site import load_site
from client.supervise import Group
from client.trainer import ABANDONED
from client.wire import CHUNK_BYTES, SOCKET, Parcel, TrainerError, ask, reachable, receive, send
from tat_core.blobs import by_owner, pack
from tat_core.checkpoint import arrays_of, model_hash
from tat_core.code import code_hash
from tat_core.config import load_config
from tat_core.model.tat import build_model
from tat_core.sharing import for_tasks, give_own

STEPS = 100


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_parcel_arrives_as_it_was_sent(size: int) -> None:
    parcel = Parcel({"kind": "train", "config": {"round": 1}}, {"": os.urandom(size), "CT": b"", "PET": os.urandom(3)})
    assert receive(send(parcel)) == parcel


def test_bytes_that_nobody_announced_are_refused() -> None:
    with pytest.raises(AssertionError, match="more bytes than announced"):
        receive([*send(Parcel({}, {"CT": b"abc"})), b"d"])


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ValueError, match=r"expected .* to be this user's alone"), reachable(tmp_path):
        pass


def test_a_trainer_that_does_not_come_is_reported_by_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "START_SECONDS", 0.2)
    tmp_path.chmod(0o700)
    with pytest.raises(TrainerError, match="TRAINER_ABSENT"):
        ask(tmp_path, Parcel({}), 1.0)


class _Hospital:
    """A site with a state of its own, and its trainer as `flower-client` runs it."""

    def __init__(self, sample: Path, folder: Path) -> None:
        # A path longer than the 107 bytes that a Unix socket's may have.
        self.file = folder / ("a-long-name-" * 9) / "site.yaml"
        self.file.parent.mkdir(parents=True)
        data = {task: str(path) for task, path in load_site(sample / "site.yaml").data.items()}
        content = yaml.safe_load((sample / "site.yaml").read_text()) | {"data": data, "state_dir": "state"}
        self.file.write_text(yaml.safe_dump(content))
        self.state = self.file.parent / "state"
        self.group: Group = groups(self.file, load_site(self.file), Coordinator("127.0.0.1:1", insecure=True))[1]

    def request(self, kind: str, steps: int = 3, code: str = code_hash()) -> Parcel:
        """What the coordinator would ask in round 1."""
        overrides = f"train.local_steps={steps}"
        config = load_config("smoke", overrides)
        model = for_tasks(give_own(arrays_of(build_model(config.model, 1)), config.tasks, ("adapter",)), ("MRI",))
        words = {"run": "0" * 32, "round": 1, "base": model_hash(model), "nonce": "0" * 32, "steps": steps, "code": code_hash()}
        blobs = {} if kind == "query" else {owner: pack(some) for owner, some in by_owner(model).items()}
        return Parcel({"kind": kind, "code": code, "config": words, "preset": "smoke", "overrides": overrides}, blobs)

    def ask(self, kind: str, steps: int = 3, code: str = code_hash(), timeout_s: float = 120.0) -> Parcel:
        """Have the trainer answer."""
        return ask(self.state / "trainer", self.request(kind, steps, code), timeout_s)

    def answer_without(self, kind: str, steps: int = 3) -> Parcel:
        """Answer in this process, from a state of its own."""
        shutil.rmtree(self.state.parent / "other", ignore_errors=True)
        other = self.file.with_name("other.yaml")
        other.write_text(self.file.read_text().replace("state_dir: state", "state_dir: other"))
        return answer(other, self.request(kind, steps))

    def trainer(self) -> psutil.Process:
        """The process."""
        while True:
            for process in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if "client.trainer" in process.cmdline() and str(self.file) in process.cmdline():
                        return process
            time.sleep(0.02)


@pytest.fixture(scope="module")
def hospital(smoke_hospitals: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Hospital]:
    made = _Hospital(smoke_hospitals[2], tmp_path_factory.mktemp("warm"))
    stopping = threading.Event()

    def keep() -> None:
        while not stopping.wait(0.1):
            made.group.look()

    keeper = threading.Thread(target=keep)
    keeper.start()
    yield made
    stopping.set()
    keeper.join()
    made.group.stop()


def test_the_same_bits_with_and_without_it_and_it_outlives_a_message(hospital: _Hospital) -> None:
    described = hospital.ask("query")
    first = hospital.trainer()
    trained = hospital.ask("train")
    assert hospital.trainer() == first
    assert described == hospital.answer_without("query")
    assert trained == hospital.answer_without("train")
    assert trained.blobs


def test_nobody_else_may_open_its_socket(hospital: _Hospital) -> None:
    hospital.ask("query")
    folder = hospital.state / "trainer"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / SOCKET).stat().st_mode & 0o777 == 0o600


def test_a_message_of_another_installed_version_is_refused(hospital: _Hospital) -> None:
    with pytest.raises(TrainerError, match="TRAINER_VERSION"):
        hospital.ask("query", code="0" * 64)


def test_one_that_is_killed_at_work_is_replaced_and_the_round_repeated_exactly(hospital: _Hospital) -> None:
    (hospital.state / "site.log").unlink(missing_ok=True)
    shutil.rmtree(hospital.state / "runs", ignore_errors=True)
    (hospital.state / "ledger.sqlite").unlink(missing_ok=True)
    victim = hospital.trainer()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(hospital.ask, "train", STEPS)
        while not (hospital.state / "ledger.sqlite").exists():
            time.sleep(0.01)
        assert "train: answered" not in (hospital.state / "site.log").read_text()
        victim.kill()
        repeated = reply.result()
    assert hospital.trainer() != victim
    assert repeated == hospital.answer_without("train", STEPS)


def test_it_gives_work_up_that_nobody_waits_for(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    lonely = _Hospital(smoke_hospitals[2], tmp_path)
    command = [sys.executable, "-m", "client.trainer", str(lonely.file), str(lonely.state / "trainer")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            with pytest.raises(TrainerError, match="TOO_LATE"):
                lonely.ask("train", steps=100_000, timeout_s=3.0)
            assert process.wait(30) == ABANDONED
        finally:
            process.send_signal(signal.SIGKILL)
