"""`tat restore`: a study in, a derived study out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def command(
    source: Annotated[Path, typer.Argument(help="DICOM folder, NIfTI file, or a directory of them.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Model file written by training.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; nothing in it is overwritten.")],
    task: Annotated[str | None, typer.Option(help="CT, MRI or PET; needed for NIfTI.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    residual: Annotated[bool, typer.Option("--residual", help="Also write restored minus input.")] = False,
    contact_sheet: Annotated[
        bool, typer.Option("--contact-sheet", help="Also write a PNG with slices before and after.")
    ] = False,
) -> None:
    """Restore images with a trained model. For research use only."""
    from tat_core.restore import RestoreOptions, restore_study

    console, failed = Console(highlight=False, markup=False), 0
    options = RestoreOptions(task=task, device=device, residual=residual, contact_sheet=contact_sheet)
    for result in restore_study(source, model, output, options):
        for path in result.outputs:
            console.print(f"{result.source.name} -> {path}", highlight=False, markup=False, soft_wrap=True)
        if result.error:
            failed += 1
            console.print(
                f"{result.source.name}: refused: {result.error}", style="red", highlight=False, markup=False, soft_wrap=True
            )
    if failed:
        raise typer.Exit(1)
