"""Files that are whole or not there, and a lock that one process has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tat_core.files import hold, replacing, write_file


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f".x.{os.getpid()}.tmp").write_bytes(b"half")
    write_file(tmp_path / "x", b"whole", mode=0o600)
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_what_fails_leaves_the_file_before(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"before")

    def fail() -> None:
        with replacing(tmp_path / "x") as temporary:
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (tmp_path / "x").read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    first = hold(tmp_path / "new" / "lock")
    assert first is not None
    assert hold(tmp_path / "new" / "lock") is None
    first.close()
    second = hold(tmp_path / "new" / "lock")
    assert second is not None
    second.close()
