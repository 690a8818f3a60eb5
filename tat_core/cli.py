"""The ``tat`` command: `tat config`, and every sub-command that an installed package offers.

Sub-commands are found by the entry-point group ``fed_tat.commands``, so that this module imports none of the packages that
offer them: a function becomes a command, a typer app becomes a group of commands. They are imported only when they are needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import click
import typer
import yaml
from rich.console import Console
from rich.traceback import Traceback
from typer.core import TyperGroup

from tat_core.code import code_hash
from tat_core.environment import QUIET_ENVIRONMENT

GROUP = "fed_tat.commands"


class _WithPlugins(TyperGroup):
    """The root command: its own sub-commands, then those of the entry points; a broken one is named and left out."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *sorted(entry.name for entry in _plugins() if entry.name not in self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = next((entry for entry in _plugins() if entry.name == cmd_name), None)
        return None if entry is None else _load(entry)


def _plugins() -> Sequence[EntryPoint]:
    return tuple(entry_points(group=GROUP))


def _load(entry: EntryPoint) -> click.Command | None:
    try:
        offered = entry.load()
    except Exception as error:  # whatever a plug-in raises on import, the other commands must go on working
        if _wants_traceback():
            raise
        # an entry point names the extra that it needs in brackets
        remedy = f"; pip install 'fed-tat[{','.join(entry.extras)}]'" if entry.extras else ""
        _say(f"warning: command {entry.name!r} is left out: {type(error).__name__} in {entry.module}: {error}{remedy}")
        return None
    return _as_command(entry.name, offered)


def _as_command(name: str, offered: Any) -> click.Command:
    if isinstance(offered, typer.Typer):
        group = typer.main.get_group(offered)
        group.name = name
        return group
    holder = typer.Typer(add_completion=False)
    holder.command(name)(offered)
    return typer.main.get_command(holder)


app = typer.Typer(
    cls=_WithPlugins,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated training of TAT: one restoration network for CT, MRI and PET, without any image leaving a hospital.",
)
config_app = typer.Typer(no_args_is_help=True, help="What a run is made of.")
app.add_typer(config_app, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fed-tat {version('fed-tat')}, code {code_hash()[:12]}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error (also: FED_TAT_DEBUG=1).")] = False,
) -> None:
    del show_version  # its callback has done the work
    if debug:
        os.environ["FED_TAT_DEBUG"] = "1"


@config_app.command("show")
def show_config(
    preset: Annotated[str, typer.Argument(help="demo, smoke or paper.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as train.lr=1e-3.")] = None,
) -> None:
    """Print the resolved configuration as YAML, with a comment on every key."""
    from tat_core.config import load_config

    typer.echo(explain(load_config(preset, overrides or [])))


def explain(config: Any) -> str:
    """A configuration as YAML in which the documentation of each key stands above it."""
    from tat_core.config import config_to_dict
    from tat_core.settings import known_keys

    documentation = {key: doc for key, (_, doc) in known_keys(type(config)).items()}
    lines: list[str] = []
    for key, value in config_to_dict(config).items():
        if isinstance(value, dict):
            lines += ["", f"{key}:"]
            for inner, inner_value in value.items():
                lines += [f"  # {documentation[f'{key}.{inner}']}", f"  {_yaml_line(inner, inner_value)}"]
        else:
            lines += [f"# {documentation[key]}", _yaml_line(key, value)]
    return "\n".join(lines)


def _yaml_line(key: str, value: Any) -> str:
    flow = isinstance(value, list)
    return yaml.safe_dump({key: value}, default_flow_style=None if flow else False, width=1000, sort_keys=False).strip()


def _wants_traceback() -> bool:
    return os.environ.get("FED_TAT_DEBUG", "") not in ("", "0")


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``tat``. A ValueError is the user's to mend: its text is shown, exit code 2; anything else is a bug of ours."""
    os.environ.update(QUIET_ENVIRONMENT)
    try:
        typer.main.get_command(app).main(args=None if arguments is None else list(arguments), prog_name="tat")
    except ValueError as error:
        if _wants_traceback():
            Console(stderr=True).print(Traceback.from_exception(type(error), error, error.__traceback__))
        _say(f"error: {error}")
        sys.exit(2)
