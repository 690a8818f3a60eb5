"""`flower-client`: a hospital's one command. It looks for obstacles, then keeps Flower's node and the warm trainer running."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import Annotated, TextIO

import typer

from client.coordinator import Coordinator
from client.site import Site, load_site
from client.supervise import LOOK_S, Group, keep_running
from client.wire import FOLDER_VARIABLE
from tat_core.environment import MESSAGE_ENVIRONMENT, QUIET_ENVIRONMENT
from tat_core.files import hold

log = logging.getLogger("fed_tat.launcher")

LOG_BYTES, LOGS_KEPT = 10_000_000, 4
DOCTOR_S = 120.0
NODE_PAUSE_S, TRAINER_PAUSE_S = 5.0, 0.5

SiteFile = Annotated[Path, typer.Option(help="The hospital's site.yaml.")]
Superlink = Annotated[str | None, typer.Option(help="HOST:PORT of the coordinator, if site.yaml does not say.")]
Certificates = Annotated[Path | None, typer.Option(help="PEM file of the authority that signed the coordinator's certificate.")]
Key = Annotated[Path | None, typer.Option(help="Private key that the coordinator registered for this site.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS: for trials on one machine only.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def launch(
    context: typer.Context,
    site: SiteFile = Path("site.yaml"),
    superlink: Superlink = None,
    root_certificates: Certificates = None,
    key: Key = None,
    insecure: Insecure = False,
) -> None:
    """Join a consortium as one hospital: start the node, restart what dies, stop it on SIGTERM or Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    with errors_explained():
        hospital = load_site(site)
        coordinator = whom_to_join(hospital, superlink, root_certificates, key, insecure)
        lock = only_one(hospital)
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    log_to(hospital.state_dir / "flower-client.log")
    examine(site.resolve(), coordinator, stopping)
    keep_running(groups(site.resolve(), hospital, coordinator), stopping)
    lock.close()


