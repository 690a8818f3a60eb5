"""`tat site`: what a hospital's administrator does on its own machine."""

from __future__ import annotations

import typer

from client.enroll import enroll

app = typer.Typer(no_args_is_help=True, help="A hospital's own side: its key, and what it takes part in.")


@app.callback()
def _group() -> None:
    """Keep `enroll` a sub-command even while it is the only one."""


app.command()(enroll)
