"""What several tests share: the small sample hospitals, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.hospitals import build_hospitals


@pytest.fixture(scope="session")
def smoke_hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six site folders of the ``smoke`` profile, sorted by name. Read only."""
    return build_hospitals(tmp_path_factory.mktemp("hospitals"), "smoke")
