"""Which files lie in a folder: bounded, in a fixed order, safe against symbolic-link loops."""

from __future__ import annotations

import os
from pathlib import Path

MAX_FILES = 50_000


def files_below(folder: Path) -> list[Path]:
    """All visible regular files below a folder, sorted by path; links to folders are not followed.

    Raises
    ------
    ValueError
        If there are none, or more than `MAX_FILES` (a wrong folder was given).
    """
    found: list[Path] = []
    for directory, subdirectories, names in os.walk(folder):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        found += [Path(directory, name) for name in sorted(names) if not name.startswith(".") and Path(directory, name).is_file()]
        if len(found) > MAX_FILES:
            raise ValueError(f"files_below: expected at most {MAX_FILES} files, got more; give the folder of one series")
    if not found:
        raise ValueError("files_below: expected files, got an empty folder; give the folder that holds the images")
    return found
