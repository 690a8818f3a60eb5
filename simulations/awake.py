"""Does the hypernetwork matter? `python -m simulations.awake [--seeds 3] [--steps 600] [--long 3000]`.

Trains the demonstration's small TAT on the six sample hospitals in turn, one batch of one hospital a step, from four starts: as
published, with a smaller ε in AdamW, awake, and awake with a code of its own for each task; the same patches for all. Writes
docs/results/awake.json and awake.svg: over the steps the share of the depth-wise kernels that is generated, and what is lost on
validation slices when every image gets the same mean kernels; at the end the gain over the input on test slices, and how often
the task can be read from the kernels. The published start also runs for ``--long`` steps once. About 40 minutes on one CPU core;
runs that awake.json holds are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
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
from tat_core.groups import TASK_CODE
from tat_core.model.allocator import tune_allocator
from tat_core.model.hypernet import Kernels
from tat_core.model.info import kernel_shares
from tat_core.model.tat import TAT, build_model
from tat_core.sharing import start_of
from tat_core.train import make_optimiser, train

STARTS: dict[str, dict[str, Any]] = {
    "published": {"kernel_init": "published", "task_code": False, "adam_eps": 1e-8},
    "published, small ε": {"kernel_init": "published", "task_code": False, "adam_eps": 1e-12},
    "awake": {"kernel_init": "awake", "task_code": False, "adam_eps": 1e-12},
    "awake, task code": {"kernel_init": "awake", "task_code": True, "adam_eps": 1e-12},
}
_EVERY = 50  # steps between two looks at the kernels
_PATCHES = 12  # of each hospital, from which the task is read
Splits = list[tuple[str, PreparedSplit]]
Own = dict[str, dict[str, Tensor]]


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
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--long", type=int, default=3000, help="steps of the one long run from the published start")
    parser.add_argument("--hospitals", type=Path, default=Path("data/hospitals-demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)
    sites = [load_site(folder / "site.yaml") for folder in build_hospitals(options.hospitals, "demo")]
    stores = [(task, prepare(folder)) for site in sites for task, folder in site.data.items()]
    wanted = [(start, seed, options.steps) for seed in range(options.seeds) for start in STARTS] + [
        ("published", 0, options.long)
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "awake.json"
    there = {(run["start"], run["seed"], run["steps"]): run for run in _runs_in(file) if run["settings"] == STARTS[run["start"]]}
    with Progress() as progress:
        bar = progress.add_task("training", total=sum(run[2] for run in wanted if run not in there))
        for run in wanted:
            if run not in there:
                there[run] = one_run(stores, *run, lambda: progress.advance(bar, _EVERY))
                file.write_text(json.dumps({"every": _EVERY, "runs": list(there.values())}) + "\n")
    runs = [there[run] for run in wanted]
    plot(runs, options.output / "awake.svg")
    print_table([run for run in runs if run["steps"] == options.steps])


def _runs_in(file: Path) -> list[dict[str, Any]]:
    """Runs of an earlier call, which need not be repeated."""
    return list(json.loads(file.read_text())["runs"]) if file.is_file() else []


def one_run(stores: list[tuple[str, Path]], start: str, seed: int, steps: int, on_progress: Any) -> dict[str, Any]:
    """Train one model on all hospitals; return its kernels' share over the steps and its scores at the end."""
    config = load_config("demo", [])
    settings = dict(STARTS[start])
    training = replace(config.train, adam_eps=settings.pop("adam_eps"))
    model = build_model(replace(config.model, **settings), seed)
    if settings["kernel_init"] == "published":
        with torch.no_grad():  # the awake start does this too: only the hypernetwork is to differ
            model.output.weight.mul_(0.01)
    opened = {name: [(task, open_split(store, name)) for task, store in stores] for name in ("train", "validation", "test")}
    own: Own = {}
    if model.tren.task is not None:
        zero = model.tren.task.weight.detach().numpy()
        own = {task: {TASK_CODE: torch.from_numpy(start_of(TASK_CODE, task, zero))} for task, _ in stores}
    rng, optimiser = np.random.default_rng(seed), make_optimiser(model, training)
    probe = torch.cat([sample_batch({t: split}, 1, 64, np.random.default_rng(99)).lq for t, split in opened["train"]])
    turns = _in_turn(len(stores), rng)
    shares, lost = [mean(kernel_shares(model, probe).values())], [0.0]
    for step in range(steps):
        task, split = opened["train"][next(turns)]
        mine = {task: own[task]} if own else None
        train(
            model,
            {task: split},
            training,
            rng=rng,
            num_steps=1,
            first_step=step,
            total_steps=steps,
            optimiser=optimiser,
            own=mine,
        )
        if (step + 1) % _EVERY == 0:
            shares.append(mean(kernel_shares(model, probe).values()))
            on_progress()
        if (step + 1) % (4 * _EVERY) == 0:
            lost.append(mean(lost_with_mean_kernels(model, own, opened["train"], opened["validation"], config.evaluate).values()))
    model.eval()
    return {
        "start": start,
        "settings": STARTS[start],
        "seed": seed,
        "steps": steps,
        "share": shares,
        "lost_on_validation_db": lost,
        "gain_db": gain_over_input(model, own, opened["test"], config.evaluate),
        "lost_with_mean_kernels_db": lost_with_mean_kernels(model, own, opened["train"], opened["test"], config.evaluate),
        "task_read_correctly": nearest_mean_accuracy(
            probe_kernels(model, own, opened["train"], 7), probe_kernels(model, own, opened["test"], 8)
        ),
    }


