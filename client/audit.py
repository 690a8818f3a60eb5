"""The audit log: what left this hospital, when and of what size. One JSON object a line, each with the hash of the one before.

An entry is on disk before its message leaves. `verify` finds an edited entry, one that was taken out or put in, and, by the
`audit.head` file beside the log, one that was cut off at the end. It cannot find that somebody with write access replaced log and
head together: keep the number and hash that `tat audit verify` prints somewhere else, and give them to a later `verify`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from client.site import Site
from tat_core.files import replacing

START = "0" * 64
_TAIL_BYTES = 1 << 20  # no entry is near as long


def audit_file(site: Site) -> Path:
    """Where the log lies."""
    return site.state_dir / "audit.jsonl"


def append(site: Site, facts: Mapping[str, Any]) -> None:
    """Add one entry, durably. A last line that a killed process left unfinished is removed first, and the entry says so.

    Raises
    ------
    OSError
        The log cannot be written: nothing may leave.
    """
    path = audit_file(site)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        last, torn = _last_entry(file)
        known = _head(path)
        if known[0] > (last["number"] if last else 0):
            raise OSError("audit log: expected the entries that were written, got fewer; tat audit verify, then move both away")
        if torn:
            file.truncate(file.seek(0, os.SEEK_END) - torn)
        entry = {"number": last["number"] + 1 if last else 1, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts}
        if torn:
            entry["repaired_bytes"] = torn
        entry["previous"] = last["hash"] if last else START
        entry["hash"] = _hash_of(entry)
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        with replacing(_head_file(path)) as temporary:
            temporary.write_text(f"{entry['number']} {entry['hash']}\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The entries in order; stops at an unfinished last line. Does not verify."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def verify(path: Path, number: int = 0, digest: str = START) -> tuple[int, str]:
    """Check that the log is whole and unchanged.

    Parameters
    ----------
    path : Path
    number, digest : int, str
        Of an entry that is known from elsewhere, such as an earlier `verify`: the log must still hold it.

    Returns
    -------
    number : int
        Of the last entry; 0 for no log at all.
    digest : str
        Its hash.

    Raises
    ------
    ValueError
        The first entry that is not as it was written, or that is missing.
    """
    hashes = [START]
    if path.exists():
        for line_number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            entry = _parsed(line)
            if not entry or entry.get("number") != line_number or entry.get("previous") != hashes[-1]:
                raise _broken(line_number, "the entry that follows the one before", "another, or none")
            if entry.get("hash") != _hash_of(entry):
                raise _broken(line_number, "the entry as it was written", "a changed one")
            hashes.append(entry["hash"])
    for at, expected in ((number, digest), _head(path)):
        if at >= len(hashes):
            raise _broken(len(hashes), f"{at} entries", f"{len(hashes) - 1}: the end was cut off")
        if hashes[at] != expected:
            raise _broken(at, "the entry that was noted elsewhere", "another")
    return len(hashes) - 1, hashes[-1]


def _head_file(path: Path) -> Path:
    return path.with_name("audit.head")


def _head(path: Path) -> tuple[int, str]:
    """Number and hash of the last entry, as noted beside the log."""
    if not _head_file(path).exists():
        return 0, START
    number, _, digest = _head_file(path).read_text().strip().partition(" ")
    return int(number), digest


def unfinished_bytes(path: Path) -> int:
    """Length of a last line that a killed process left unfinished; its message did not leave."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return _last_entry(file)[1]


def _last_entry(file: BinaryIO) -> tuple[dict[str, Any] | None, int]:
    """The last whole entry, and how many bytes of an unfinished one follow it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    *lines, rest = file.read().split(b"\n")
    if not lines:
        return None, len(rest)
    last = _parsed(lines[-1])
    if last is None:
        raise OSError("audit log: expected a last entry that can be read, got another; run tat audit verify, then move it away")
    return last, len(rest)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _hash_of(entry: Mapping[str, Any]) -> str:
    """sha256 of everything in the entry but its own hash; ``previous`` is in it, which makes the chain."""
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _broken(number: int, expected: str, got: str) -> ValueError:
    return ValueError(f"audit log, entry {number}: expected {expected}, got {got}; somebody or something changed the log")
