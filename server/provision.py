"""`tat provision`: who takes part in a consortium, and the certificates of its coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.table import Table

from server import consortium
from server.coordinator import EXAMPLE, FILE, read_coordinator
from server.superlink import control, node_status
from tat_core.files import write_file

app = typer.Typer(no_args_is_help=True, help="Found a consortium, let hospitals in, renew the coordinator's certificate.")

Folder = Annotated[Path, typer.Option("--folder", help="The coordinator's folder.")]
Days = Annotated[float, typer.Option(help="How long the coordinator's certificate is valid.")]


@app.command()
def init(
    names: Annotated[list[str], typer.Option("--name", help="Host name or address by which hospitals reach the coordinator.")],
    folder: Folder = Path(),
) -> None:
    """Make the authority, the coordinator's certificate and coordinator.yaml in a new folder."""
    consortium.found(folder, names, consortium.utc_now())
    if not (folder / FILE).exists():
        write_file(folder / FILE, EXAMPLE.encode())
    typer.echo(f"edit           {folder / FILE}")
    typer.echo(f"for hospitals  {folder / consortium.AUTHORITY} (the authority's certificate; not secret, but send it safely)")
    typer.echo(f"keep secret    {folder / consortium.AUTHORITY_KEY}")


@app.command()
def approve(
    request: Annotated[Path, typer.Argument(help="What the hospital sent: NAME.csr.")],
    folder: Folder = Path(),
    fingerprint: Annotated[
        str | None, typer.Option(help="What the hospital told you by telephone; without it you are shown it and asked.")
    ] = None,
) -> None:
    """Let a hospital take part. A coordinator that runs lets it in within seconds."""
    consortium.read_certificate(folder, consortium.AUTHORITY)
    if not request.is_file():
        raise ValueError(f"provision approve: expected a request, got {request}, which does not exist; give the hospital's .csr")
    pem = request.read_bytes()
    if fingerprint is None:
        name, fingerprint = consortium.describe_request(pem)
        typer.confirm(f"{name} has the key {fingerprint}. Did the hospital tell you the same, by another way?", abort=True)
    site = consortium.approve(folder, pem, fingerprint, consortium.utc_now())
    typer.echo(f"{site.name} may connect with the key {site.fingerprint}")


@app.command("list")
def list_sites(folder: Folder = Path()) -> None:
    """The hospitals, and whether they are there now."""
    config = read_coordinator(folder / FILE)
    authority = (folder / consortium.AUTHORITY).read_bytes()
    try:
        with control(config.superlink, authority) as client:
            status = node_status(client)
    except httpx.HTTPError:
        typer.echo("the coordinator does not run, so nobody is there")
        status = {}
    table = Table("Hospital", "State", "Approved", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Key", overflow="fold")
    for site in consortium.read_sites(folder):
        state = f"revoked {site.revoked_at[:10]}" if site.revoked_at else status.get(site.name, "–")
        table.add_row(site.name, state, site.approved_at[:10], site.fingerprint)
    Console().print(table)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The hospital's name.")], folder: Folder = Path()) -> None:
    """Shut a hospital out. A coordinator that runs does so within seconds."""
    site = consortium.revoke(folder, name, consortium.utc_now())
    typer.echo(f"{site.name} may not connect any more")


@app.command()
def rotate(
    folder: Folder = Path(),
    names: Annotated[list[str] | None, typer.Option("--name", help="New names; the old ones otherwise.")] = None,
    days: Days = consortium.COORDINATOR_DAYS,
) -> None:
    """Give the coordinator a new key and certificate. Hospitals need to do nothing; a run goes on."""
    certificate = consortium.rotate(folder, names or [], consortium.utc_now(), days)
    typer.echo(f"valid until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")


@app.command()
def expiry(folder: Folder = Path()) -> None:
    """When the certificates end. Exit code 1 if one does within 30 days."""
    warned = False
    for name, end, warning in consortium.expiries(folder, consortium.utc_now()):
        typer.echo(f"{name}: {warning or f'valid until {end:%Y-%m-%d}'}")
        warned = warned or warning is not None
    if warned:
        raise typer.Exit(1)
