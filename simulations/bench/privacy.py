"""What differential privacy costs in time and memory: `python -m simulations.bench.privacy [--repeats 15]`.

One step of the demonstration's network on so many patients, one thread, CPU time. The ways take turns in one process; a process
each for memory, with the C library's own allocator. "a rule per layer" is the product's (tat_core/sample_gradients.py), "one at a
time" the plain way. torch.func's vmap is absent: it refuses the network's own autograd functions. About two minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tat_core.config import RunConfig, load_config
from tat_core.data.patches import sample_batch
from tat_core.data.prepared import PreparedSplit, StoredCase
from tat_core.dpsgd import PatientSgd, standard_normal
from tat_core.loss import per_sample_l1
from tat_core.model.allocator import tune_allocator
from tat_core.model.tat import build_model
from tat_core.tasks import CT
from tat_core.train import make_optimiser, train

CASES = ((4, 64), (16, 32))  # patients, side of the patch; the first is the demonstration's
TARGETS = {"private step over plain step": 1.6}
PLAIN, RULES, ONE = "plain step", "private, a rule per layer", "private, one at a time"


def main() -> int:
    """Print a table and one JSON line; return 1 if the target is missed."""
    parser = argparse.ArgumentParser(description="Time and memory of a private step.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        step = steps(int(options.worker[1]), int(options.worker[2]))[options.worker[0]]
        for _ in range(3):
            step()
        # Not getrusage: its peak begins with that of the process that started this one.
        peak_kib = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak_kib.split()[1]) / 1024)
        return 0
    tune_allocator()
    table = Table("patients × patch", "way", "ms", "of the plain step", "peak MiB of its process")
    figures = {}
    for patients, side in CASES:
        ways = steps(patients, side)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.repeats + 1):
            for name, step in ways.items():
                started = time.process_time()
                step()
                if turn:  # the first warms up
                    seconds[name].append(time.process_time() - started)
        for name, values in seconds.items():
            ratio = statistics.median(np.divide(values, seconds[PLAIN]))
            mib = _memory(name, patients, side)
            table.add_row(f"{patients} × {side}²", name, f"{1e3 * statistics.median(values):.0f}", f"{ratio:.2f}×", f"{mib:.0f}")
            figures[f"{name}, {patients} × {side}²: time"] = round(ratio, 3)
            figures[f"{name}, {patients} × {side}²: MiB"] = round(mib)
    figures["private step over plain step"] = figures[f"{RULES}, {CASES[0][0]} × {CASES[0][1]}²: time"]
    Console(width=110).print(table)
    holds = all(figures[name] <= bound for name, bound in TARGETS.items())
    print(json.dumps({"figures": figures, "targets": {k: f"max {v}" for k, v in TARGETS.items()}, "holds": holds}))
    return 0 if holds else 1


def steps(patients: int, side: int) -> dict[str, Callable[[], object]]:
    """Each way's step, on a network and optimiser of its own."""
    config = load_config("demo", [f"train.batch_size={patients}", f"train.patch_size={side}"])
    split = {"CT": _patients(patients)}

    def by_training(private: PatientSgd | None) -> Callable[[], object]:
        model = build_model(config.model, 0)
        optimiser, rng = make_optimiser(model, config.train), np.random.default_rng(0)
        return lambda: train(model, split, config.train, rng=rng, num_steps=1, optimiser=optimiser, private=private)

    return {
        PLAIN: by_training(None),
        RULES: by_training(PatientSgd(config.privacy, 1.0, 1.0)),
        ONE: _one_at_a_time(config, split),
    }


def _one_at_a_time(config: RunConfig, split: dict[str, PreparedSplit]) -> Callable[[], None]:
    model = build_model(config.model, 0)
    optimiser, rng = make_optimiser(model, config.train), np.random.default_rng(0)
    parameters = list(model.parameters())

    def step() -> None:
        total = torch.zeros(sum(p.numel() for p in parameters))
        batch = sample_batch(split, config.train.batch_size, config.train.patch_size, rng)
        for lq, hq in zip(batch.lq.split(1), batch.hq.split(1), strict=True):
            loss = per_sample_l1(model(lq), hq).sum()
            gradient = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters)])
            total.add_(gradient, alpha=min(1.0, config.privacy.clip_norm / float(gradient.norm())))
        total += torch.from_numpy(standard_normal(len(total)))
        for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = (part / config.train.batch_size).view_as(parameter)
        optimiser.step()

    return step


def _patients(number: int) -> PreparedSplit:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(0, 200, (2, 8, 256, 256)).astype(np.float32) for _ in range(number)]
    return PreparedSplit(CT, [StoredCase(str(i), str(i), array) for i, array in enumerate(arrays)])


def _memory(name: str, patients: int, side: int) -> float:
    command = [sys.executable, "-m", "simulations.bench.privacy", "--worker", name, str(patients), str(side)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
