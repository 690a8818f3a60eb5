"""The ways of training that are compared: each trains with the real loop and engine, and scores its models."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.alone import kept_model, train_alone
from client.site import Site, load_site
from server.strategy import run
from simulations.inprocess import LocalSites
from tat_core.checkpoint import read_model, replacing
from tat_core.config import RunConfig, config_to_dict, load_config
from tat_core.data.prepared import PreparedSplit, open_split, prepare
from tat_core.evaluate import score_slices
from tat_core.groups import GROUPS
from tat_core.model.allocator import tune_allocator
from tat_core.model.tat import TAT, build_model
from tat_core.model.weight_net import WeightNet
from tat_core.train import make_optimiser, train

EVERY_GROUP = f"federation.task_groups=[{','.join(GROUPS)}]"
STOCK_TUNED = (
    *("federation.task_groups=[]", "federation.combination=shares", "federation.server_lr=1"),
    *("balance.kind=equal", "train.keep_optimiser=false"),
)
STOCK = (*STOCK_TUNED, "federation.fine_tune_steps=0")
WITHIN = (EVERY_GROUP, "federation.server_lr=1", "train.keep_optimiser=false", "federation.fine_tune_steps=0")
SHARED = ("federation.task_groups=[adapter]", "federation.server_lr=2")
CROSS_SLICES = 2  # of each site's test slices, for models that were trained elsewhere
CURVE_POINTS = 10


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes
    ----------
    title : str
    how : str
        ``alone``, ``pooled`` (all images in one place), ``specialist`` (pooled by task) or ``federated``.
    overrides : tuple of str
        To the common configuration.
    """

    title: str
    how: str
    overrides: tuple[str, ...] = ()


ARMS = {
    "alone": Arm("L: each hospital alone", "alone"),
    "within": Arm("W: averaged within each task only", "federated", WITHIN),
    "specialist": Arm("S: pooled, one network per task", "specialist"),
    "pooled": Arm("P: pooled, one network, published loss", "pooled"),
    "fedavg": Arm("FedAvg", "federated", STOCK),
    "fedavg-tuned": Arm("FedAvg, then fine-tuned like ours", "federated", STOCK_TUNED),
    "fedprox": Arm("FedProx, μ = 0.01", "federated", (*STOCK, "train.proximal=0.01")),
    "ours": Arm("F: ours", "federated"),
    "without-fine-tuning": Arm("ours, the released model as it is", "federated", ("federation.fine_tune_steps=0",)),
    "without-kept-optimiser": Arm("ours, optimiser's state dropped each round", "federated", ("train.keep_optimiser=false",)),
    "without-awake": Arm(
        "ours, hypernetwork as published", "federated", ("model.task_code=false", "model.kernel_init=published")
    ),
    "without-longer-step": Arm("ours, server's step 1", "federated", ("federation.server_lr=1",)),
    "with-half-updates": Arm("ours, updates in 16 bits", "federated", ("federation.update_precision=bf16",)),
    "with-sharing": Arm("ours, all but adapters shared by the tasks", "federated", SHARED),
    "with-all-shared": Arm("ours, everything shared by the tasks", "federated", (*SHARED, "federation.task_groups=[]")),
    "with-balancer": Arm("ours, shared, shares by the closed-form balancer", "federated", (*SHARED, "balance.kind=closed_form")),
    "with-turning": Arm("ours, shared, conflict-averse", "federated", (*SHARED, "federation.combination=conflict_averse")),
}


def is_variation(arm: str) -> bool:
    """Whether an arm is ours with one factor changed."""
    return arm.startswith(("with-", "without-"))


@dataclass(frozen=True)
class Job:
    """One arm with one seed.

    Attributes
    ----------
    arm : str
    seed : int
    preset : str
    overrides : tuple of str
        Of every arm.
    steps : int
        Optimiser steps of a hospital in all, those of fine-tuning among them.
    hospitals : tuple of Path
    folder : Path
        For results and runs.
    device : str
    """

    arm: str
    seed: int
    preset: str
    overrides: tuple[str, ...]
    steps: int
    hospitals: tuple[Path, ...]
    folder: Path
    device: str

    @property
    def config(self) -> RunConfig:
        """The resolved configuration: as many rounds as the steps allow; it is scored by the comparison itself."""
        arm = ARMS[self.arm]
        fixed = (f"seed={self.seed}", f"output_dir={self.folder}", f"federation.num_sites={len(self.hospitals)}")
        config = load_config(self.preset, [*self.overrides, *arm.overrides, *fixed])
        if arm.how != "federated":
            config = replace(config, federation=replace(config.federation, fine_tune_steps=0))
        in_rounds = self.steps - config.federation.fine_tune_steps
        rounds, left = divmod(in_rounds, config.train.local_steps)
        if left or rounds < 1:
            raise ValueError(
                f"compare: expected steps in rounds to be a multiple of train.local_steps = {config.train.local_steps}, got "
                f"{in_rounds} ({self.arm}); change the steps"
            )
        return replace(config, num_rounds=rounds, federation=replace(config.federation, evaluate_every=rounds))

    @property
    def result_file(self) -> Path:
        """Where the result is kept; a changed configuration or data set gives another name."""
        federated = ARMS[self.arm].how == "federated"
        without_effect = {"output_dir", "name"} if federated else {"output_dir", "name", "federation", "balance"}
        settings = {key: value for key, value in config_to_dict(self.config).items() if key not in without_effect}
        made = [(folder / "built.json").read_text() for folder in self.hospitals if (folder / "built.json").is_file()]
        digest = hashlib.sha256(json.dumps([settings, made, ARMS[self.arm].how], sort_keys=True).encode()).hexdigest()
        return self.folder / f"{self.arm}-{self.seed}-{digest[:10]}.json"


