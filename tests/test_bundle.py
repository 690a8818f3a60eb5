"""The bundle that a coordinator submits carries no code: hospitals run only what they installed themselves."""

from __future__ import annotations

import io
import shutil
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    app = tmp_path_factory.mktemp("app") / "fed-tat"
    skipped = shutil.ignore_patterns("__pycache__", "images")
    for name in ("tat_core", "client", "server", "simulations", "deploy", "tests"):
        shutil.copytree(ROOT / name, app / name, ignore=skipped)
    for name in ("pyproject.toml", "LICENSE", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, app / name)
    return zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app)))


def test_bundle_holds_the_project_file_and_nothing_importable(bundle: zipfile.ZipFile) -> None:
    files = {name for name in bundle.namelist() if not name.startswith(".info/")}
    assert files == {"pyproject.toml"}
    assert [name for name in bundle.namelist() if Path(name).suffix in {".py", ".pyc", ".pyi", ".so", ".pth", ".whl"}] == []


def test_bundle_names_apps_that_the_installed_packages_have(bundle: zipfile.ZipFile) -> None:
    app = tomllib.loads(bundle.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    for component in app["components"].values():
        module, _, attribute = component.partition(":")
        assert hasattr(import_module(module), attribute)
    assert set(app["config"]) == {"preset", "overrides"}
