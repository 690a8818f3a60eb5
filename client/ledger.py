"""The privacy ledger: which rounds each data set has paid for. SQLite, in `state_dir`, where it outlives a reinstallation.

A round is charged in full, durably, before a pixel is read: whatever kills the site afterwards, the ledger can only count too
much. The charge belongs to a *release*, everything that the round's reply is made from, so that the same instruction again is
the same charge, and any other one a new charge. A round counts against a data set if the two have a single case in common, by the
content of its images, or a single patient, by the pseudonym: neither a new run, a renamed file, one more patient nor the same
people's images of another task open a fresh budget.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.consent import SiteRefusalError
from client.site import Site
from tat_core.data.prepared import PreparedSplit
from tat_core.privacy import epsilon_spent

DAY_S = 86400.0
_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS rounds (
        release TEXT PRIMARY KEY, data_set TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, reserved_at REAL NOT NULL,
        history TEXT, epsilon REAL, delta REAL, settled INTEGER NOT NULL DEFAULT 0)""",
    "CREATE TABLE IF NOT EXISTS cases (content TEXT, data_set TEXT, PRIMARY KEY (content, data_set)) WITHOUT ROWID",
)
_COLUMNS = ("release", "data_set", "run", "round", "reserved_at", "history", "epsilon", "delta", "settled")

Charge = Sequence[tuple[float, float, int]]
"""What a round costs, for `tat_core.privacy.epsilon_spent`: (noise multiplier, sample rate, steps)."""


@dataclass(frozen=True)
class Account:
    """What a data set has paid so far.

    Attributes
    ----------
    epsilon : float
        Of its private rounds together.
    private, unprotected : int
        Rounds with and without differential privacy; ε says nothing of the latter.
    unsettled : int
        Rounds that were paid for and whose reply was never finished; they count in full.
    """

    epsilon: float
    private: int
    unprotected: int
    unsettled: int


def ledger_file(site: Site) -> Path:
    """Where the ledger lies."""
    return site.state_dir / "ledger.sqlite"


def marks_of(splits: Iterable[PreparedSplit]) -> list[str]:
    """What a training set is known by: a hash of each case's images and one of each patient's pseudonym."""
    marks = set()
    for split in splits:
        marks |= {case.sha256 for case in split.cases}
        marks |= {
            hashlib.sha256(f"patient {name}".encode("utf-8", "surrogateescape")).hexdigest() for name in split.slices_by_patient
        }
    return sorted(marks)


def reserve(site: Site, release: str, marks: Sequence[str], run: str, round_number: int, charge: Charge | None) -> bool:
    """Charge a round before it begins, unless this very release was charged before.

    Parameters
    ----------
    site
    release : str
        Hash of everything that the reply is made from.
    marks : sequence of str
        Of the training set, by `marks_of`.
    run, round_number
    charge : sequence of (float, float, int), or None
        None for a round without differential privacy.

    Returns
    -------
    bool
        Whether the release was settled already: its reply was finished and may have left.

    Raises
    ------
    SiteRefusalError
        The round would take the data set beyond the site's ε, or the site has trained its rounds for today.
    """
    data_set = hashlib.sha256(json.dumps(sorted(marks)).encode()).hexdigest()
    now = time.time()
    with _transaction(site) as database:
        known = database.execute("SELECT settled FROM rounds WHERE release = ?", (release,)).fetchone()
        if known is not None:
            return bool(known[0])
        today = database.execute("SELECT count(*) FROM rounds WHERE reserved_at > ?", (now - DAY_S,)).fetchone()[0]
        if site.max_rounds_per_day is not None and today >= site.max_rounds_per_day:
            raise SiteRefusalError("TOO_MANY_ROUNDS", f"{today} rounds within 24 hours, max_rounds_per_day is reached")
        history = epsilon = delta = None
        if charge is not None:
            # "rdp" never decreases when a round is added: whoever passes now is never found to be over the limit later.
            delta, limit = site.privacy.delta, site.privacy.epsilon
            epsilon = epsilon_spent([*_history(_related(database, marks)), *charge], delta, "rdp")
            if limit is not None and epsilon > limit:
                raise SiteRefusalError("BUDGET_SPENT", f"ε would be {epsilon:.3f}, site.yaml allows {limit:g}")
            history = json.dumps([list(stretch) for stretch in charge])
        database.executemany("INSERT OR IGNORE INTO cases VALUES (?, ?)", [(content, data_set) for content in marks])
        row = (release, data_set, run, round_number, now, history, epsilon, delta, 0)
        database.execute(f"INSERT INTO rounds VALUES ({', '.join('?' * len(row))})", row)
    return False


