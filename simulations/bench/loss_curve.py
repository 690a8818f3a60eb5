"""Whether training in bf16 learns what fp32 learns: `python -m simulations.bench.loss_curve [--steps 300]`.

Both precisions start from the same weights and see the same images, for three seeds each. They are the same as far as this can
tell if the mean loss of the last third lies no further apart than seeds do. On a GPU it trains the published network with
batches of twelve patches of 128²; on a CPU, in some minutes, a small one with four of 64².
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from simulations.bench.model import DEVICE, GPU, QUICK
from tat_core.config import ModelConfig
from tat_core.model.allocator import tune_allocator
from tat_core.model.tat import build_model

SEEDS = (0, 1, 2)
ROWS = 10
APART = "bf16 from fp32, of the distance between seeds"
MOST_APART = 1.0


def main() -> int:
    """Print a table and one JSON line; return 1 if the precisions end further apart than seeds."""
    parser = argparse.ArgumentParser(description="Loss curves of bf16 beside fp32.")
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    if steps < ROWS:
        parser.error(f"argument --steps: expected at least {ROWS}, got {steps}; a row of the table is a tenth of them")
    tune_allocator()
    config, batch, side = (ModelConfig(), 12, 128) if GPU else (QUICK, 4, 64)
    curves = {
        precision: [loss_curve(replace(config, precision=precision), seed, steps, batch, side) for seed in SEEDS]
        for precision in ("fp32", "bf16")
    }
    where = torch.cuda.get_device_name() if GPU else "CPU"
    table = Table("steps", *curves, title=f"{where}: mean loss over {len(SEEDS)} seeds, batches of {batch} × {side}²")
    for row in range(ROWS):
        part = slice(row * steps // ROWS, (row + 1) * steps // ROWS)
        table.add_row(f"{part.start + 1} to {part.stop}", *(f"{mean(mean(c[part]) for c in of):.5f}" for of in curves.values()))
    Console(width=100).print(table)
    figures = compare(curves["fp32"], curves["bf16"])
    holds = figures[APART] <= MOST_APART
    targets = {APART: f"max {MOST_APART}"}
    print(json.dumps({"figures": figures, "targets": targets, "holds": holds}))
    return 0 if holds else 1


def loss_curve(config: ModelConfig, seed: int, steps: int, batch: int, side: int) -> list[float]:
    """The L1 loss of each step of learning to take noise out of smooth images."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(config, seed).to(DEVICE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.99), fused=True)
    losses = []
    for _ in range(steps):
        coarse = torch.rand(batch, 1, 8, 8, generator=generator)
        hq = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
        lq = (hq + 0.1 * torch.randn(hq.shape, generator=generator)).to(DEVICE)
        loss = F.l1_loss(model(lq), hq.to(DEVICE))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def compare(exact: list[list[float]], rounded: list[list[float]]) -> dict[str, float]:
    """The last third's mean loss of both, and how far apart they are beside the spread between the exact ones' seeds."""
    ends = [[mean(curve[-(len(curve) // 3) :]) for curve in curves] for curves in (exact, rounded)]
    apart = abs(mean(ends[1]) - mean(ends[0]))
    return {
        "fp32, last third": mean(ends[0]),
        "bf16, last third": mean(ends[1]),
        APART: apart / stdev(ends[0]),
    }


if __name__ == "__main__":
    sys.exit(main())
