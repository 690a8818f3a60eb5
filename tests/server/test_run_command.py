from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from server.harm import is_better_alone, write_comparison
from server.run_command import app
from tat_core.record import read_record


def line(number: int) -> dict[str, Any]:
    scores = {
        arm: {"psnr": psnr, "ssim": 0.9, "rmse": 1.0, "count": 2} for arm, psnr in (("input", 27.0), ("restored", 27.0 + number))
    }
    return {
        "round": number,
        "num_rounds": 4,
        "seconds": 30.0,
        "update_norm": 1.5,
        "mean_gain_db": float(number),
        "site_gain_db": {"ct-a": number - 0.25, "pet-b": number - 0.5},
        "best_round": number,
        "sites": {
            "ct-a": {"tasks": ["CT"], "status": "ok", "seconds": 3.0, "bytes": 2_000_000},
            "pet-b": {"tasks": ["PET"], "status": "NO_REPLY"} if number == 2 else {"tasks": ["PET"], "status": "ok", "bytes": 10},
        },
        "tasks": {
            "CT": {"loss": 0.01, "task_weight": 1.9, "aggregation_weight": 0.5, "validation": scores},
            "PET": {"loss": 0.02, "task_weight": 1.1, "aggregation_weight": 0.5},
        },
    }


def make_run(folder: Path, rounds: int, age_s: float = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("num_rounds: 4\n")
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line(number + 1)) + "\n" for number in range(rounds)))
    for file in folder.iterdir():
        os.utime(file, (time.time() - age_s,) * 2)
    return folder


def tat_run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "done", 4, age_s=7200)
    make_run(tmp_path / "runs" / "going", 2)
    make_run(tmp_path / "runs" / "dead", 2, age_s=7200)
    make_run(tmp_path / "runs" / "fresh", 0)
    (tmp_path / "runs" / "not-a-run").mkdir()
    return tmp_path / "runs"


def test_list_tells_finished_running_and_silent_runs_apart(runs: Path) -> None:
    result = tat_run("list", "--runs", runs)
    assert result.exit_code == 0
    states = {words[0]: words[1:4] for words in map(str.split, result.output.splitlines()[1:])}
    assert states == {
        "dead": ["silent", "2/4", "+2.00"],
        "done": ["finished", "4/4", "+4.00"],
        "fresh": ["running", "0/4", "–"],
        "going": ["running", "2/4", "+2.00"],
    }
    assert "2 h ago" in result.output


def test_status_of_a_run_that_goes_on(runs: Path) -> None:
    result = tat_run("status", "going", "--runs", runs)
    assert result.exit_code == 0
    assert "going: running, round 2 of 4, about 60 s left" in result.output
    rows = {words[0]: words[1:] for words in map(str.split, result.output.splitlines()[1:]) if words}
    assert rows["CT"] == ["0.01", "1.900", "0.500", "round", "2", "27.00", "29.00", "+2.00"]
    assert rows["PET"] == ["0.02", "1.100", "0.500", "–", "–", "–", "–"]
    assert rows["ct-a"] == ["CT", "ok", "2/2", "3.0", "2.0", "+1.75"]
    assert rows["pet-b"] == ["PET", "NO_REPLY", "1/2", "–", "0.0", "+1.50"]


def test_status_says_who_is_better_off_alone(runs: Path) -> None:
    gain_db = {"together": {"ct-a": 3.0, "pet-b": 1.0}, "alone": {"ct-a": 2.0, "pet-b": 1.5, "mri-c": 1.0}}
    write_comparison(runs / "done", gain_db)
    rows = [line.split() for line in tat_run("status", "done", "--runs", runs).output.splitlines()[-2:]]
    assert rows == [["ct-a", "+3.00", "+2.00"], ["pet-b", "+1.00", "+1.50"]]
    assert [is_better_alone({"together_gain_db": 1.0, "fine_tuned_gain_db": f, "alone_gain_db": 1.5}) for f in (1.6, 1.4)] == [
        False,
        True,
    ]


def test_status_of_a_dead_run_is_an_exit_code(runs: Path) -> None:
    result = tat_run("status", runs / "dead")
    assert result.exit_code == 1
    assert "silent" in result.output
    assert tat_run("status", runs / "done").exit_code == 0
    assert tat_run("status", runs / "fresh").exit_code == 0


def test_show_lists_rounds_and_prints_one_in_full(runs: Path) -> None:
    table = tat_run("show", runs / "going").output
    assert "NO_REPLY" in table
    assert "+1.50" in table
    assert "2*" in table
    assert json.loads(tat_run("show", runs / "going", "--round", 2).output) == line(2)
    assert [entry["round"] for entry in json.loads(tat_run("show", runs / "done", "--json").output)] == [1, 2, 3, 4]
    refused = tat_run("show", runs / "going", "--round", 9)
    assert isinstance(refused.exception, ValueError)
    assert "got 9" in str(refused.exception)


def test_a_torn_line_is_named(runs: Path) -> None:
    with open(runs / "going" / "rounds.jsonl", "a") as file:
        file.write('{"round": 3, "tas')
    result = tat_run("status", runs / "going")
    assert "1 line(s) could not be read" in result.output
    assert len(read_record(runs / "going").rounds) == 2


def test_unknown_run(runs: Path, tmp_path: Path) -> None:
    assert "expected a folder with" in str(tat_run("status", "nobody", "--runs", runs).exception)
    assert "expected runs in" in str(tat_run("list", "--runs", tmp_path / "nowhere").exception)


def test_readmit_asks_for_a_known_site(runs: Path) -> None:
    assert tat_run("readmit", "going", "pet-b", "--runs", runs).exit_code == 0
    assert (runs / "going" / "readmit" / "pet-b").exists()
    refused = tat_run("readmit", "going", "../other", "--runs", runs)
    assert isinstance(refused.exception, ValueError)
    assert "expected one of the run's sites (ct-a, pet-b)" in str(refused.exception)


def test_tensorboard_gets_every_curve(runs: Path, tmp_path: Path) -> None:
    done = tat_run("tensorboard", "done", "--runs", runs, "-o", tmp_path / "board")
    assert done.exit_code == 0, done.output
    events = EventAccumulator(str(tmp_path / "board" / "done")).Reload()
    assert {"loss/CT", "task_weight/PET", "validation psnr/CT restored", "round/mean_gain_db"} <= set(events.Tags()["scalars"])
    psnr = events.Scalars("validation psnr/CT restored")
    assert [(event.step, event.value) for event in psnr] == [(number, pytest.approx(27.0 + number)) for number in (1, 2, 3, 4)]
    again = tat_run("tensorboard", "done", "--runs", runs, "-o", tmp_path / "board")
    assert isinstance(again.exception, ValueError)
