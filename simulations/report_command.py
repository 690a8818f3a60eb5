"""`tat report`: the report of a run, again or for the first time, from its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(run_dir: Annotated[Path, typer.Argument(help="The run's folder, such as runs/demo.")]) -> None:
    """Write report.html from a run's record; the run may be finished, still going, or dead."""
    # Drawing libraries take a second to import: not for `tat --help`.
    from simulations.report import write_report

    typer.echo(f"Report: {write_report(run_dir)}")
