"""What does privacy cost in image quality? `python -m simulations.privacy`.

**Not a privacy claim.** The sample images come from one or two people per hospital, too few for any guarantee that leaves
something to learn. So one make-believe hospital a task holds the training slices of that task, and every *slice* stands for a
patient. Its network is trained at several budgets, with the noise that so many patients need, and with the noise that a hospital
of `LARGE` patients would need; the images are the same in both. Writes docs/results/privacy.md, privacy.json and privacy.svg.
About thirteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from client.site import load_site
from simulations.hospitals import build_hospitals
from tat_core.config import RunConfig, load_config
from tat_core.data.prepared import PreparedSplit, StoredCase, open_split, prepare
from tat_core.dpsgd import PatientSgd
from tat_core.evaluate import evaluate_split
from tat_core.model.allocator import tune_allocator
from tat_core.model.tat import build_model
from tat_core.privacy import noise_multiplier_for
from tat_core.tasks import TASKS
from tat_core.train import train

LARGE = 5000
SAMPLED = 32  # stand-ins in a step where no more are needed
BUDGETS = (2.0, 4.0, 8.0, math.inf)


@dataclass(frozen=True)
class Run:
    """One network to train.

    Attributes
    ----------
    task : str
    epsilon : float
    large : bool
        Whether the noise is that of a hospital of `LARGE` patients.
    seed : int
    """

    task: str
    epsilon: float
    large: bool
    seed: int


def main() -> None:
    """Run the experiment and write its results."""
    parser = argparse.ArgumentParser(description="Image quality at several privacy budgets.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--hospitals", type=Path, default=Path("data/hospitals-demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="validation: to choose settings")
    parser.add_argument("overrides", nargs="*", help="of the private preset, such as train.lr=1e-3")
    options = parser.parse_args()
    config = load_config("private", options.overrides)
    stores = [
        prepare(folder)
        for site in build_hospitals(options.hospitals, "demo")
        for folder in load_site(site / "site.yaml").data.values()
    ]
    plans = [
        Run(task, epsilon, large, seed)
        for seed, task, epsilon, large in product(range(options.seeds), config.tasks, BUDGETS, (False, True))
        if large or math.isfinite(epsilon)
    ]
    runs = []
    with (
        ProcessPoolExecutor(options.jobs, mp.get_context("spawn"), initializer=_one_thread) as pool,
        Progress() as progress,
    ):
        bar = progress.add_task("training", total=len(plans))
        for run in pool.map(partial(one_run, config, stores, options.split), plans):
            runs.append(run)
            progress.advance(bar)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = {"scored": options.split, "privacy_claim": False, "runs": runs}
    (options.output / "privacy.json").write_text(json.dumps(facts, indent=1) + "\n")
    plot(runs, options.output / "privacy.svg")
    (options.output / "privacy.md").write_text(page(runs, config))
    Console(width=160).print((options.output / "privacy.md").read_text())


def _one_thread() -> None:
    tune_allocator()
    torch.set_num_threads(1)


def slices_as_patients(splits: list[PreparedSplit]) -> PreparedSplit:
    """The slices of one task as a hospital whose every slice is someone's only one."""
    cases = []
    for hospital, split in enumerate(splits):
        for case in split.cases:
            for k in range(case.array.shape[1]):
                name = f"{hospital}-{case.name}-{k}"
                cases.append(StoredCase(name, name, case.array[:, k : k + 1]))
    return PreparedSplit(splits[0].task, cases)


def private_sgd(config: RunConfig, plan: Run, present: int) -> tuple[PatientSgd, float]:
    """The steps' gradients with the noise that the plan asks for, and that hospital's noise multiplier.

    A large hospital samples `train.batch_size` of `LARGE` patients for a step. Here fewer stand-ins are sampled, and the noise is
    made smaller by as much, so that the mean gradient of a step has the noise that it would have there.
    """
    random_bytes = np.random.default_rng(plan.seed).bytes
    few = min(1.0, SAMPLED / present)
    if not math.isfinite(plan.epsilon):
        return PatientSgd(config.privacy, 0.0, few, random_bytes), 0.0
    patients = LARGE if plan.large else present
    rate = min(1.0, config.train.batch_size / patients)
    sigma = noise_multiplier_for(plan.epsilon, 1 / (2 * patients), rate, config.local_steps_in_all)
    if not plan.large:
        return PatientSgd(config.privacy, sigma, rate, random_bytes), sigma
    return PatientSgd(config.privacy, sigma * (few * present) / (rate * patients), few, random_bytes), sigma