def do(job: Job) -> dict[str, Any]:
    """Train and score one arm, or read the result that is there."""
    if job.result_file.is_file():
        return dict(json.loads(job.result_file.read_text()))
    torch.set_num_threads(job.config.train.num_threads)
    torch.use_deterministic_algorithms(True, warn_only=job.device != "cpu")
    tune_allocator()
    sites = [replace(load_site(folder / "site.yaml"), device=job.device) for folder in job.hospitals]
    started = time.perf_counter()
    models, curve = _TRAIN[ARMS[job.arm].how](job, sites)
    trained = time.perf_counter() - started
    result = {"arm": job.arm, "seed": job.seed, "train_seconds": trained, "curve": curve, "scores": _score(models, sites, job)}
    with replacing(job.result_file) as temporary:
        temporary.write_text(json.dumps(result))
    return result


Models = dict[str, Callable[[str], TAT]]
"""Where it was trained (a site, or ``all``) → the network for a task."""


def _alone(job: Job, sites: Sequence[Site]) -> tuple[Models, list[Any]]:
    return {site.name: _always(train_alone(site, job.config)) for site in sites}, []


def _pooled(job: Job, sites: Sequence[Site]) -> tuple[Models, list[Any]]:
    model, curve = _train_pooled(job, sites, job.config.tasks)
    return {"all": _always(model)}, curve


def _specialist(job: Job, sites: Sequence[Site]) -> tuple[Models, list[Any]]:
    trained = {
        task: _train_pooled(job, [site for site in sites if task in site.data], (task,))
        for task in job.config.tasks
        if any(task in site.data for site in sites)
    }
    return {"all": lambda task: trained[task][0]}, [{task: curve for task, (_, curve) in trained.items()}]


def _train_pooled(job: Job, sites: Sequence[Site], tasks: Sequence[str]) -> tuple[TAT, list[dict[str, float]]]:
    """As many steps as a site takes, on batches as large as all these sites' together: equal steps and equal samples."""
    config = job.config
    splits: dict[str, PreparedSplit] = {}
    for task in tasks:
        parts = [open_split(prepare(site.data[task]), "train") for site in sites if task in site.data]
        splits[task] = PreparedSplit(parts[0].task, [case for part in parts for case in part.cases])
    model = build_model(config.model, config.seed).to(job.device)
    weight_net = WeightNet().to(job.device)
    settings = replace(config.train, batch_size=config.train.batch_size * len(sites))
    optimiser = make_optimiser(model, settings)
    optimiser.add_param_group({"params": list(weight_net.parameters())})
    rng = np.random.default_rng(config.seed)
    total = config.local_steps_in_all
    bounds = np.linspace(0, total, CURVE_POINTS + 1).astype(int)
    curve = []
    for first, last in pairwise(bounds):
        done = train(
            model,
            splits,
            settings,
            rng=rng,
            num_steps=int(last - first),
            first_step=int(first),
            total_steps=total,
            device=job.device,
            optimiser=optimiser,
            weight_net=weight_net,
        )
        curve.append({task: stats.mean_loss / stats.mean_input for task, stats in done.stats.items()})
    return model, curve


def _federated(job: Job, sites: Sequence[Site]) -> tuple[Models, list[Any]]:
    config = replace(job.config, name=job.result_file.stem, resume=True)
    folder = job.folder / "runs" / config.name
    state = run(config, LocalSites(job.hospitals, config, job.device), folder)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    curve = [{task: facts["loss"] / facts["input_loss"] for task, facts in line["tasks"].items()} for line in lines]
    files = {"all": folder / "model.safetensors"}
    for site in sites:
        shutil.rmtree(site.state_dir / "runs" / state.run, ignore_errors=True)
        if config.federation.fine_tune_steps:
            files[site.name] = kept = folder / f"{site.name}.safetensors"
            if not kept.is_file():
                shutil.move(kept_model(site, config), kept)
    return {origin: read_model(file).network for origin, file in files.items()}, curve


def _always(model: TAT) -> Callable[[str], TAT]:
    return lambda _task: model.eval()


_TRAIN = {"alone": _alone, "pooled": _pooled, "specialist": _specialist, "federated": _federated}


def _score(models: Models, sites: Sequence[Site], job: Job) -> dict[str, dict[str, Any]]:
    """Where trained → where tested → task and, by arm and measure, a value per test slice."""
    scores: dict[str, dict[str, Any]] = {}
    for origin, network in models.items():
        # A fine-tuned model knows its hospital's tasks alone.
        for site in sites if origin == "all" or "all" not in models else [site for site in sites if site.name == origin]:
            for task in (t for t in job.config.tasks if t in site.data):
                limit = None if origin in ("all", site.name) else CROSS_SLICES
                for name in ("test",) if limit else ("validation", "test"):
                    split = open_split(prepare(site.data[task]), name)
                    scored = list(score_slices(network(task), split, job.config.evaluate, job.device, limit))
                    values = {
                        f"{arm}.{measure}": [getattr(one.arms[arm], f"{measure}_sum") for one in scored if one.arms]
                        for arm in ("input", "restored")
                        for measure in ("psnr", "ssim", "rmse")
                    }
                    scores.setdefault(origin, {}).setdefault(site.name, {"task": task})[name] = values
    return scores
