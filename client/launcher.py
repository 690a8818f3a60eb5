"""`flower-client`: a hospital's one command, which keeps Flower's SuperNode running for its site."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from client.site import Site, load_site
from tat_core.environment import QUIET_ENVIRONMENT

log = logging.getLogger("fed_tat.launcher")

FIRST_PAUSE_S, LONGEST_PAUSE_S, GRACE_S = 5.0, 60.0, 20.0

Certificates = Annotated[Path | None, typer.Option(help="PEM file of the authority that signed the coordinator's certificate.")]
Key = Annotated[Path | None, typer.Option(help="Private key that the coordinator registered for this site.")]


def launch(
    site: Annotated[Path, typer.Option(help="The hospital's site.yaml.")],
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")],
    root_certificates: Certificates = None,
    key: Key = None,
    insecure: Annotated[bool, typer.Option(help="Without TLS: for trials on one machine only.")] = False,
) -> None:
    """Join a consortium as one hospital: start the SuperNode, restart it when it dies, stop it on SIGTERM or Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    try:
        hospital = load_site(site)
        command = supernode_command(site.resolve(), superlink, root_certificates, key, insecure)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    keep_running(command, hospital, stopping)


def supernode_command(site: Path, superlink: str, root_certificates: Path | None, key: Path | None, insecure: bool) -> list[str]:
    """The command line of the SuperNode.

    Raises
    ------
    ValueError
        Not exactly one of a certificate and ``--insecure``, or a file does not exist.
    """
    if (root_certificates is None) != insecure:
        got = "both" if root_certificates else "neither"
        raise ValueError(
            f"flower-client: expected either --root-certificates or --insecure, got {got}; give the consortium's CA file"
        )
    for path in (root_certificates, key):
        if path is not None and not path.is_file():
            raise ValueError(f"flower-client: expected a file, got {path}, which does not exist; ask the coordinator for it")
    if '"' in str(site):
        raise ValueError(f"flower-client: expected a path without quotes, got {site}; move the file")
    executable = shutil.which("flower-supernode", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert executable is not None, "flwr brings flower-supernode"
    trust = ["--insecure"] if insecure else ["--root-certificates", str(root_certificates)]
    identity = [] if key is None else ["--auth-supernode-private-key", str(key)]
    return [executable, "--superlink", superlink, *trust, *identity, "--node-config", f'site="{site}"']


def keep_running(command: list[str], site: Site, stopping: threading.Event) -> None:
    """Run the SuperNode until told to stop; after it died, wait a little longer each time before the next start.

    Flower refuses a node that it believes to be active still, for about a minute after a crash: the pauses outlast that.
    """
    home = site.state_dir / "flower"
    home.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        **QUIET_ENVIRONMENT,
        "FLWR_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    pause = FIRST_PAUSE_S
    while not stopping.is_set():
        # Every node on a host needs a port of its own for the processes that it starts.
        process = subprocess.Popen(
            [*command, "--port", str(_free_port())], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        log.info("%s: SuperNode started", site.name)
        lasted = _wait(process, stopping)
        if stopping.is_set():
            break
        pause = FIRST_PAUSE_S if lasted > LONGEST_PAUSE_S else min(2 * pause, LONGEST_PAUSE_S)
        log.warning("%s: SuperNode ended with code %s; next start in %.0f s", site.name, process.returncode, pause)
        stopping.wait(pause)
    log.info("%s: stopped", site.name)


def _wait(process: subprocess.Popen[bytes], stopping: threading.Event) -> float:
    """Wait for the end of the process, or end it and all that it started; seconds that it lasted."""
    ticks = 0
    while process.poll() is None and not stopping.wait(0.5):
        ticks += 1
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            log.warning("SuperNode did not stop in %.0f s and is killed", GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return 0.5 * ticks


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> None:
    """Entry point of `flower-client`."""
    typer.run(launch)
