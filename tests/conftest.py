"""What several tests share: the small sample hospitals, made once a session."""

from __future__ import annotations

import os

# Before torch is imported: two threads that wait for each other on a busy machine make the suite ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing
from pathlib import Path

import pytest

from simulations.hospitals import build_hospitals

# All tests share one fork server, which the first of them starts; what it has not imported, each of its processes imports anew.
multiprocessing.set_forkserver_preload(["client.work", "opacus.accountants", "pytest", "server.strategy"])


@pytest.fixture(scope="session")
def smoke_hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six site folders of the ``smoke`` profile, sorted by name. Read only."""
    return build_hospitals(tmp_path_factory.mktemp("hospitals"), "smoke")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share a worker, and so do all that start a SuperLink: two of these at once are too much for two cores."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder == "integration" else str(item.path)))