def settle(site: Site, release: str) -> None:
    """Note that the reply is finished. It costs what was reserved; this only tells finished rounds from killed ones."""
    with _transaction(site) as database:
        database.execute("UPDATE rounds SET settled = 1 WHERE release = ?", (release,))


def account(site: Site, marks: Sequence[str], kind: str = "prv") -> Account:
    """What a data set has paid, at the site's δ.

    Parameters
    ----------
    site
    marks : sequence of str
        Of its training set, by `marks_of`.
    kind : str
        As for `tat_core.privacy.epsilon_spent`.
    """
    with _transaction(site) as database:
        related = _related(database, marks)
    private = sum(entry["history"] is not None for entry in related)
    unsettled = sum(not entry["settled"] for entry in related)
    return Account(epsilon_spent(_history(related), site.privacy.delta, kind), private, len(related) - private, unsettled)


def rounds(site: Site) -> list[dict[str, Any]]:
    """Every round, oldest first, with what it cost; enough to recompute ε with any accountant."""
    with _transaction(site) as database:
        return _rows(database, "")


def spent_in(site: Site, run: str, round_number: int) -> dict[str, Any]:
    """ε at δ of the data set after a private round, for the audit log; empty for a round without differential privacy."""
    with _transaction(site) as database:
        entries = _rows(database, "WHERE run = ? AND round = ? AND epsilon IS NOT NULL", run, str(round_number))
    return {key: entries[-1][key] for key in ("epsilon", "delta", "history")} if entries else {}


def _related(database: sqlite3.Connection, marks: Sequence[str]) -> list[dict[str, Any]]:
    """The rounds of every data set that shares a case or a patient with these."""
    where = "WHERE data_set IN (SELECT data_set FROM cases WHERE content IN (SELECT value FROM json_each(?)))"
    return _rows(database, where, json.dumps(list(marks)))


def _rows(database: sqlite3.Connection, where: str, *arguments: str) -> list[dict[str, Any]]:
    rows = database.execute(f"SELECT {', '.join(_COLUMNS)} FROM rounds {where} ORDER BY reserved_at", arguments)
    entries = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
    return [entry | {"history": json.loads(entry["history"] or "null")} for entry in entries]


def _history(entries: Sequence[dict[str, Any]]) -> list[tuple[float, float, int]]:
    return [(sigma, rate, steps) for entry in entries for sigma, rate, steps in entry["history"] or ()]


@contextlib.contextmanager
def _transaction(site: Site) -> Iterator[sqlite3.Connection]:
    """One transaction that nobody shares: a second process waits, so that two rounds cannot both take the last of a budget."""
    site.state_dir.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(ledger_file(site), timeout=60, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = EXTRA")  # on disk when it returns, also after a power cut
            database.execute("BEGIN IMMEDIATE")
            try:
                for statement in _SCHEMA:
                    database.execute(statement)
                yield database
                database.execute("COMMIT")
            except BaseException:
                database.execute("ROLLBACK")
                raise
    except sqlite3.Error as error:
        raise OSError(f"ledger: expected a database that can be written, got {error}; see {ledger_file(site)}") from error
