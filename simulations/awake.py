"""Does the hypernetwork matter? `python -m simulations.awake [--seeds 3] [--steps 150]`.

Trains the demonstration's small TAT on all six sample hospitals together, once with the published start and once awake, with the
same patches for both. Writes docs/results/awake.json and awake.svg: the share of the depth-wise kernels that is generated, at
every tenth step; at the end the gain over the input in the benchmark's PSNR, what is lost of it when every image gets the same
mean kernels, and how often the task can be read from the generated kernels. About 6 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from client.site import load_site
from simulations.hospitals import build_hospitals
from tat_core.config import EvaluateConfig, load_config
from tat_core.data.patches import sample_batch
from tat_core.data.prepared import PreparedSplit, open_split, prepare
from tat_core.evaluate import evaluate_split
from tat_core.model.allocator import tune_allocator
from tat_core.model.hypernet import Kernels
from tat_core.model.info import kernel_shares
from tat_core.model.tat import TAT, build_model
from tat_core.train import make_optimiser, train

STARTS = ("published", "awake")
_EVERY = 10
_PROBES = 40  # batches of four patches from which the task is read
Splits = dict[str, PreparedSplit]


class MeanKernels(nn.Module):
    """A model that restores every image with the same kernels."""

    def __init__(self, model: TAT, kernels: Kernels) -> None:
        super().__init__()
        self.model, self.kernels = model, kernels

    def forward(self, lq: Tensor) -> Tensor:
        """(B, 1, H, W) → same."""
        size = len(lq), -1, -1, -1
        return self.model(lq, {level: (a.expand(size), f.expand(size)) for level, (a, f) in self.kernels.items()})


def main() -> None:
    """Run the experiment and write its results."""
    parser = argparse.ArgumentParser(description="Is the hypernetwork awake, and does it matter?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--hospitals", type=Path, default=Path("data/hospitals-demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)
    sites = [load_site(folder / "site.yaml") for folder in build_hospitals(options.hospitals, "demo")]
    # One hospital per task in each half, so that a batch can hold every task.
    halves: list[dict[str, Path]] = [{}, {}]
    for site in sites:
        for task, folder in site.data.items():
            halves[task in halves[0]][task] = prepare(folder)
    runs = []
    with Progress() as progress:
        bar = progress.add_task("training", total=options.seeds * len(STARTS) * options.steps)
        for seed in range(options.seeds):
            for start in STARTS:
                runs.append(one_run(halves, start, seed, options.steps, lambda: progress.advance(bar, _EVERY)))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "awake.json").write_text(json.dumps({"steps": options.steps, "runs": runs}, indent=1) + "\n")
    plot(runs, options.output / "awake.svg")
    print_table(runs)


def one_run(halves: list[dict[str, Path]], start: str, seed: int, steps: int, on_progress: Any) -> dict[str, Any]:
    """Train one model on all hospitals; return its kernel shares over the steps and its scores at the end."""
    config = load_config("demo", [])
    model = build_model(replace(config.model, kernel_init=start), seed)
    if start == "published":
        with torch.no_grad():  # the awake start does this too: only the hypernetwork is to differ
            model.output.weight.mul_(0.01)
    splits = [{task: open_split(folder, "train") for task, folder in half.items()} for half in halves]
    tests = [{task: open_split(folder, "test") for task, folder in half.items()} for half in halves]
    rng, optimiser = np.random.default_rng(seed), make_optimiser(model, config.train)
    probe = sample_batch(splits[0], 6, config.train.patch_size, np.random.default_rng(99)).lq
    shares = [mean(kernel_shares(model, probe).values())]
    for first in range(0, steps, _EVERY):
        half = splits[first // _EVERY % 2]
        train(model, half, config.train, rng=rng, num_steps=_EVERY, first_step=first, total_steps=steps, optimiser=optimiser)
        shares.append(mean(kernel_shares(model, probe).values()))
        on_progress()
    model.eval()
    seen, new = probe_kernels(model, splits, seed=7), probe_kernels(model, tests, seed=8)
    fixed = MeanKernels(model, mean_kernels(model, splits))
    gains = gain_over_input(model, tests, config.evaluate)
    same = gain_over_input(fixed, tests, config.evaluate)
    return {
        "start": start,
        "seed": seed,
        "share": shares,
        "gain_db": gains,
        "lost_with_mean_kernels_db": {task: gains[task] - same[task] for task in gains},
        "task_read_correctly": nearest_mean_accuracy(seen, new),
    }


@torch.no_grad()
def probe_kernels(model: TAT, halves: list[Splits], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Generated kernels of random patches: (N, values) and the patches' tasks (N,)."""
    rng = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    tasks: list[str] = []
    for number in range(_PROBES):
        batch = sample_batch(halves[number % 2], 4, 64, rng)
        kernels = model.tren.kernels(model.pooled_features(batch.lq))
        values.append(torch.cat([part.flatten(1) for pair in kernels.values() for part in pair], 1).numpy())
        tasks += batch.tasks
    return np.concatenate(values), np.array(tasks)


