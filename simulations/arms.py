"""What the federated model is compared with: each hospital alone, and the images as they came; all scored on test images."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import wait
from ctypes import c_int64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.alone import kept_model, train_alone
from client.site import Site, load_site
from simulations.processes import pool_of
from tat_core.checkpoint import arrays_of, read_model, save_model
from tat_core.config import RunConfig
from tat_core.data.prepared import PreparedSplit, open_split, prepare
from tat_core.evaluate import Scores, evaluate_split, restore_image
from tat_core.model.allocator import tune_allocator

ARMS = ("input", "alone", "together", "fine_tuned")

_progress: Any = None


@dataclass(frozen=True)
class Job:
    """One hospital's share of the work."""

    site_file: Path
    config: RunConfig
    run_folder: Path

    def alone_file(self, site: Site) -> Path:
        """Where the model that this hospital trained alone is kept."""
        return self.run_folder / "alone" / f"{site.name}.safetensors"


def keep_alone(job: Job) -> str:
    """Train one hospital's own model and keep it; a resumed run has it already."""
    site, config = _begin(job)
    if job.alone_file(site).is_file():
        return site.name
    model = train_alone(site, config, _count_step)
    job.alone_file(site).parent.mkdir(parents=True, exist_ok=True)
    save_model(job.alone_file(site), arrays_of(model), config.model, {"site": site.name})
    return site.name


def score(job: Job) -> dict[str, Any]:
    """Score one hospital's test images, by task and arm, and keep one slice of each as a panel for the report."""
    site, config = _begin(job)
    result: dict[str, Any] = {"site": site.name, "scanner": site.scanner, "synthetic": site.synthetic, "tasks": {}}
    splits = {task: open_split(prepare(site.data[task]), "test") for task in config.tasks if task in site.data}
    splits = {task: split for task, split in splits.items() if len(split)}
    for task, split in splits.items():
        models: dict[str, torch.nn.Module] = {
            "alone": read_model(job.alone_file(site)).network(),
            "together": read_model(job.run_folder / "model.safetensors").network(task),
        }
        if config.federation.fine_tune_steps:
            models["fine_tuned"] = read_model(kept_model(site, config)).network(task)
        scores = {name: evaluate_split(model, split, config.evaluate, device=site.device) for name, model in models.items()}
        result["tasks"][task] = {"input": scores["alone"]["input"], **{name: scores[name]["restored"] for name in models}}
        _keep_panel(job.run_folder / "panels" / f"{row_name(site.name, task, splits)}.npz", models, split, config, site.device)
    return result


def row_name(site: str, task: str, tasks: Collection[str]) -> str:
    """What one hospital's scores of one task are called: by the hospital, and by the task if it has several."""
    return site if len(tasks) == 1 else f"{site} {task}"


def in_parallel(
    work: Callable[[Job], Any], jobs: Sequence[Job], workers: int, on_poll: Callable[[int], None] = lambda _: None
) -> list[Any]:
    """Do the jobs in processes of their own, in order of their results; `on_poll` gets the training steps done so far by all."""
    steps = mp.get_context("spawn").Value(c_int64, 0)
    with pool_of(workers, initializer=_share, initargs=(steps,)) as pool:
        pending = [pool.submit(work, job) for job in jobs]
        while wait(pending, timeout=0.5).not_done:
            on_poll(steps.value)
        return [future.result() for future in pending]


def _share(steps: Any) -> None:
    global _progress
    _progress = steps


def _count_step(_done: int) -> None:
    if _progress is not None:
        with _progress.get_lock():
            _progress.value += 1


def _begin(job: Job) -> tuple[Site, RunConfig]:
    torch.set_num_threads(job.config.train.num_threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    tune_allocator()
    return load_site(job.site_file), job.config


def _keep_panel(path: Path, models: dict[str, torch.nn.Module], split: PreparedSplit, config: RunConfig, device: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lq, hq = split.pair(len(split) // 2)
    restored = {
        name: restore_image(model, lq, split.task, config.evaluate.tile_size, config.evaluate.tile_overlap, device)
        for name, model in models.items()
    }
    np.savez_compressed(path, **{"lq": lq, "hq": hq, **restored})  # type: ignore[arg-type]


def total_scores(results: Sequence[dict[str, Any]], task: str) -> dict[str, Scores]:
    """Sum of the hospitals' scores of one task, by arm."""
    parts = [result["tasks"][task] for result in results if task in result["tasks"]]
    return {arm: sum((part[arm] for part in parts), Scores()) for arm in ARMS if all(arm in part for part in parts)}
