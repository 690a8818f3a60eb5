"""`tat coordinator`: run a consortium's coordinator on this machine."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from server.coordinator import FILE, proxy_configuration, read_coordinator
from server.supervise import supervise

app = typer.Typer(no_args_is_help=True, help="Run a consortium's coordinator.")

Config = Annotated[Path, typer.Option("--config", help="The coordinator.yaml that `tat provision init` wrote.")]


@app.command()
def up(config: Config = Path(FILE)) -> None:
    """Start SuperLink, proxy and run, and keep them going until the run has finished or SIGTERM comes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    supervise(read_coordinator(config), stopping)


@app.command()
def proxy(config: Config = Path(FILE)) -> None:
    """Print the reverse proxy's configuration."""
    typer.echo(proxy_configuration(read_coordinator(config)), nl=False)
