"""What the user of `tat` sees: help, the configuration explained, and errors without a traceback."""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint, version

import pytest
import typer
import yaml

from tat_core import cli
from tat_core.code import code_hash
from tat_core.config import config_to_dict, load_config


def run_tat(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return int(stop.value.code or 0)


def greet(name: str = "you", fail: bool = False) -> None:
    """Say hello."""
    if fail:
        raise ValueError("greet: expected a friend, got a stranger; ask first")
    print(f"hello {name}")


friends_app = typer.Typer(help="Friends.")
friends_app.command("greet")(greet)


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FED_TAT_DEBUG", raising=False)
    entries = (
        EntryPoint("greet", f"{__name__}:greet", cli.GROUP),
        EntryPoint("friends", f"{__name__}:friends_app", cli.GROUP),
        EntryPoint("broken", "no_such_package.commands:app [simulation]", cli.GROUP),
    )
    monkeypatch.setattr(cli, "_plugins", lambda: entries)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tat("--version") == 0
    assert capsys.readouterr().out == f"fed-tat {version('fed-tat')}, code {code_hash()[:12]}\n"


def test_config_show_is_yaml_that_resolves_to_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tat("config", "show", "smoke", "train.lr=0.5", "tasks=[PET]") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == config_to_dict(load_config("smoke", "train.lr=0.5 tasks=[PET]"))
    assert "# Side of a square training patch, in pixels.\n  patch_size: 32\n" in printed


@pytest.mark.usefixtures("plugins")
def test_user_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tat("config", "show", "smoke", "train.lrr=1") == 2
    assert capsys.readouterr().err == "error: config: expected a known key, got 'train.lrr'; did you mean train.lr?\n"
    assert run_tat("greet", "--fail") == 2
    assert capsys.readouterr().err == "error: greet: expected a friend, got a stranger; ask first\n"


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize("way", ["option", "environment"])
def test_debug_shows_the_traceback(way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FED_TAT_DEBUG", "1" if way == "environment" else "0")
    assert run_tat(*(["--debug"] if way == "option" else []), "greet", "--fail") == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("error: greet: expected a friend, got a stranger; ask first\n")


@pytest.mark.usefixtures("plugins")
def test_function_becomes_a_command_and_app_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tat("greet", "--name", "Ada") == 0
    assert run_tat("friends", "greet") == 0
    assert capsys.readouterr().out == "hello Ada\nhello you\n"


@pytest.mark.usefixtures("plugins")
def test_broken_plugin_is_named_and_the_others_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tat("--help") == 0
    printed = capsys.readouterr()
    assert "greet" in printed.out
    assert "Say hello." in printed.out
    assert "Friends." in printed.out
    assert "command 'broken' is left out: ModuleNotFoundError in no_such_package.commands: No module named" in printed.err
    assert printed.err.endswith("; pip install 'fed-tat[simulation]'\n")
    assert run_tat("broken") == 2


def test_nothing_started_from_here_reports_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cli.QUIET_ENVIRONMENT:
        monkeypatch.setenv(name, "other")
    run_tat("--version")
    assert {name: os.environ[name] for name in cli.QUIET_ENVIRONMENT} == cli.QUIET_ENVIRONMENT
