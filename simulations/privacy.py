"""What does privacy cost in image quality? `python -m simulations.privacy`.

**Not a privacy claim.** The sample images come from one or two people per hospital, too few for any guarantee that leaves
something to learn. So one make-believe hospital holds the training slices of all six, and every *slice* stands for a patient. Its
network is trained at several budgets, with the noise that so many patients need, and with the noise that a hospital of `LARGE`
patients would need; the images are the same in both. Writes docs/results/privacy.md, privacy.json and privacy.svg. About eight
minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
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
from tat_core.privacy import epsilon_spent, noise_multiplier_for
from tat_core.tasks import TASKS
from tat_core.train import train

LARGE = 5000
BUDGETS = (2.0, 4.0, 8.0, math.inf)


def main() -> None:
    """Run the experiment and write its results."""
    parser = argparse.ArgumentParser(description="Image quality at several privacy budgets.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--hospitals", type=Path, default=Path("data/hospitals-demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="validation: to choose settings")
    parser.add_argument("overrides", nargs="*", help="of the private preset, such as train.lr=1e-3")
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)
    config = load_config("private", options.overrides)
    stores = [
        prepare(folder)
        for site in build_hospitals(options.hospitals, "demo")
        for folder in load_site(site / "site.yaml").data.values()
    ]
    patients = slices_as_patients([open_split(store, "train") for store in stores])
    scored = [split for split in (open_split(store, options.split) for store in stores) if len(split)]
    number = sum(split.num_patients for split in patients.values())
    runs = []
    plans = [(epsilon, size) for epsilon in BUDGETS for size in ((number, LARGE) if math.isfinite(epsilon) else (number,))]
    with Progress() as progress:
        bar = progress.add_task("training", total=options.seeds * len(plans))
        for seed in range(options.seeds):
            for epsilon, size in plans:
                runs.append(one_run(config, patients, scored, epsilon, size, seed))
                progress.advance(bar)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = {"scored": options.split, "stand_ins": number, "privacy_claim": False, "runs": runs}
    (options.output / "privacy.json").write_text(json.dumps(facts, indent=1) + "\n")
    plot(runs, options.output / "privacy.svg")
    (options.output / "privacy.md").write_text(page(runs, config, number))
    Console(width=160).print((options.output / "privacy.md").read_text())


def slices_as_patients(splits: list[PreparedSplit]) -> dict[str, PreparedSplit]:
    """One hospital of all tasks whose every slice is someone's only one."""
    cases: dict[str, list[StoredCase]] = {}
    for hospital, split in enumerate(splits):
        for case in split.cases:
            for k in range(case.array.shape[1]):
                name = f"{hospital}-{case.name}-{k}"
                cases.setdefault(split.task.name, []).append(StoredCase(name, name, case.array[:, k : k + 1]))
    return {task: PreparedSplit(TASKS[task], found) for task, found in cases.items()}