@torch.no_grad()
def mean_kernels(model: TAT, halves: list[Splits]) -> Kernels:
    """Mean generated kernels, every task weighing the same."""
    sums: list[Tensor] = []
    for half in halves:
        for task, split in half.items():
            lq = sample_batch({task: split}, 16, 64, np.random.default_rng(5)).lq
            sums.append(model.pooled_features(lq))
    parts = [model.tren.kernels(pooled) for pooled in sums]
    return {
        level: (
            torch.stack([part[level][0].mean(0, keepdim=True) for part in parts]).mean(0),
            torch.stack([part[level][1].mean(0, keepdim=True) for part in parts]).mean(0),
        )
        for level in parts[0]
    }


def nearest_mean_accuracy(seen: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray]) -> float:
    """How often the nearest task mean of the seen patches, in units of their spread, is a new patch's task."""
    values, tasks = seen
    spread = values.std(0) + 1e-12
    names = np.unique(tasks)
    centres = np.stack([values[tasks == name].mean(0) for name in names])
    distance = (((new[0][:, None] - centres) / spread) ** 2).sum(-1)
    return float((names[distance.argmin(1)] == new[1]).mean())


def gain_over_input(model: nn.Module, halves: list[Splits], config: EvaluateConfig) -> dict[str, float]:
    """Task → benchmark PSNR of the restored test slices minus that of the inputs, in dB; two slices per hospital."""
    gains: dict[str, list[float]] = {}
    for half in halves:
        for task, split in half.items():
            scores = evaluate_split(model, split, config, max_slices=2)
            restored, given = scores["restored"].mean(), scores["input"].mean()
            gains.setdefault(task, []).append(float(restored["psnr"] - given["psnr"]))
    return {task: mean(values) for task, values in gains.items()}


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the generated kernels' share over the steps, one line a run."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for run in runs:
        colour, label = ("C0", "published start") if run["start"] == "published" else ("C1", "awake start")
        axes.semilogy(
            np.arange(len(run["share"])) * _EVERY,
            np.maximum(run["share"], 1e-10),
            colour,
            label=label if run["seed"] == 0 else None,
        )
    axes.set(xlabel="training step", ylabel="generated share of the kernels' norm", title="Is the hypernetwork awake?")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def print_table(runs: list[dict[str, Any]]) -> None:
    """Print each start's mean over the seeds, and the range of its gain."""

    def average(values: Mapping[str, float]) -> float:
        return mean(values.values())

    table = Table("start", "share at the end", "gain over input, dB", "(range)", "lost with mean kernels, dB", "task read")
    for start in STARTS:
        chosen = [run for run in runs if run["start"] == start]
        gains = [average(run["gain_db"]) for run in chosen]
        lost = mean(average(run["lost_with_mean_kernels_db"]) for run in chosen)
        read = mean(run["task_read_correctly"] for run in chosen)
        share = mean(run["share"][-1] for run in chosen)
        spread = f"{min(gains):.2f}…{max(gains):.2f}"
        table.add_row(start, f"{share:.2g}", f"{mean(gains):.2f}", spread, f"{lost:.3f}", f"{read:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
