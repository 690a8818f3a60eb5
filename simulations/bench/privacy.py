"""What differential privacy costs in time and memory: `python -m simulations.bench.privacy [--repeats 15]`.

One step of the demonstration's network on four patients, a 64² patch each, one thread. The ways take turns in one process; a
process each for memory. "one at a time" is the product's (tat_core/dpsgd.py). torch.func's vmap is absent: it refuses the
network's own autograd functions. About a minute.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from simulations.bench.sample_hooks import clipped_sum, per_sample_gradients
from tat_core.config import RunConfig, load_config
from tat_core.data.patches import sample_batch
from tat_core.data.prepared import PreparedSplit, StoredCase
from tat_core.dpsgd import PatientSgd, standard_normal
from tat_core.loss import objective, per_sample_l1
from tat_core.model.allocator import tune_allocator
from tat_core.model.tat import build_model
from tat_core.tasks import CT
from tat_core.train import make_optimiser, train

PATIENTS = 4
TARGETS = {"private step over plain step": 1.6}
PLAIN, DEFAULT, FEWER, HOOKS = (
    "plain step",
    "private, one at a time",
    "private, one at a time, the private preset's groups",
    "private, a rule per layer",
)


def main() -> int:
    """Print a table and one JSON line; return 1 if the target is missed."""
    parser = argparse.ArgumentParser(description="Time and memory of a private step.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--worker", choices=[PLAIN, DEFAULT, FEWER, HOOKS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)
    if options.worker:
        step = steps()[options.worker]
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return 0
    ways = steps()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.repeats + 1):
        for name, step in ways.items():
            started = time.perf_counter()
            step()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    # Ratios within a turn, so that what else the machine does weighs on both sides.
    ratios = {name: statistics.median(np.divide(values, seconds[PLAIN])) for name, values in seconds.items()}
    memory = {name: _memory(name) for name in ways}
    table = Table("way", "ms", "of the plain step", "peak MiB of its process")
    for name, values in seconds.items():
        table.add_row(name, f"{1e3 * statistics.median(values):.0f}", f"{ratios[name]:.2f}×", f"{memory[name]:.0f}")
    Console(width=120).print(table)
    figures = {"private step over plain step": round(ratios[DEFAULT], 3)}
    figures |= {f"{name}: time": round(ratio, 3) for name, ratio in ratios.items()}
    figures |= {f"{name}: MiB": round(mib) for name, mib in memory.items()}
    holds = all(figures[name] <= bound for name, bound in TARGETS.items())
    print(json.dumps({"figures": figures, "targets": {k: f"max {v}" for k, v in TARGETS.items()}, "holds": holds}))
    return 0 if holds else 1


def steps() -> dict[str, Callable[[], object]]:
    """Each way's step, on a network and optimiser of its own."""
    config = load_config("demo", [f"train.batch_size={PATIENTS}"])
    split = {"CT": _patients()}

    def by_training(groups: tuple[str, ...] | None) -> Callable[[], object]:
        model = build_model(config.model, 0)
        optimiser = make_optimiser(model, config.train)
        private = PatientSgd(replace(config.privacy, groups=groups), 1.0, 1.0) if groups else None
        rng = np.random.default_rng(0)
        return lambda: train(model, split, config.train, rng=rng, num_steps=1, optimiser=optimiser, private=private)

    return {
        PLAIN: by_training(None),
        DEFAULT: by_training(config.privacy.groups),
        FEWER: by_training(load_config("private").privacy.groups),
        HOOKS: _with_rules(config, split),
    }


def _with_rules(config: RunConfig, split: dict[str, PreparedSplit]) -> Callable[[], None]:
    model = build_model(config.model, 0)
    optimiser, rng = make_optimiser(model, config.train), np.random.default_rng(0)

    def step() -> None:
        batch = sample_batch(split, PATIENTS, config.train.patch_size, rng)
        per_sample = per_sample_gradients(
            model, batch.lq, lambda restored: PATIENTS * objective(per_sample_l1(restored, batch.hq), config.train.loss)
        )
        total = clipped_sum(per_sample, config.privacy.clip_norm)
        total += torch.from_numpy(standard_normal(len(total)))
        for name, part in zip(per_sample, total.split([value[0].numel() for value in per_sample.values()]), strict=True):
            parameter = model.get_parameter(name)
            parameter.grad = (part / PATIENTS).view_as(parameter)
        optimiser.step()

    return step


def _patients() -> PreparedSplit:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(0, 200, (2, 8, 256, 256)).astype(np.float32) for _ in range(PATIENTS)]
    return PreparedSplit(CT, [StoredCase(str(i), str(i), array) for i, array in enumerate(arrays)])


def _memory(name: str) -> float:
    command = [sys.executable, "-m", "simulations.bench.privacy", "--worker", name]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
