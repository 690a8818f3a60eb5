"""Every command that README and runbook tell people to type exists, with the options that they give it."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import typer

from client import launcher
from tat_core import cli

ROOT = Path(__file__).parents[1]
WORD = r"[a-z][a-z-]*"


def typed(text: str) -> set[str]:
    """`tat …` and `flower-client …` in code, from the program's name to the end of the line or of the code."""
    code = re.findall(r"`([^`\n]+)`", text) + [
        line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in joined(block)
    ]
    return {
        " ".join(found[0].split()) for part in code if (found := re.search(rf"(?<![\w./-])(tat|flower-client) {WORD}.*", part))
    }


def joined(block: str) -> list[str]:
    """The lines of a shell script without comments, continuation lines joined."""
    return [line.partition(" # ")[0] for line in block.replace("\\\n", " ").splitlines()]


def unknown(command: str) -> list[str]:
    """The words of a command that its parser does not know."""
    words = re.split(r"&&|;|\|", command)[0].split()
    current: click.Command = typer.main.get_command(cli.app if words.pop(0) == "tat" else launcher.app)
    context = click.Context(current)
    while words and isinstance(current, click.Group) and re.fullmatch(WORD, words[0]):
        name = words.pop(0)
        found = current.get_command(context, name)
        if found is None:
            return [name]
        current, context = found, click.Context(found, parent=context)
    options = {option for parameter in current.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in options | {"--help"}]


@pytest.mark.parametrize("name", ["README.md", "deploy/RUNBOOK.md", "docs/dataset.md"])
def test_commands_in_the_documents_exist(name: str) -> None:
    commands = typed((ROOT / name).read_text())
    assert commands
    assert {command: wrong for command in commands if (wrong := unknown(command))} == {}


def test_it_would_notice() -> None:
    text = "`tat site enrol x` and\n```sh\nsudo tat run \\\n  status --wrong\n```"
    assert typed(text) == {"tat site enrol x", "tat run status --wrong"}
    assert unknown("tat site enrol x") == ["enrol"]
    assert unknown("tat run status NAME --wrong") == ["--wrong"]
    assert unknown("flower-client doctor --json") == []
