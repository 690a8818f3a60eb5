"""The house keeps its shape: who may import whom, which file alone uses a library, what lies where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tat_core.cli import QUIET_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tat_core", "client", "server", "simulations", "deploy")
MAY_IMPORT = {
    "tat_core": {"tat_core"},
    "client": {"client", "tat_core"},
    "server": {"server", "tat_core"},
    "simulations": {"simulations", "client", "server", "tat_core", "deploy"},
    "deploy": {"deploy"},
}
TOP_LEVEL = {
    *("client", "deploy", "docs", "server", "simulations", "tat_core", "tests"),
    *(
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
    ),
}
# A library that only these files know, so that it can be replaced, and so that what it may do is read in one place.
SOLE_IMPORTERS = {
    "hydra": {"tat_core/compose.py"},
    "omegaconf": {"tat_core/compose.py"},
    "opacus": {"tat_core/privacy.py"},
    "nibabel": {"tat_core/data/volume.py"},
    # the DICOM half of volume.py, in files of its own
    "pydicom": {f"tat_core/data/dicom_{part}.py" for part in ("read", "write", "derive")},
}
MAX_LINES = 400


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level packages that a file imports anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            top = path.relative_to(ROOT).parts[0] if node.level else str(node.module).partition(".")[0]
            yield top, node.lineno


def all_imports() -> Iterator[tuple[Path, str, int]]:
    for path in sources():
        for name, line in imported(path):
            yield path.relative_to(ROOT), name, line


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def canonical(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_arrows_between_packages() -> None:
    ours = {*PACKAGES, "tests"}
    wrong = [f"{p}:{line} imports {n}" for p, n, line in all_imports() if n in ours and n not in MAY_IMPORT[p.parts[0]]]
    assert wrong == []


def test_core_knows_neither_flower_nor_ray() -> None:
    wrong = [
        f"{p}:{line} imports {n}" for p, n, line in all_imports() if p.parts[0] == "tat_core" and n in {"flwr", "ray", "grpc"}
    ]
    assert wrong == []


@pytest.mark.parametrize("library", sorted(SOLE_IMPORTERS))
def test_sole_importers(library: str) -> None:
    wrong = [f"{p}:{line}" for p, n, line in all_imports() if n == library and p.as_posix() not in SOLE_IMPORTERS[library]]
    assert wrong == [], f"{library} is for {', '.join(SOLE_IMPORTERS[library])} alone"


def test_every_import_is_a_declared_dependency() -> None:
    table = project()["project"]
    assert isinstance(table, dict)
    everywhere = {canonical(item) for item in table["dependencies"]}
    extra = {canonical(item) for item in table["optional-dependencies"]["simulation"]}
    distributions = packages_distributions()
    wrong = []
    for path, name, line in all_imports():
        if name in PACKAGES or name in sys.stdlib_module_names:
            continue
        allowed = everywhere | extra if path.parts[0] == "simulations" else everywhere
        if not allowed & {canonical(item) for item in distributions.get(name, [name])}:
            wrong.append(f"{path}:{line} imports {name}")
    assert wrong == [], "add the distribution to pyproject.toml and constraints.txt"


def test_everything_declared_is_pinned_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line)] == []
    assert lines == sorted(lines, key=str.lower)
    pinned = {canonical(line) for line in lines}
    table = project()["project"]
    assert isinstance(table, dict)
    declared = [*table["dependencies"], *(item for items in table["optional-dependencies"].values() for item in items)]
    assert [item for item in declared if canonical(item) not in pinned] == []


def test_every_package_is_in_the_distribution() -> None:
    tool = project()["tool"]
    assert isinstance(tool, dict)
    on_disk = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in sources()}
    assert on_disk == set(tool["setuptools"]["packages"])
    assert [path for path in on_disk if not (ROOT / path.replace(".", "/") / "__init__.py").is_file()] == []


def test_top_level_holds_nothing_else() -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    assert {line.partition("/")[0].strip('"') for line in listing.stdout.splitlines()} - TOP_LEVEL == set()


def test_launchers_switch_telemetry_and_installation_off() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"):
        assert re.search(rf"{name}\W+{QUIET_ENVIRONMENT[name]}\b", makefile), f"the Makefile does not set {name}"
    for launcher in ("tat_core/cli.py", "simulations/flower.py", "client/launcher.py", "server/service.py"):
        text = (ROOT / launcher).read_text()
        assert text.count("QUIET_ENVIRONMENT") >= 2, f"{launcher} imports it without using it"


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert long == {}, f"over {MAX_LINES} lines: split by purpose"
    assert [str(p.relative_to(ROOT)) for p in sources() if p.stem in {"utils", "util", "helpers", "misc", "common"}] == []


def test_the_check_sees_an_import_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    import flwr.app as app\n    from server.guard import check\n    return app, check\n")
    assert list(imported(file)) == [("flwr", 2), ("server", 3)]
