"""`tat simulate` as a user types it: a real SuperLink, Ray-simulated nodes, the real apps, and what Ctrl-C leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from server.journal import load_state
from server.strategy import run
from simulations import processes
from simulations.inprocess import LocalSites
from simulations.processes import MARK, no_process_left
from tat_core.config import load_config

TAT = str(Path(sys.executable).parent / "tat")


def test_flower_and_the_engine_alone_end_in_the_same_bits(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    sites = smoke_hospitals[0].parent
    settings = ["train.ema_decay=0.5", "federation.update_precision=bf16"]
    done = subprocess.run(
        [TAT, "simulate", "preset=smoke", *settings, "federation.fine_tune_steps=2", "--sites", str(sites)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    folder = tmp_path / "runs" / "smoke"
    log = folder / "flower.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-4000:] if log.exists() else "")
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["tasks"]) == {"CT", "MRI", "PET"}
    assert set(summary["hospitals"]) == {path.name for path in smoke_hospitals}
    assert all("fine_tuned" in entry["arms"] for entry in summary["hospitals"].values())
    assert (folder / "report.html").stat().st_size > 100_000
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    config = load_config("smoke", settings)
    run(config, LocalSites(smoke_hospitals, config), tmp_path / "alone")
    alone = [json.loads(line) for line in (tmp_path / "alone" / "rounds.jsonl").read_text().splitlines()]
    assert [r["model_sha256"] for r in records] == [r["model_sha256"] for r in alone]


SIMULATE_FOR_EVER = """
import sys
from pathlib import Path
from simulations.flower import simulate
from simulations.processes import no_process_left
with no_process_left():
    overrides = ["num_rounds=1000", "train.local_steps=1", f"output_dir={sys.argv[2]}"]
    simulate("smoke", overrides, Path(sys.argv[1]), 6, Path("flower.log"), lambda: None)
"""


@pytest.mark.parametrize("phase", ["alone", pytest.param("together", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_no_process_and_nothing_to_trust(smoke_hospitals: list[Path], tmp_path: Path, phase: str) -> None:
    sites = smoke_hospitals[0].parent
    whole = [TAT, "simulate", "preset=smoke", "num_rounds=1000", "--sites", str(sites)]
    flower = [sys.executable, "-c", SIMULATE_FOR_EVER, str(sites), str(tmp_path / "runs")]
    process = subprocess.Popen(
        whole if phase == "alone" else flower,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    folder = tmp_path / "runs" / "smoke"
    started = (lambda: _marks_below(process)) if phase == "alone" else (folder / "rounds.jsonl").exists
    deadline = time.monotonic() + 90
    while not started() and time.monotonic() < deadline:
        time.sleep(0.2)
    marks = _marks_below(process)
    assert marks
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert [p.name() for p in psutil.process_iter() if _mark(p) in marks] == []
    assert not (folder / "summary.json").exists()
    if phase == "together":
        state = load_state(folder)
        assert state is not None
        assert state.round >= 1


def test_even_a_process_that_detached_itself_is_ended() -> None:
    detached = "import os, time; os.fork() or (os.setsid(), os.fork() or time.sleep(60))"
    marks = []

    def start_and_be_told_to_end() -> None:
        with no_process_left():
            marks.append(os.environ[MARK])
            subprocess.run([sys.executable, "-c", detached], check=True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        start_and_be_told_to_end()
    assert [p for p in psutil.process_iter() if _mark(p) in marks] == []
    assert MARK not in os.environ


def test_an_interrupt_that_was_lost_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "AGAIN_SECONDS", 0.2)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}

    def swallow_the_first() -> None:
        with no_process_left():
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            threading.Event().wait(10)

    with pytest.raises(KeyboardInterrupt):
        swallow_the_first()
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.getitimer(signal.ITIMER_REAL)[1] == 0


def _marks_below(process: subprocess.Popen[bytes]) -> set[str]:
    return {mark for child in psutil.Process(process.pid).children(recursive=True) if (mark := _mark(child))}


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None
