"""`tat adapt`: fit a released model to one hospital's images, or to a task that it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress


def command(
    model: Annotated[Path, typer.Argument(help="Released model (.safetensors).")],
    data: Annotated[Path, typer.Argument(help="Data set whose training slices to learn from.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the adapted model; keep it at the site.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 200,
    groups: Annotated[str, typer.Option(help="Parameter groups to train, by comma; the rest stays frozen.")] = "adapter",
    lr: Annotated[float, typer.Option(help="Learning rate of the first step; it falls along a cosine.")] = 5e-4,
    patch_size: Annotated[int, typer.Option(min=16, help="Side of a training patch, in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 42,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train some parameter groups of a released model on a hospital's own images, with the rest frozen."""
    from tat_core.adapt import adapt
    from tat_core.checkpoint import read_model, save_model
    from tat_core.config import FederationConfig, TrainConfig
    from tat_core.data.prepared import open_split, prepare
    from tat_core.evaluation import usable_device
    from tat_core.model.allocator import tune_allocator

    chosen = tuple(group.strip() for group in groups.split(","))
    FederationConfig(task_groups=chosen)  # says what is wrong with a group's name
    if output.exists():
        raise ValueError(f"adapt: expected a new file, got {output}, which exists; choose another name")
    output.parent.mkdir(parents=True, exist_ok=True)  # now, and not when hours of training are to be written
    config = TrainConfig(lr=lr, lr_min=0.0, patch_size=patch_size, ema_decay=0.0)
    tune_allocator()
    saved = read_model(model)
    split = open_split(prepare(data), "train")
    with Progress(transient=True) as progress:
        bar = progress.add_task(f"training {', '.join(chosen)}", total=steps)
        arrays = adapt(
            saved.arrays,
            saved.config,
            split,
            config,
            groups=chosen,
            num_steps=steps,
            seed=seed,
            device=str(usable_device(device)),
            on_step=lambda done: progress.update(bar, completed=done),
        )
    facts = {"adapted_from": saved.sha256, "adapted_task": split.task.name, "adapted_groups": list(chosen), "steps": steps}
    save_model(output, arrays, saved.config, saved.metadata["extra"] | facts)
    typer.echo(f"Written: {output}; score it with: tat evaluate {output} {data}")
