"""`tat model …`: what a model is and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="What a model is and costs.")

_STAGES = ("latent", "decoder3", "decoder2", "decoder1", "refinement")


@app.callback()
def _model() -> None:
    """Keep `info` a sub-command while it is the only one."""


@app.command("info")
def info(
    file: Annotated[Path | None, typer.Argument(help="Model file (.safetensors); without it, a preset's fresh model.")] = None,
    preset: Annotated[str, typer.Option(help="Preset whose model to build when no file is given.")] = "demo",
    side: Annotated[int, typer.Option(min=16, help="Side of the square image that costs are given for, in pixels.")] = 128,
) -> None:
    """Print a model's parameters by group, its cost, and how much of its depth-wise kernels is generated."""
    import torch

    from tat_core.checkpoint import read_model
    from tat_core.config import load_config
    from tat_core.model.allocator import tune_allocator
    from tat_core.model.info import kernel_shares, mean_shares, model_info
    from tat_core.model.tat import build_model

    tune_allocator()
    if file is None:
        config = load_config(preset, [])
        model, title = build_model(config.model, config.seed), f"fresh model of preset {preset}"
    else:
        model, title = read_model(file).network(), file.name
    found = model_info(model.config, side)
    total = sum(found.parameters.values())
    table = Table(title=title, show_header=False)
    for group, count in found.parameters.items():
        table.add_row(f"{group} parameters", f"{count:,} ({count / total:.1%})")
    table.add_row("parameters", f"{total:,} ({4 * total / 2**20:.1f} MiB)")
    table.add_row(f"restoring {side}×{side}", f"{found.forward_gflop:.2f} GFLOP")
    table.add_row(f"a training step on {side}×{side}", f"{found.step_mib:,.0f} MiB")
    noise = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    for stage, share in mean_shares(kernel_shares(model, noise), _STAGES).items():
        table.add_row(f"generated share of kernels, {stage}", f"{share:.2g}")
    Console().print(table)
    if file is None:
        typer.echo("Shares are measured on noise; above about 0.05 the hypernetwork is awake.")
