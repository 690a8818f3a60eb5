"""`tat evaluate`: the benchmark's scores of a model on data sets, by slice, case, patient and task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text


def command(
    model: Annotated[Path, typer.Argument(help="Model file (.safetensors).")],
    data: Annotated[list[Path], typer.Argument(help="Data sets, or folders that hold them, such as a hospital's.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for evaluation.csv and evaluation.json; they name cases and patients, so keep it at the site.",
        ),
    ] = Path("evaluation"),
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    tile_size: Annotated[int, typer.Option(help="Side of a tile in pixels; a smaller image is restored whole.")] = 256,
    tile_overlap: Annotated[int, typer.Option(help="Pixels that neighbouring tiles share.")] = 32,
) -> None:
    """Score a model on data sets: PSNR, SSIM and RMSE of the input and of the restored images."""
    # torch takes seconds to import: not for `tat --help`.
    from tat_core.checkpoint import read_model
    from tat_core.config import EvaluateConfig
    from tat_core.data.prepared import open_split, prepare
    from tat_core.evaluate import score_slices
    from tat_core.evaluation import SliceRow, evaluation_of, find_data_sets, label_slices, usable_device, write_evaluation
    from tat_core.model.allocator import tune_allocator

    config = EvaluateConfig(tile_size=tile_size, tile_overlap=tile_overlap)
    folders = find_data_sets(data)
    tune_allocator()
    saved = read_model(model)
    usable = usable_device(device)
    console = Console()
    rows: list[SliceRow] = []
    with Progress(console=console, transient=True) as progress:
        for name, folder in folders.items():
            bar = progress.add_task(f"preparing {name}", total=None)
            images = open_split(prepare(folder), split)
            progress.update(bar, description=f"scoring {name}", total=len(images))
            scores = score_slices(saved.network(images.task.name), images, config, usable)
            rows += label_slices(progress.track(scores, task_id=bar), images, name)
    evaluation = evaluation_of(rows, {"file": model.name, "sha256": saved.sha256}, split, config)
    files = write_evaluation(evaluation, output)
    _show(evaluation, console)
    console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)


def _show(evaluation: dict[str, object], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for header in ("Task", "Slices", "Patients", "Images", "PSNR dB", "SSIM", "RMSE", "", "Gain dB"):
        table.add_column(header, justify="left" if header in ("Task", "Images", "") else "right", no_wrap=True)
    tasks = evaluation["tasks"]
    assert isinstance(tasks, dict)
    for task, entry in tasks.items():
        for index, arm in enumerate(("input", "restored")):
            means = entry[arm]
            scores = [f"{means['psnr']:.2f}", f"{means['ssim']:.4f}", f"{means['rmse']:#.4g}"] if means else ["–"] * 3
            gain = Text(f"{entry['gain_db']:+.2f}" if index and means else "", style="bold")
            facts = [task, str(entry["slices"]), str(entry["patients"])] if index == 0 else [""] * 3
            table.add_row(*facts, arm, *scores, entry["unit"], gain, end_section=bool(index))
    console.print(table)
    for task, entry in tasks.items():
        low, high = entry["evaluation_window"]
        left_out = f"; {entry['not_scored']} slices without contrast left out" if entry["not_scored"] else ""
        console.print(
            Text(f"{task}: window [{low:g}, {high:g}] {entry['unit']}, data range {entry['data_range']}{left_out}", style="dim")
        )
