"""`tat site`: what a hospital's administrator does on its own machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from client import audit, ledger
from client.enroll import enroll
from client.site import Site, load_site
from client.state import pause_file
from tat_core.data.prepared import PreparedSplit, open_split

app = typer.Typer(no_args_is_help=True, help="A hospital's own side: what it takes part in, and whether.")

app.command()(enroll)

SiteFile = Annotated[Path, typer.Argument(help="The hospital's site.yaml.")]


@app.command()
def pause(site: SiteFile = Path("site.yaml")) -> None:
    """Take no part in anything from now on. A round that is under way goes on, but its result does not leave."""
    hospital = load_site(site)
    hospital.state_dir.mkdir(parents=True, exist_ok=True)
    pause_file(hospital).write_text(datetime.now(UTC).isoformat(timespec="seconds") + "\n")
    typer.echo(f"{hospital.name} is paused; `tat site resume {site}` ends it")


@app.command()
def resume(site: SiteFile = Path("site.yaml")) -> None:
    """Take part again."""
    hospital = load_site(site)
    pause_file(hospital).unlink(missing_ok=True)
    typer.echo(f"{hospital.name} takes part")


@app.command()
def status(site: SiteFile = Path("site.yaml")) -> None:
    """What a run would be answered now: pause, data sets, rounds of today, privacy spent."""
    hospital = load_site(site)
    paused = pause_file(hospital)
    typer.echo(f"{hospital.name}: {'paused since ' + paused.read_text().strip() if paused.exists() else 'takes part'}")
    limit = hospital.max_rounds_per_day
    today = sum(entry["reserved_at"] > time.time() - ledger.DAY_S for entry in ledger.rounds(hospital))
    typer.echo(f"rounds in the last 24 hours: {today} of {limit or 'any number'}")
    for task, folder in hospital.data.items():
        split = training_split(folder)
        offered = "offered" if split.num_patients >= hospital.minimum_patients else "NOT offered: below minimum_patients"
        typer.echo(f"{task}: {split.num_patients} training patients, {offered}; {spent(hospital, split)}")


@app.command()
def check(site: SiteFile = Path("site.yaml")) -> None:
    """Find what is wrong with site.yaml, the data sets, the ledger or the audit log. Exit code 1 if anything is."""
    hospital = load_site(site)
    found = list(_problems(hospital))
    for problem in found:
        typer.echo(f"problem: {problem}")
    if found:
        raise typer.Exit(1)
    typer.echo(f"{hospital.name}: no problem found")


def training_split(folder: Path) -> PreparedSplit:
    """The training slices of a prepared data set; decodes nothing."""
    return open_split(folder / "prepared", "train")


def spent(site: Site, split: PreparedSplit) -> str:
    """What a data set has paid, in words."""
    account = ledger.account(site, ledger.marks_of([split]))
    limit = "no ceiling" if site.privacy.epsilon is None else f"of {site.privacy.epsilon:g}"
    text = f"ε {account.epsilon:.3f} {limit} at δ {site.privacy.delta:g} in {account.private} private rounds"
    if account.unprotected:
        text += f"; {account.unprotected} rounds WITHOUT differential privacy"
    return text + (f"; {account.unsettled} of all these never finished" if account.unsettled else "")


def _problems(site: Site) -> Iterator[str]:
    for task, folder in site.data.items():
        try:
            split = training_split(folder)
        except ValueError as error:
            yield f"data.{task}, {folder}: {error}; tat data check and tat data prepare say more"
            continue
        patients = split.num_patients
        if split.task.name != task:
            yield f"data.{task}: the folder holds {split.task.name}; correct site.yaml"
        if patients < site.minimum_patients:
            yield f"data.{task}: {patients} training patients, below minimum_patients {site.minimum_patients}: it takes no part"
        if site.privacy.required and patients * site.privacy.delta >= 1:
            yield f"privacy.delta: expected below 1 / {patients} patients, got {site.privacy.delta:g}; lower it"
    try:
        ledger.rounds(site)
        audit.verify(audit.audit_file(site))
    except (OSError, ValueError) as error:
        yield str(error)
