"""Is training together better than training alone? `python -m simulations.compare`.

Trains every arm with every seed on the six sample hospitals, with equal optimiser steps and equal samples seen, and scores all on
test slices that nobody trained on or chose by. Each result is cached, so an interrupted comparison goes on where it was, a
federated arm with its round. Writes docs/results/compare.json, compare.md and plots. An arm and seed of 600 steps takes about
three minutes of two CPU cores; ``--steps 40 --seeds 1`` shows soon that it works. Settings are chosen on validation slices:
``--choose`` prints these instead and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from simulations.compare.arms import ARMS, Job, do, is_variation
from simulations.compare.report import choose_table, judge, write_report
from simulations.hospitals import build_hospitals
from simulations.processes import no_process_left, pool_of

# Smaller patches than the preset's: the comparison takes hours as it is.
COMMON = ("train.patch_size=48", "train.batch_size=2")
FITTING = 1 / 3  # of the steps, where an arm fits the released model at each hospital


def main() -> int:
    """Run what is missing and write the report; return 1 if a claim does not hold."""
    options = _options()
    folders = tuple(build_hospitals(options.hospitals, "demo"))
    options.cache.mkdir(parents=True, exist_ok=True)
    rounds = max(1, round(options.steps * (1 - FITTING) / options.local_steps))
    fitting = max(0, options.steps - rounds * options.local_steps)
    fixed = (f"train.local_steps={options.local_steps}", f"federation.fine_tune_steps={fitting}")
    overrides = (*COMMON, *fixed, *options.set)
    jobs = [
        Job(arm, seed, options.preset, overrides, options.steps, folders, options.cache, options.device)
        for seed in range(1, options.seeds + 1)
        for arm in options.arm or ARMS
    ]
    for job in jobs:
        _ = job.config  # refuses bad settings now, not after hours
    if options.cached:
        jobs = [job for job in jobs if job.result_file.is_file()]
        if not jobs:
            raise ValueError(f"compare: expected results of these settings in {options.cache}, got none; run without --cached")
    jobs.sort(key=lambda job: is_variation(job.arm))  # the claims' arms first
    with no_process_left():
        results = _all(jobs, options.workers)
    if options.choose:
        Console().print(choose_table(results))
        return 0
    verdict = judge(results)
    write_report(options.output, results, verdict, {"steps": options.steps, "local_steps": options.local_steps})
    print(json.dumps({"figures": verdict.figures, "targets": verdict.targets, "holds": verdict.holds}))
    return 0 if verdict.holds else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simulations.compare", description="Together, alone, pooled: the comparison.")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of every arm")
    parser.add_argument("--local-steps", type=int, default=5, help="of them in one round of a federated arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="only this one; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every arm")
    parser.add_argument("--workers", type=int, default=2, help="arms that train at the same time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hospitals", type=Path, default=Path("data/hospitals-demo"))
    parser.add_argument("--cache", type=Path, default=Path("runs/compare"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--cached", action="store_true", help="train nothing: report on the results that are there")
    parser.add_argument("--choose", action="store_true", help="print validation scores and write nothing")
    return parser.parse_args()


def _all(jobs: list[Job], workers: int) -> list[dict[str, Any]]:
    """Results of all jobs, in their order; those on disk at once."""
    with pool_of(workers) as pool, Progress() as progress:
        bar = progress.add_task("arms", total=len(jobs))
        futures = {pool.submit(do, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            progress.console.print(f"{job.arm}, seed {job.seed}: {future.result()['train_seconds']:.0f} s of training")
            progress.advance(bar)
    return [future.result() for future in futures]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("compare: interrupted; the same command goes on with the arms that are left")
    except ValueError as error:
        sys.exit(f"error: {error}")