def _in_turn(count: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(count)


@torch.no_grad()
def set_own(model: TAT, own: Own, task: str) -> None:
    """Give the model a task's own parameters."""
    for name, value in own.get(task, {}).items():
        model.get_parameter(name).copy_(value)


@torch.no_grad()
def probe_kernels(model: TAT, own: Own, splits: Splits, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Generated kernels of random patches, as many of each hospital: (N, values), and the patches' tasks (N,)."""
    rng = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    tasks: list[str] = []
    for task, split in splits:
        if len(split):
            set_own(model, own, task)
            kernels = model.tren.kernels(model.pooled_features(sample_batch({task: split}, _PATCHES, 64, rng).lq))
            values.append(torch.cat([part.flatten(1) for pair in kernels.values() for part in pair], 1).numpy())
            tasks += [task] * _PATCHES
    return np.concatenate(values), np.array(tasks)


@torch.no_grad()
def mean_kernels(model: TAT, own: Own, splits: Splits) -> Kernels:
    """Mean generated kernels, every hospital weighing the same."""
    parts = []
    for task, split in splits:
        set_own(model, own, task)
        lq = sample_batch({task: split}, _PATCHES, 64, np.random.default_rng(5)).lq
        parts.append(model.tren.kernels(model.pooled_features(lq)))

    def average(level: str, index: int) -> Tensor:
        return torch.stack([part[level][index].mean(0, keepdim=True) for part in parts]).mean(0)

    return {level: (average(level, 0), average(level, 1)) for level in parts[0]}


def lost_with_mean_kernels(model: TAT, own: Own, seen: Splits, scored: Splits, config: EvaluateConfig) -> dict[str, float]:
    """Task → PSNR lost when every image gets the same mean kernels, in dB."""
    gains = gain_over_input(model, own, scored, config)
    same = gain_over_input(model, own, scored, config, mean_kernels(model, own, seen))
    return {task: gains[task] - same[task] for task in gains}


def gain_over_input(
    model: TAT, own: Own, splits: Splits, config: EvaluateConfig, kernels: Kernels | None = None
) -> dict[str, float]:
    """Task → benchmark PSNR of the restored slices minus that of the inputs, in dB; two slices per hospital."""
    gains: dict[str, list[float]] = {}
    for task, split in splits:
        if len(split):
            set_own(model, own, task)
            scores = evaluate_split(model if kernels is None else MeanKernels(model, kernels), split, config, max_slices=2)
            gains.setdefault(task, []).append(scores["restored"].mean()["psnr"] - scores["input"].mean()["psnr"])
    return {task: mean(values) for task, values in gains.items()}


def nearest_mean_accuracy(seen: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray]) -> float:
    """How often the nearest task mean of the seen patches, in units of their spread, is a new patch's task."""
    values, tasks = seen
    spread = values.std(0) + 1e-12
    names = np.unique(tasks)
    centres = np.stack([values[tasks == name].mean(0) for name in names])
    distance = (((new[0][:, None] - centres) / spread) ** 2).sum(-1)
    return float((names[distance.argmin(1)] == new[1]).mean())


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the generated kernels' share, and what is lost without their differences, over the steps; one line a run."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 5.5), layout="constrained", sharex=True)
    colours = dict(zip(STARTS, ("C0", "C3", "C1", "C2"), strict=True))
    for run in runs:
        label = run["start"] if run["seed"] == 0 and run["steps"] == runs[0]["steps"] else None
        steps = np.arange(len(run["share"])) * _EVERY
        above.semilogy(steps, np.maximum(run["share"], 1e-10), colours[run["start"]], label=label)
        below.plot(np.arange(len(run["lost_on_validation_db"])) * 4 * _EVERY, run["lost_on_validation_db"], colours[run["start"]])
    above.set(ylabel="generated share of the kernels' norm", title="Is the hypernetwork awake?")
    below.set(xlabel="training step", ylabel="lost with the same mean\nkernels for all images, dB")
    above.legend()
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
