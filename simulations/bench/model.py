"""Time and peak memory of TAT against the published operations: `python -m simulations.bench.model [--quick]`.

Each measurement is a process of its own, because the allocator's settings belong to the process; the variants take turns. Two
comparisons: *like for like* (the transcription with our allocator's settings) and *as a user gets it* (the transcription with
the default allocator). On a machine with a GPU the same script measures there, and judges training in bf16 by batches of twelve.
The full run takes about 15 minutes on two quiet cores; ``--quick`` measures a small network in a minute and judges nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from simulations.bench.transcription import restore
from tat_core.config import ModelConfig
from tat_core.model.allocator import tune_allocator
from tat_core.model.pointwise import pointwise
from tat_core.model.reference import from_published, to_published
from tat_core.model.tat import build_model

QUICK = ModelConfig(dim=16, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, tren_features=16, tren_code=64)


@dataclass(frozen=True)
class Variant:
    """What is measured: our network or the transcription, with or without our allocator's settings."""

    ours: bool = True
    tuned: bool = True
    precision: str = "fp32"
    checkpointing: bool = False


@dataclass(frozen=True)
class Case:
    """A batch of square images, restored or trained on, and the GFLOP that it takes: at the GEMM rate they give the floor."""

    batch: int
    side: int
    trains: bool
    gflop: float


GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
VARIANTS = {
    "published": Variant(ours=False, tuned=False),
    "published, our allocator": Variant(ours=False),
    "ours": Variant(),
    "ours, default allocator": Variant(tuned=False),
    "ours, bf16": Variant(precision="bf16"),
    "ours, checkpointing": Variant(checkpointing=True),
}
CASES = {
    "forward B=1": Case(1, 128, False, 83.3),
    "forward B=4": Case(4, 128, False, 333),
    "step B=1": Case(1, 128, True, 256),
    "step B=4": Case(4, 128, True, 1024),
    "forward 512²": Case(1, 512, False, 1370),
}
if GPU:  # where the allocator is torch's own
    VARIANTS = {name: variant for name, variant in VARIANTS.items() if variant.ours == variant.tuned}
    VARIANTS["published, bf16"] = Variant(ours=False, tuned=False, precision="bf16")
    CASES["step B=12"] = Case(12, 128, True, 3072)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# figure → (numerator, denominator, case, what, bound, whether the figure must be at least or at most the bound)
TARGETS = {
    "like for like: forward B=1 fp32": ("published, our allocator", "ours", "forward B=1", "seconds", 1.25, "min"),
    "like for like: forward B=1 bf16": ("published, our allocator", "ours, bf16", "forward B=1", "seconds", 2.4, "min"),
    "like for like: step B=1 fp32": ("published, our allocator", "ours", "step B=1", "seconds", 1.14, "min"),
    "like for like: step B=1 bf16": ("published, our allocator", "ours, bf16", "step B=1", "seconds", 1.8, "min"),
    "like for like: 512² fp32": ("published, our allocator", "ours", "forward 512²", "seconds", 1.4, "min"),
    "like for like: 512² bf16": ("published, our allocator", "ours, bf16", "forward 512²", "seconds", 2.5, "min"),
    "as a user gets it: forward B=4 fp32": ("published", "ours", "forward B=4", "seconds", 3.4, "min"),
    "as a user gets it: step B=4 fp32": ("published", "ours", "step B=4", "seconds", 2.5, "min"),
    "as a user gets it: 512² fp32": ("published", "ours", "forward 512²", "seconds", 4.5, "min"),
    "as a user gets it: 512² bf16": ("published", "ours, bf16", "forward 512²", "seconds", 8.0, "min"),
    "memory of a step B=4": ("ours", "published, our allocator", "step B=4", "mib", 0.8, "max"),
    "memory of a step B=4, checkpointing": ("ours, checkpointing", "published, our allocator", "step B=4", "mib", 0.4, "max"),
    "time of checkpointing, step B=4": ("ours, checkpointing", "ours", "step B=4", "seconds", 1.3, "max"),
}
if GPU:
    TARGETS = {"training throughput, B=12 bf16": ("published, bf16", "ours, bf16", "step B=12", "seconds", 2.5, "min")}


@dataclass(frozen=True)
class Measurement:
    """One process's best time for one call, in seconds, and its peak memory in MiB."""

    seconds: float
    mib: float