def one_run(config: RunConfig, stores: list[Path], scored: str, plan: Run) -> dict[str, Any]:
    """Train one network; return its mean PSNR and its gain over the input, in dB."""
    task = TASKS[plan.task]
    mine = [split for split in (open_split(store, "train") for store in stores) if split.task == task]
    patients = slices_as_patients(mine)
    private, sigma = private_sgd(config, plan, patients.num_patients)
    model = build_model(config.model, plan.seed)
    steps = config.local_steps_in_all
    rng = np.random.default_rng(plan.seed)
    train(model, {plan.task: patients}, config.train, rng=rng, num_steps=steps, private=private)
    arms = []
    for split in (open_split(store, scored) for store in stores):
        if split.task == task and len(split):
            arms.append(evaluate_split(model, split, config.evaluate, max_slices=2))
    restored = mean(arm["restored"].mean()["psnr"] for arm in arms)
    return {
        "task": plan.task,
        "epsilon": plan.epsilon if math.isfinite(plan.epsilon) else None,
        "large": plan.large,
        "seed": plan.seed,
        "stand_ins": patients.num_patients,
        "noise_multiplier": sigma,
        "psnr_db": restored,
        "gain_db": restored - mean(arm["input"].mean()["psnr"] for arm in arms),
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the gain over the input at each budget, a panel for each hospital size."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    for large, axes in zip((False, True), panels, strict=True):
        for number, task in enumerate(tasks):
            chosen = [run for run in runs if run["task"] == task and (run["large"] == large or run["epsilon"] is None)]
            for seed in sorted({run["seed"] for run in chosen}):
                values = [_of(chosen, epsilon, seed)["gain_db"] for epsilon in BUDGETS]
                axes.plot(values, f"C{number}o-", label=task if seed == 0 else None, alpha=0.7)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(BUDGETS)), [_label(epsilon) for epsilon in BUDGETS])
        patients = f"{LARGE:,} patients" if large else "as many patients as slices"
        axes.set(xlabel="ε of the run", title=f"noise for {patients}")
    panels[0].set_ylabel("gain over the input, dB")
    panels[0].legend()
    figure.savefig(path)
    plt.close(figure)


def _label(epsilon: float) -> str:
    return f"{epsilon:g}" if math.isfinite(epsilon) else "∞"


def _of(runs: list[dict[str, Any]], epsilon: float, seed: int) -> dict[str, Any]:
    return next(run for run in runs if (run["epsilon"] or math.inf) == epsilon and run["seed"] == seed)


def page(runs: list[dict[str, Any]], config: RunConfig) -> str:
    """docs/results/privacy.md: means over the seeds, the spread of the gain in brackets."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    first = {task: next(run for run in runs if run["task"] == task) for task in tasks}
    given = [f"{run['psnr_db'] - run['gain_db']:.2f}" for run in first.values()]
    rows = [_row("input image", "", "", *given)]
    for large in (False, True):
        for epsilon in BUDGETS:
            chosen = [run for run in runs if (run["epsilon"] or math.inf) == epsilon and run["large"] == large]
            if chosen:
                noise = "/".join(dict.fromkeys(f"{run['noise_multiplier']:.2f}" for run in chosen))
                size = "none" if not math.isfinite(epsilon) else f"{LARGE:,}" if large else "the slices"
                cells = (_cell([run for run in chosen if run["task"] == task]) for task in tasks)
                rows.append(_row(_label(epsilon), size, noise, *cells))
    table = "\n".join([_row("ε of the run", "noise as for", "noise multiplier", *tasks), "|---" * (3 + len(tasks)) + "|", *rows])
    return _PAGE.format(
        table=table,
        stand_ins=", ".join(f"{task} {run['stand_ins']}" for task, run in first.items()),
        large=LARGE,
        steps=config.local_steps_in_all,
        batch=config.train.batch_size,
        sampled=SAMPLED,
        groups=", ".join(config.privacy.groups),
        seeds=len({run["seed"] for run in runs}),
    )


def _cell(runs: list[dict[str, Any]]) -> str:
    gains = [run["gain_db"] for run in runs]
    spread = f" ({min(gains):+.2f}…{max(gains):+.2f})" if len(gains) > 1 else ""
    return f"{mean(run['psnr_db'] for run in runs):.2f}, {mean(gains):+.2f}{spread}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


_PAGE = """# What privacy costs in image quality

`python -m simulations.privacy`: the preset `private` (dim 8; trained: {groups}), {steps} steps of {batch} expected patients,
seeds: {seeds}. PSNR in dB on the test slices of the sample hospitals, two of each, and its gain over the input image.
Raw numbers in `privacy.json`.

> **Not a privacy claim.** The sample images come from one or two people a hospital. Here every training *slice* of a task stands
> for a patient of a made-up hospital ({stand_ins}); neighbouring slices are alike, and a guarantee would be for the person.

![gain over the input at each budget](privacy.svg)

{table}

*Noise as for {large:,}* trains on the same slices with the noise that the same budget asks of a hospital of {large:,} patients
(δ = 1/(2·patients), {batch} of them a step): it shows what the noise alone does, not what so many patients would teach.
{sampled} slices are sampled for a step there, and the mean gradient has the noise of a mean of {batch}. At ∞ gradients are
shortened but not noised.

[What to take from it](privacy-notes.md) is written by hand.
"""


if __name__ == "__main__":
    main()