@app.command()
def doctor(
    site: SiteFile = Path("site.yaml"),
    superlink: Superlink = None,
    root_certificates: Certificates = None,
    key: Key = None,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Look for what keeps this site from taking part. Exit code 0: nothing; 1: something to look at; 2: it cannot take part."""
    from client.doctor import exit_code, look  # imports the data set's code

    with errors_explained():
        hospital = load_site(site)
        coordinator = whom_to_join(hospital, superlink, root_certificates, key, insecure)
    findings = look(hospital, coordinator)
    if as_json:
        typer.echo(json.dumps({finding.check: {"level": finding.level, "text": finding.text} for finding in findings}))
    else:
        for finding in findings:
            typer.echo(str(finding))
    raise typer.Exit(exit_code(findings))


def whom_to_join(
    site: Site, superlink: str | None, root_certificates: Path | None, key: Path | None, insecure: bool
) -> Coordinator:
    """The coordinator of site.yaml, with the command's options in its place where they are given.

    A key made by `tat site enroll` is found by itself.

    Raises
    ------
    ValueError
        Nobody says where the coordinator is, or a file does not exist.
    """
    address = superlink or (site.coordinator and site.coordinator.superlink)
    if not address:
        raise ValueError(
            "flower-client: expected coordinator.superlink in site.yaml, or --superlink, got neither; write it there"
        )
    stated = replace(site.coordinator, superlink=address) if site.coordinator else Coordinator(address, insecure=insecure)
    if insecure:
        return Coordinator(address, insecure=True, accept_other_code=stated.accept_other_code)
    if stated.insecure:
        return stated
    enrolled = site.state_dir / "node.key"
    chosen = replace(
        stated,
        root_certificates=root_certificates or stated.root_certificates,
        key=key or stated.key or (enrolled if enrolled.exists() else None),
    )
    for path in (chosen.root_certificates, chosen.key):
        if path is not None and not path.is_file():
            raise ValueError(f"flower-client: expected a file, got {path}, which does not exist; ask the coordinator for it")
    return chosen


def groups(site_file: Path, site: Site, coordinator: Coordinator) -> list[Group]:
    """What runs at a hospital: Flower's node, and the trainer that does the work. The node is stopped first."""
    home, trainer = site.state_dir / "flower", site.state_dir / "trainer"
    home.mkdir(parents=True, exist_ok=True)
    trainer.mkdir(mode=0o700, exist_ok=True)  # a first message may come before the trainer has begun
    environment = {
        **os.environ,
        **QUIET_ENVIRONMENT,
        **MESSAGE_ENVIRONMENT,
        "FLWR_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        FOLDER_VARIABLE: str(trainer),
    }

    def node() -> dict[str, list[str]]:
        # Every node on a host needs a port of its own for the processes that it starts.
        port = _free_port()
        module = [sys.executable, "-m", "client.node"]
        own = ["--isolation", "process", "--port", str(port)]
        return {
            "SuperNode": [*module, "supernode", *supernode_arguments(site_file, coordinator), *own],
            "ClientApps": [*module, "clientapps", f"127.0.0.1:{port}"],
        }

    def warm() -> dict[str, list[str]]:
        return {"Trainer": [sys.executable, "-m", "client.trainer", str(site_file), str(trainer)]}

    return [Group(node, environment, NODE_PAUSE_S), Group(warm, environment, TRAINER_PAUSE_S)]


def supernode_arguments(site_file: Path, coordinator: Coordinator) -> list[str]:
    """What Flower's SuperNode is told.

    Raises
    ------
    ValueError
        The site's file has a name that Flower cannot be told.
    """
    if '"' in str(site_file):
        raise ValueError(f"flower-client: expected a path without quotes, got {site_file}; move the file")
    certificates = ["--root-certificates", str(coordinator.root_certificates)] if coordinator.root_certificates else []
    trust = ["--insecure"] if coordinator.insecure else certificates
    identity = ["--auth-supernode-private-key", str(coordinator.key)] if coordinator.key else []
    return ["--superlink", coordinator.superlink, *trust, *identity, "--node-config", f'site="{site_file}"']


def only_one(site: Site) -> TextIO:
    """A lock that the process holds as long as the file that is returned is open.

    Raises
    ------
    ValueError
        There is a `flower-client` for this site already.
    """
    lock = hold(site.state_dir / "flower-client.lock")
    if lock is None:
        raise ValueError(f"flower-client: expected to be the only one for {site.name}, got another that runs; stop it first")
    return lock


def examine(site_file: Path, coordinator: Coordinator, stopping: threading.Event) -> None:
    """Log what the doctor says, and go on: most of what it finds can mend while the node tries again and again.

    It has a process of its own, so that this one, which stays, imports nothing large.
    """
    options = [f"--superlink={coordinator.superlink}", *(["--insecure"] if coordinator.insecure else [])]
    options += [f"--root-certificates={path}" for path in (coordinator.root_certificates,) if path]
    options += [f"--key={path}" for path in (coordinator.key,) if path]
    command = [sys.executable, "-m", "client.launcher", "doctor", f"--site={site_file}", *options]
    deadline = time.monotonic() + DOCTOR_S
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not stopping.is_set():
            try:
                said, _ = process.communicate(timeout=LOOK_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
                log.warning("doctor: no answer within %.0f s", DOCTOR_S)
                break
            for line in said.splitlines():
                log.info("doctor: %s", line)
            return
        process.kill()


def log_to(path: Path) -> None:
    """Log to the terminal, and as JSON lines to a file that is replaced before it grows large. Neither leaves the site."""
    file = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOGS_KEPT, encoding="utf-8")
    file.setFormatter(_JsonLines())
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers[:] = [file, terminal]


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": when, "level": record.levelname, "message": record.getMessage()})


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """What a user got wrong is said in one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> None:
    """Entry point of `flower-client`."""
    app()


if __name__ == "__main__":
    main()
