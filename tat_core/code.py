"""Which code is installed: coordinator and sites must run the same, and none of it travels."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("client", "server", "tat_core")
CODE_HEADER = "Fed-Tat-Code"
"""The HTTP header in which a coordinator's proxy says which code it runs."""


@cache
def code_hash() -> str:
    """sha256 over the installed sources and presets of what takes part in a run.

    What does not change a run does not change the hash: line endings, the place and kind of installation, compiled files, and
    the packages for simulation, deployment and tests. It is taken once a process, so it names the code that was loaded even if
    another is installed later.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None, package  # all are in one distribution
        assert spec.origin is not None, package
        digest.update(folder_hash(Path(spec.origin).parent).encode())
    return digest.hexdigest()


def folder_hash(root: Path) -> str:
    """sha256 over the relative paths and contents of a folder's ``.py`` and ``.yaml`` files."""
    digest = hashlib.sha256()
    files = {path.relative_to(root).as_posix(): path for suffix in ("py", "yaml") for path in root.rglob(f"*.{suffix}")}
    for name, path in sorted(files.items()):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{name}|{len(content)}|".encode())
        digest.update(content)
    return digest.hexdigest()
