"""The audit log: what it detects, what it repairs, and the one thing that it needs somebody else for."""

from __future__ import annotations

import json
import multiprocessing as mp
import random
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from client import audit
from client.site import Site


def _site(folder: Path) -> Site:
    return Site("north", {"CT": folder / "CT"}, folder / "state")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    for number in range(5):
        audit.append(_site(tmp_path), {"kind": "train_round", "round": number, "metrics": {"CT.loss_sum": 0.1 + number}})
    return audit.audit_file(_site(tmp_path))


def test_a_whole_log_verifies_and_gives_what_to_keep(log: Path) -> None:
    count, head = audit.verify(log)
    assert count == 5
    assert audit.verify(log, 3, list(audit.read(log))[2]["hash"]) == (5, head)


@pytest.mark.parametrize("number", range(5))
def test_an_edit_a_deletion_and_an_insertion_are_found_wherever_they_are(log: Path, number: int) -> None:
    whole = log.read_bytes().splitlines(keepends=True)
    changed = [*whole]
    changed[number] = changed[number].replace(b"0.1", b"0.2").replace(b".1", b".2")
    for lines in (changed, whole[:number] + whole[number + 1 :], [*whole[: number + 1], *whole[number:]]):
        log.write_bytes(b"".join(lines))
        with pytest.raises(ValueError, match="audit log, entry"):
            audit.verify(log)


def test_a_log_that_lost_its_end_sends_nothing_more(log: Path, tmp_path: Path) -> None:
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(whole[:3]))
    with pytest.raises(ValueError, match="end was cut off"):
        audit.verify(log)
    with pytest.raises(OSError, match="got fewer"):
        audit.append(_site(tmp_path), {"kind": "query"})


def test_log_and_head_replaced_together_are_found_by_what_was_kept_elsewhere(log: Path, tmp_path: Path) -> None:
    count, head = audit.verify(log)
    log.unlink()
    log.with_name("audit.head").unlink()
    for number in range(6):
        audit.append(_site(tmp_path), {"kind": "train_round", "round": number})
    audit.verify(log)
    with pytest.raises(ValueError, match="noted elsewhere"):
        audit.verify(log, count, head)


def test_a_torn_last_line_is_reported_and_repaired(log: Path, tmp_path: Path) -> None:
    log.write_bytes(log.read_bytes() + b'{"number": 6, "kin')
    assert audit.verify(log)[0] == 5
    assert audit.unfinished_bytes(log) == 18
    audit.append(_site(tmp_path), {"kind": "query"})
    assert audit.verify(log)[0] == 6
    assert json.loads(log.read_bytes().splitlines()[-1])["repaired_bytes"] == 18


def _append_for_ever(folder: Path, begun: Event) -> None:
    begun.set()
    while True:
        audit.append(_site(folder), {"kind": "train_round", "padding": "x" * 3000})


def test_kills_and_two_writers_leave_a_log_that_verifies(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    moment = random.Random(1)
    for _ in range(10):
        begun = [context.Event() for _ in range(2)]
        children = [context.Process(target=_append_for_ever, args=(tmp_path, event)) for event in begun]
        for child in children:
            child.start()
        assert all(event.wait(60) for event in begun)
        children[0].join(moment.uniform(0.05, 0.2))
        for child in children:
            child.kill()
            child.join()
        audit.verify(audit.audit_file(_site(tmp_path)))
    audit.append(_site(tmp_path), {"kind": "query"})
    assert audit.verify(audit.audit_file(_site(tmp_path)))[0] > 10
