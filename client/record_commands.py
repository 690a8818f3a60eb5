"""`tat privacy` and `tat audit`: what a hospital's data-protection officer looks at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from client import audit, ledger
from client.site import load_site
from client.site_commands import SiteFile, spent, training_split

privacy_app = typer.Typer(no_args_is_help=True, help="How much the runs have spent of a hospital's privacy budget.")
audit_app = typer.Typer(no_args_is_help=True, help="What has left this hospital.")


@privacy_app.command("status")
def status(site: SiteFile = Path("site.yaml")) -> None:
    """ε of each data set over all runs, and how many rounds it does not cover."""
    hospital = load_site(site)
    for task, folder in hospital.data.items():
        typer.echo(f"{task}: {spent(hospital, training_split(folder))}")


@privacy_app.command("export")
def export(site: SiteFile = Path("site.yaml")) -> None:
    """Every round as a JSON line: enough to recompute ε with any accountant. Of a data set it holds one hash, nothing else."""
    for entry in ledger.rounds(load_site(site)):
        typer.echo(json.dumps(entry))


@audit_app.command("show")
def show(
    site: SiteFile = Path("site.yaml"),
    last: Annotated[int, typer.Option(help="How many entries, from the end; 0 for all.", min=0)] = 20,
) -> None:
    """What left, one JSON object a message: words and numbers in full, updates by size and hash."""
    path = audit.audit_file(load_site(site))
    entries = list(audit.read(path)) if path.exists() else []
    for entry in entries[-last:]:
        typer.echo(json.dumps(entry, ensure_ascii=False))


@audit_app.command("verify")
def verify(
    site: SiteFile = Path("site.yaml"),
    known: Annotated[str, typer.Option(help="NUMBER:HASH that an earlier verify printed and somebody kept elsewhere.")] = "",
) -> None:
    """Check that nothing in the audit log was changed, removed or inserted, and print what to keep for the next time."""
    path = audit.audit_file(load_site(site))
    number, _, digest = known.partition(":")
    if known and not (number.isdigit() and len(digest) == 64):
        raise ValueError(f"audit verify: expected NUMBER:HASH, got {known!r}; copy what an earlier verify printed")
    count, head = audit.verify(path, int(number), digest) if known else audit.verify(path)
    if unfinished := audit.unfinished_bytes(path):
        typer.echo(f"the last {unfinished} bytes are of an entry that was never finished: its message did not leave")
    typer.echo(f"{count} entries, unchanged; keep this elsewhere: {count}:{head}")
