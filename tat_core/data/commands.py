"""`tat data …`: check, prepare, show, describe, simulate and import a hospital's images."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="A hospital's images: check, prepare, look at, simulate, import.")

Folder = Annotated[Path, typer.Argument(help="Data set: the folder with dataset.json, splits.json, LQ and HQ.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes; each holds one case in memory.")]
AS_JSON = typer.Option("--json", help="Print JSON for programs.")
_PROCESSORS = os.cpu_count() or 1


@app.command("check")
def check_command(folder: Folder, as_json: Annotated[bool, AS_JSON] = False, workers: Workers = _PROCESSORS) -> None:
    """Find what is wrong with a data set. Exit code: 0 clean, 1 warnings, 2 errors. Changes no image."""
    from tat_core.data.check import check

    report = check(folder, workers)
    if as_json:
        findings = [asdict(finding) for finding in report.findings]
        content = {"cases": report.num_cases, "quarantined": len(report.quarantine), "findings": findings}
        typer.echo(json.dumps(content | {"exit_code": report.exit_code}, indent=2))
        raise typer.Exit(report.exit_code)
    console = Console()
    if report.findings:
        table = Table("", "case", "what", "why it matters", "what to do", title=f"{len(report.findings)} findings")
        for finding in report.findings:
            colour = "red" if finding.level == "error" else "yellow"
            texts = finding.case or "(all)", finding.what, finding.why, finding.do
            table.add_row(f"[{colour}]{finding.level}[/]", *(escape(_printable(text)) for text in texts))
        console.print(table)
    verdict = ("clean", "usable, with warnings", "has errors")[report.exit_code]
    set_aside = f"; {len(report.quarantine)} cases in quarantine.json" if report.quarantine else ""
    console.print(f"{report.num_cases} cases: {verdict}{set_aside}", highlight=False)
    raise typer.Exit(report.exit_code)


@app.command("prepare")
def prepare_command(
    folder: Folder,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: prepared/ in the data set.")] = None,
    workers: Workers = _PROCESSORS,
) -> None:
    """Decode a data set once, so that training needs no decoding. An interrupted call goes on where it was."""
    from tat_core.data.dataset import SPLITS, open_data_set
    from tat_core.data.prepared import open_split, prepare

    store = prepare(folder, output, workers)
    counts = ", ".join(f"{len(open_split(store, split))} {split}" for split in SPLITS)
    left_out = len(open_data_set(folder).quarantine)
    typer.echo(f"{store}: slices: {counts}" + (f"; {left_out} cases left out, see quarantine.json" if left_out else ""))


@app.command("show")
def show_command(
    folder: Folder,
    case: Annotated[str, typer.Argument(help="Name of a case.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file.")] = Path("case.png"),
) -> None:
    """Write a PNG panel of one case: low quality, high quality, difference."""
    from tat_core.data.describe import show_case

    typer.echo(show_case(folder, case, output))


@app.command("fingerprint")
def fingerprint_command(folder: Folder) -> None:
    """Print counts, spacings and intensity histograms as JSON; nothing of a single patient."""
    from tat_core.data.describe import fingerprint

    typer.echo(json.dumps(fingerprint(folder), indent=2))


@app.command("simulate")
def simulate_command(
    folder: Folder,
    settings: Annotated[
        list[str] | None, typer.Argument(help="name=value, such as dose_fraction=0.25, factor=4, dose_reduction=10.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the noise.")] = 42,
    workers: Workers = 1,
) -> None:
    """Make the low-quality side of a data set that only has good images."""
    from tat_core.data.simulate import simulate_low_quality

    failed = simulate_low_quality(folder, _numbers(settings or []), seed, workers)
    for name, reason in failed.items():
        typer.echo(f"{_printable(name)}: {reason}", err=True)
    raise typer.Exit(1 if failed else 0)


@app.command("import-benchmark")
def import_benchmark_command(
    root: Annotated[Path, typer.Argument(help="Folder with PET, CT and MRI as published.")],
    output: Annotated[Path, typer.Argument(help="Gets one data set a task.")],
) -> None:
    """Import the published all-in-one benchmark. Its pickles are read without running code from them."""
    from tat_core.data.benchmark_layout import import_benchmark

    for folder in import_benchmark(root, output):
        typer.echo(folder)


@app.command("import-bids")
def import_bids_command(
    root: Annotated[Path, typer.Argument(help="BIDS folder.")],
    output: Annotated[Path, typer.Argument(help="New data set; it gets an HQ side.")],
    task: Annotated[str, typer.Option(help="MRI or PET.")],
    suffix: Annotated[str, typer.Option(help="Which image: T1w, T2w, pet.")],
    seed: Annotated[int, typer.Option(help="Decides the split by patient.")] = 0,
) -> None:
    """Import MRI or PET of a BIDS folder as the high-quality side."""
    from tat_core.data.bids import import_bids

    typer.echo(import_bids(root, output, task, suffix, seed))


def _printable(text: str) -> str:
    """File names need not be valid Unicode, but a terminal takes nothing else."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _numbers(settings: list[str]) -> dict[str, float]:
    numbers = {}
    for text in settings:
        name, _, value = text.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            raise ValueError(f"simulate: expected name=number, got {text!r}; write it like factor=4") from None
    return numbers