def one_run(
    config: RunConfig, patients: dict[str, PreparedSplit], scored: list[PreparedSplit], epsilon: float, size: int, seed: int
) -> dict[str, Any]:
    """Train with the noise that `size` patients need for a budget; return the mean gain over the input by task, in dB."""
    steps = config.num_rounds * config.train.local_steps
    present = sum(split.num_patients for split in patients.values())
    sigma, reported = 0.0, math.inf
    if math.isfinite(epsilon):
        rate, delta = config.train.batch_size / size, 1 / (2 * size)
        sigma = noise_multiplier_for(epsilon, delta, rate, steps)
        reported = epsilon_spent([(sigma, rate, steps)], delta)
    private = PatientSgd(config.privacy, sigma, config.train.batch_size / present, np.random.default_rng(seed).bytes)
    model = build_model(config.model, seed)
    train(model, patients, config.train, rng=np.random.default_rng(seed), num_steps=steps, private=private)
    gains: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    for split in scored:
        arms = evaluate_split(model, split, config.evaluate, max_slices=2)
        restored, given = arms["restored"].mean()["psnr"], arms["input"].mean()["psnr"]
        gains.setdefault(split.task.name, []).append(restored - given)
        scores.setdefault(split.task.name, []).append(restored)
    return {
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "epsilon_reported": reported if math.isfinite(reported) else None,
        "noise_for_patients": size,
        "noise_multiplier": sigma,
        "seed": seed,
        "gain_db": {task: mean(values) for task, values in gains.items()},
        "psnr_db": {task: mean(values) for task, values in scores.items()},
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean gain over the input at each budget."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    positions = {epsilon if math.isfinite(epsilon) else None: i for i, epsilon in enumerate(BUDGETS)}
    for number, size in enumerate(sorted({run["noise_for_patients"] for run in runs})):
        chosen = [run for run in runs if run["noise_for_patients"] == size or run["epsilon"] is None]
        for seed in sorted({run["seed"] for run in chosen}):
            mine = [run for run in chosen if run["seed"] == seed]
            values = [mean(run["gain_db"].values()) for run in mine]
            label = f"noise for {size:,} patients" if seed == 0 else None
            axes.plot([positions[run["epsilon"]] for run in mine], values, f"C{number}o-", label=label, alpha=0.7)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(BUDGETS)), [f"{epsilon:g}" if math.isfinite(epsilon) else "∞" for epsilon in BUDGETS])
    axes.set(xlabel="ε of the run (slices stand for patients)", ylabel="gain over the input, dB")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def page(runs: list[dict[str, Any]], config: RunConfig, stand_ins: int) -> str:
    """docs/results/privacy.md: means over the seeds, the spread in brackets."""
    tasks = list(runs[0]["psnr_db"])
    given = [f"{mean(run['psnr_db'][task] - run['gain_db'][task] for run in runs):.2f}" for task in tasks]
    rows = [_row("input image", "", "", *given, "")]
    for epsilon, size in dict.fromkeys((run["epsilon"], run["noise_for_patients"]) for run in runs):
        chosen = [run for run in runs if (run["epsilon"], run["noise_for_patients"]) == (epsilon, size)]
        overall = [mean(run["gain_db"].values()) for run in chosen]
        cells = (_psnr_and_gain(chosen, task) for task in tasks)
        spread = f" ({min(overall):+.2f}…{max(overall):+.2f})" if len(overall) > 1 else ""
        summary = f"{mean(overall):+.2f}{spread}"
        sigma = f"{chosen[0]['noise_multiplier']:.2f}"
        rows.append(
            _row("∞" if epsilon is None else f"{epsilon:g}", "" if epsilon is None else f"{size:,}", sigma, *cells, summary)
        )
    heads = (
        "ε of the run",
        "noise as for",
        "noise multiplier",
        *(f"{task}, dB" for task in tasks),
        "mean gain, dB",
    )
    table = "\n".join([_row(*heads), "|---" * len(heads) + "|", *rows])
    steps = config.num_rounds * config.train.local_steps
    trained = ", ".join(config.privacy.groups)
    return _PAGE.format(
        table=table,
        stand_ins=stand_ins,
        large=LARGE,
        steps=steps,
        batch=config.train.batch_size,
        groups=trained,
        seeds=len({run["seed"] for run in runs}),
    )


def _psnr_and_gain(runs: list[dict[str, Any]], task: str) -> str:
    return f"{mean(run['psnr_db'][task] for run in runs):.2f} ({mean(run['gain_db'][task] for run in runs):+.2f})"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


_PAGE = """# What privacy costs in image quality

`python -m simulations.privacy`: the preset `private` (dim 8; trained: {groups}), {steps} steps of {batch} expected patients,
seeds: {seeds}. PSNR on the test slices of the sample hospitals, two of each, and in brackets the gain over the input image.
Raw numbers in `privacy.json`.

> **Not a privacy claim.** The sample images come from one or two people a hospital. Here every training *slice* stands for a
> patient of a made-up hospital, {stand_ins} in all; neighbouring slices are alike, and a guarantee would be for the person.

![gain over the input at each budget](privacy.svg)

{table}

*Noise as for {large:,}* trains on the same {stand_ins} slices with the noise that the same budget asks of a hospital of
{large:,} patients (sampling rate {batch}/{large}, δ = 1/(2·patients)): it shows what the noise alone does, not what so many
patients would teach. At ∞ gradients are shortened but not noised.

What to take from it:
- A gain near 0 means that the network gives back its input. No budget here is worth its noise as a clinical network; what is
  gained without noise is lost nearly whole.
- Fewer patients need more noise for the same ε. A hospital of some hundred patients has nothing to gain from training a
  network of this kind privately.
- Only small groups of parameters are trained: noise grows with the root of their number, the signal does not. That alone
  also limits the row ∞.
- Choosing settings by looking at private data costs budget too. These were chosen on the validation slices of public sample
  images.
"""


if __name__ == "__main__":
    main()