def main() -> int:
    """Print a table and one JSON line; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Time and memory of TAT against the published operations.")
    parser.add_argument("--quick", action="store_true", help="a small network, no targets")
    parser.add_argument("--rounds", type=int, default=2, help="how often the variants take turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; may be repeated")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(vars(measure(options.worker[0], options.worker[1], options.quick, options.threads))))
        return 0
    rates = {precision: gemm_rate(dtype, options.threads) for precision, dtype in PRECISIONS.items()}
    results: dict[tuple[str, str], Measurement] = {}
    for _ in range(options.rounds):
        for case in options.case or CASES:
            for variant in VARIANTS:
                if VARIANTS[variant].checkpointing and not CASES[case].trains:
                    continue
                results[variant, case] = _better(results.get((variant, case)), _in_process(variant, case, options))
    figures = {name: figure(results, *target[:4]) for name, target in TARGETS.items() if (target[0], target[2]) in results}
    _print_tables(results, figures, rates, options.quick)
    holds = options.quick or all(_holds(name, value) for name, value in figures.items())
    targets = {} if options.quick else {name: f"{TARGETS[name][5]} {TARGETS[name][4]}" for name in figures}
    figures |= {f"GEMM {precision}, GFLOP/s": round(rate) for precision, rate in rates.items()}
    print(json.dumps({"figures": figures, "targets": targets, "holds": holds}))
    return 0 if holds else 1


def measure(variant: str, case: str, quick: bool, threads: int) -> Measurement:
    """Time one case of one variant in this process: the better of two calls after one that warms up."""
    how, what = VARIANTS[variant], CASES[case]
    if how.tuned:
        tune_allocator()
    torch.set_num_threads(threads)
    config = QUICK if quick else ModelConfig()
    state = to_published(build_model(config, seed=0))
    lq = torch.rand(what.batch, 1, what.side, what.side, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    parameters: list[torch.Tensor]
    call: Callable[[torch.Tensor], torch.Tensor]
    if how.ours:
        model = from_published(state, replace(config, precision=how.precision, checkpointing=how.checkpointing)).to(DEVICE)
        if not what.trains:
            model.prepare_to_restore()
        parameters, call = list(model.parameters()), model.__call__
    else:
        state = {name: tensor.to(DEVICE).requires_grad_() for name, tensor in state.items()}
        parameters, call = list(state.values()), partial(restore, state)
    optimiser = torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.99), fused=True if how.ours else None)

    def once() -> None:
        autocasts = not how.ours and how.precision == "bf16"  # ours does so by itself
        with torch.set_grad_enabled(what.trains), torch.autocast(DEVICE, torch.bfloat16, enabled=autocasts):
            restored = call(lq)
        if what.trains:
            (restored - lq).abs().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        if GPU:
            torch.cuda.synchronize()

    once()
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    if GPU:
        return Measurement(min(seconds), torch.cuda.max_memory_allocated() / 2**20)
    return Measurement(min(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def gemm_rate(dtype: torch.dtype, threads: int) -> float:
    """GFLOP/s of a large matrix product on this machine, the best of five by torch's and by ours: what the floor is made of."""
    torch.set_num_threads(threads)
    side = 4096
    a, b = (torch.ones(side, side, dtype=dtype, device=DEVICE) for _ in range(2))
    ways: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.mm, pointwise]
    seconds = []
    for product in ways * 5:
        started = time.perf_counter()
        product(a, b)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2e-9 * side**3 / min(seconds)


def figure(results: dict[tuple[str, str], Measurement], numerator: str, denominator: str, case: str, what: str) -> float:
    """Ratio of two variants' seconds or MiB in one case."""
    return round(getattr(results[numerator, case], what) / getattr(results[denominator, case], what), 3)


def _in_process(variant: str, case: str, options: argparse.Namespace) -> Measurement:
    command = [sys.executable, "-m", "simulations.bench.model", "--threads", str(options.threads)]
    command += ["--quick"] * options.quick + ["--worker", variant, case]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _better(before: Measurement | None, now: Measurement) -> Measurement:
    if before is None:
        return now
    return Measurement(min(before.seconds, now.seconds), min(before.mib, now.mib))


def _holds(name: str, value: float) -> bool:
    *_, bound, sense = TARGETS[name]
    return value >= bound if sense == "min" else value <= bound


def _print_tables(
    results: dict[tuple[str, str], Measurement], figures: dict[str, float], rates: dict[str, float], quick: bool
) -> None:
    console = Console(width=110)
    gpu = torch.cuda.get_device_name() if GPU else ""
    table = Table("case", "variant", "ms", "of the floor", "peak MiB", title=gpu or f"CPU, {platform.machine()}")
    for variant, case in sorted(results, key=lambda pair: list(CASES).index(pair[1])):
        result = results[variant, case]
        floor = CASES[case].gflop / rates[VARIANTS[variant].precision]
        distance = "" if quick else f"{result.seconds / floor:.2f}×"
        table.add_row(case, variant, f"{1e3 * result.seconds:,.0f}", distance, f"{result.mib:,.0f}")
    console.print(table)
    ratios = Table("figure", "value", "target", "")
    for name, value in figures.items():
        *_, bound, sense = TARGETS[name]
        verdict = "" if quick else ("holds" if _holds(name, value) else "MISSED")
        ratios.add_row(name, f"{value:.2f}×", "" if quick else f"{'≥' if sense == 'min' else '≤'} {bound}×", verdict)
    console.print(ratios)
    console.print(", ".join(f"GEMM {precision} {rate:,.0f} GFLOP/s" for precision, rate in rates.items()), highlight=False)
    if not gpu:
        console.print(f"load average at the end: {os.getloadavg()[0]:.1f} (timings want a quiet machine)", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
