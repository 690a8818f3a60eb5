"""Typed configuration of a run: presets in ``tat_core/conf/*.yaml``, overrides as ``key=value``.

This is what the coordinator's researcher decides. What a hospital decides (paths, tasks it offers, limits) is its ``site.yaml``.
Every value is checked when a configuration is built, so that nothing starts with a wrong one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from tat_core.compose import composed
from tat_core.groups import GROUPS
from tat_core.settings import (
    Config,
    Relations,
    from_plain,
    known_keys,
    setting,
    to_plain,
    unknown_key,
    validate,
)
from tat_core.tasks import TASKS

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class ModelConfig:
    """Size and variants of the TAT network; the defaults are the published ones."""

    dim: int = setting(48, "Channels at full resolution; they double at each of the three coarser levels.", at_least=2)
    num_blocks: tuple[int, int, int, int] = setting((4, 6, 6, 8), "Transformer blocks at each level, finest first.", at_least=1)
    num_refinement_blocks: int = setting(4, "Blocks after the last decoder level, at full resolution.", at_least=0)
    heads: tuple[int, int, int, int] = setting((1, 2, 4, 8), "Attention heads at each level, finest first.", at_least=1)
    ffn_expansion: float = setting(2.66, "Hidden channels of the feed-forward part, as a multiple of its input.", above=0.0)
    tren_features: int = setting(64, "Channels inside the task representation network (TREN).", at_least=1)
    tren_code: int = setting(256, "Length of the code from which every depth-wise kernel is generated.", at_least=1)
    kernel_init: str = setting(
        "published",
        "published: generated kernels start with zero weight; awake: they matter from the first step.",
        choices=("published", "awake"),
    )
    task_code: bool = setting(
        False, "TREN also gets a vector that each task learns of its own (with adapter among federation.task_groups)."
    )
    precision: str = setting(
        "fp32",
        "fp32: exact; bf16: most matrix products in bfloat16, about twice as fast where the processor has it.",
        choices=("fp32", "bf16"),
    )
    checkpointing: bool = setting(False, "Compute every block twice in training instead of keeping its intermediate results.")

    def __post_init__(self) -> None:
        validate(self)

    def relations(self) -> Relations:
        yield "task_code", "false unless model.kernel_init is awake", not self.task_code or self.kernel_init == "awake"
        yield "dim", "even (TREN sees dim / 2 channels)", self.dim % 2 == 0
        for level, heads in enumerate(self.heads):
            channels = self.dim * 2**level
            yield "heads", f"divisors of the levels' channels ({channels} at level {level + 1})", channels % heads == 0


@dataclass(frozen=True)
class TrainConfig:
    """The local training loop."""

    patch_size: int = setting(128, "Side of a square training patch, in pixels.", at_least=16)
    batch_size: int = setting(4, "Patches in one optimiser step.", at_least=1)
    local_steps: int = setting(100, "Optimiser steps that every site takes in a round, whatever its size.", at_least=1)
    step_budget: bool = setting(
        False, "Give a site that is slower than most fewer steps, down to a quarter, and lengthen its update in proportion."
    )
    lr: float = setting(2e-4, "Learning rate of AdamW at the first step.", above=0.0)
    lr_min: float = setting(1e-7, "Learning rate at the last step of a cosine schedule.", at_least=0.0)
    betas: tuple[float, float] = setting(
        (0.9, 0.99), "AdamW's decay rates of the first and second moment.", at_least=0.0, below=1.0
    )
    adam_eps: float = setting(
        1e-8,
        "AdamW's ε; a small network whose output starts small has gradients below the usual 1e-8, and stands still.",
        above=0.0,
    )
    weight_decay: float = setting(1e-4, "AdamW's weight decay.", at_least=0.0)
    schedule: str = setting(
        "cosine", "Learning rate over num_rounds * train.local_steps: cosine or constant.", choices=("cosine", "constant")
    )
    loss: str = setting("balanced", "balanced: L1 weighted by the loss balancer; l1: plain L1.", choices=("balanced", "l1"))
    ema_decay: float = setting(0.999, "Decay per step of the averaged weights; 0 switches them off.", at_least=0.0, below=1.0)
    proximal: float = setting(
        0.0, "FedProx: how strongly local steps are pulled back to the round's model; 0 does not pull.", at_least=0.0
    )
    keep_optimiser: bool = setting(
        True, "Sites go on with the optimiser's state of the round before; otherwise every round starts afresh."
    )
    num_threads: int = setting(1, "CPU threads of one site; part of what makes a run repeat bit for bit.", at_least=1)

    def __post_init__(self) -> None:
        validate(self)

    def relations(self) -> Relations:
        yield "lr_min", f"of at most train.lr = {self.lr}", self.lr_min <= self.lr


@dataclass(frozen=True)
class BalanceConfig:
    """How a task's loss statistics become its weight."""

    kind: str = setting(
        "closed_form",
        "published: the published balancer's network; closed_form: its optimum; famo: FAMO; equal; count: by number of samples.",
        choices=("published", "closed_form", "famo", "equal", "count"),
    )
    smoothing: float = setting(0.5, "Share of the statistics of the rounds before that is kept.", at_least=0.0, below=1.0)
    warmup_rounds: int = setting(5, "Rounds over which shares move from equal ones to the balancer's.", at_least=0)

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class FederationConfig:
    """Rounds at the coordinator."""

    num_sites: int = setting(6, "Hospitals to wait for before the first round.", at_least=1)
    wait_timeout_s: float = setting(120.0, "Longest wait for them, in seconds.", above=0.0)
    round_timeout_s: float = setting(3600.0, "Longest wait for the replies of one round, in seconds.", above=0.0)
    deadline_factor: float = setting(
        3.0, "A round closes after this many times the slowest site's usual duration, given a quorum.", at_least=1.0
    )
    deadline_floor_s: float = setting(60.0, "A round never closes earlier, unless all have replied; in seconds.", above=0.0)
    quorum_per_task: int = setting(1, "Replies of each task that a round waits for beyond its deadline.", at_least=0)
    rejoin_timeout_s: float = setting(
        120.0, "Longest wait for the return of a site that was lost in mid-round or between rounds, in seconds.", at_least=0.0
    )
    patience_s: float = setting(
        86400.0, "How long a run that reaches no site at all goes on trying, in seconds, before it stops.", at_least=0.0
    )
    staleness_weight: float = setting(
        0.0,
        "Share of a reply that came a round late, if its site has no newer one; 0 drops it.",
        at_least=0.0,
        at_most=1.0,
    )
    clip_factor: float = setting(3.0, "An update longer than this many times the usual length is shortened to it.", at_least=1.0)
    refuse_factor: float = setting(100.0, "An update longer than this many times the usual length is refused.", above=1.0)
    max_strikes: int = setting(3, "Refused replies in a row after which a site is left out until it is readmitted.", at_least=1)
    task_groups: tuple[str, ...] = setting(
        ("adapter",),
        "Parameter groups that every task has of its own, averaged over its sites alone; the others are shared by all.",
        choices=GROUPS,
    )
    site_groups: tuple[str, ...] = setting(
        (),
        "Parameter groups that every site has of its own: they never leave it, and the released model lacks them.",
        choices=GROUPS,
    )
    combination: str = setting(
        "shares",
        "shares: weighted mean of the tasks' updates; conflict_averse: CAGrad, turned so that the worst-served task gains too.",
        choices=("shares", "conflict_averse"),
    )
    conflict_aversion: float = setting(
        0.4, "How far from the weighted mean a conflict-averse step may lie, as a share of its length.", at_least=0.0, below=1.0
    )
    update_precision: str = setting(
        "fp32",
        "fp32: updates leave a site exact; bf16: rounded to bfloat16, half of the bytes.",
        choices=("fp32", "bf16"),
    )
    server_optimiser: str = setting(
        "average",
        "average: move by the combined update; momentum: FedAvgM; adam: FedAdam.",
        choices=("average", "momentum", "adam"),
    )
    server_lr: float = setting(1.0, "Share of the combined update that is applied.", above=0.0)
    baseline: bool = setting(
        False, "After the last round every site trains a model of its own once, and the record says who is better off alone."
    )
    fine_tune_steps: int = setting(
        0,
        "After the last round every site fits the released model to its own images, with so many steps, and keeps the result if "
        "it gains 0.1 dB more on its validation patients.",
        at_least=0,
    )
    evaluate_every: int = setting(1, "Rounds from one evaluation on the sites' validation images to the next.", at_least=1)

    def __post_init__(self) -> None:
        validate(self)

    def relations(self) -> Relations:
        yield "site_groups", "none of federation.task_groups", not set(self.site_groups) & set(self.task_groups)


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of the patients (docs/privacy.md); a site's own limits are in its site.yaml."""

    enabled: bool = setting(
        False, "Train by DP-SGD whose example is a patient; train.batch_size is then the expected number of patients in a step."
    )
    epsilon: float = setting(8.0, "Budget of the whole run at every site, from which each derives its noise.", above=0.0)
    delta: float = setting(1e-5, "Probability that the guarantee fails; below 1 / number of patients.", above=0.0, below=1.0)
    noise_multiplier: float | None = setting(
        None, "Noise as a multiple of one patient's largest contribution, instead of epsilon; 0 is no privacy.", at_least=0.0
    )
    clip_norm: float = setting(0.01, "Length to which a patient's gradient is shortened.", above=0.0)
    patches_per_patient: int = setting(1, "Patches averaged into one patient's gradient before it is shortened.", at_least=1)
    groups: tuple[str, ...] = setting(
        GROUPS,
        "Parameter groups that are trained; the others stay as they are. Fewer parameters mean less noise.",
        choices=GROUPS,
    )
    statistics_share: float = setting(
        0.05, "Share of each step's privacy that pays for the loss statistics.", above=0.0, below=1.0
    )

    def __post_init__(self) -> None:
        validate(self)

    def relations(self) -> Relations:
        yield "groups", "one or more groups", len(self.groups) > 0


@dataclass(frozen=True)
class EvaluateConfig:
    """Tiled restoration and how much of the validation set is scored each time."""

    tile_size: int = setting(256, "Side of a tile, in pixels; a smaller image is restored whole.", at_least=16)
    tile_overlap: int = setting(32, "Pixels that neighbouring tiles share.", at_least=0)
    max_validation_slices: int = setting(4, "Validation slices that a site scores in an evaluation.", at_least=1)
    required_gain_db: float | None = setting(
        None, "Mean PSNR gain over the input that every task must reach in a simulation, in dB; null asks for none."
    )

    def __post_init__(self) -> None:
        validate(self)

    def relations(self) -> Relations:
        yield "tile_overlap", f"below evaluate.tile_size = {self.tile_size}", self.tile_overlap < self.tile_size


@dataclass(frozen=True)
class RunConfig:
    """Everything the coordinator decides about a run."""

    name: str = setting("run", "Name of the run, and of its folder.")
    preset: str = setting("paper", "The preset that the run started from; set by choosing the preset, not by an override.")
    output_dir: str = setting("runs", "Folder that holds the folders of the runs.")
    seed: int = setting(42, "Seed of everything random.", at_least=0, below=2**32)
    num_rounds: int = setting(100, "Rounds of training.", at_least=1)
    resume: bool = setting(False, "Go on with the run in the folder, if it holds one, instead of refusing it.")
    tasks: tuple[str, ...] = setting(("CT", "MRI", "PET"), "Restoration tasks to train.", choices=tuple(TASKS))
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        validate(self)

    @property
    def local_steps_in_all(self) -> int:
        """Local steps of a site over all rounds."""
        return self.num_rounds * self.train.local_steps

    def relations(self) -> Relations:
        for key in ("name", "preset"):
            is_safe = _SAFE_NAME.fullmatch(getattr(self, key)) is not None
            yield key, "1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit", is_safe
        yield "output_dir", "a folder", bool(self.output_dir.strip())
        yield "tasks", "one or more tasks, none twice", 0 < len(self.tasks) == len(set(self.tasks))


def load_config(preset: str, overrides: Sequence[str] | str = ()) -> RunConfig:
    """Resolve a preset and its overrides into a checked configuration.

    Parameters
    ----------
    preset : str
        One of `preset_names`.
    overrides : sequence of str, or str
        ``key=value`` items, keys dotted (``train.lr=1e-3``), tuples as ``[1,2,4,8]``; one string is split as a shell would. The
        last one wins. Interpolation (``${...}``) is refused: a site resolves what the coordinator wrote, and must not read its
        own environment into a run.

    Returns
    -------
    RunConfig
        With `RunConfig.preset` set to `preset`.

    Raises
    ------
    ValueError
        Unknown preset or key, wrong type, or a value out of range; the message names the key.
    """
    if preset not in preset_names():
        raise ValueError(f"config: expected a preset among {', '.join(preset_names())}, got {preset!r}; choose one of them")
    items = _split_overrides(overrides)
    for item in items:
        _check_override(item, preset)
    return replace(config_from_dict(composed(RunConfig, preset, items)), preset=preset)


def preset_names() -> tuple[str, ...]:
    """Names of the presets that come with the package, sorted."""
    files = resources.files("tat_core.conf").iterdir()
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in files if entry.name.endswith(".yaml")))


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain dicts, lists, numbers and strings, fit for JSON or YAML."""
    return to_plain(config)


def config_from_dict(values: Mapping[str, Any], kind: type[Config] = RunConfig) -> Config:  # type: ignore[assignment]
    """Build a configuration dataclass from what `config_to_dict` gave, also after a trip through JSON or YAML.

    Parameters
    ----------
    values : mapping
        A key that is absent takes its default, so that a file written before the key existed still loads.
    kind : type, optional
        `RunConfig` or one of its sections.

    Raises
    ------
    ValueError
        Unknown key, wrong type, or a value out of range; the message names the key.
    """
    return from_plain(values, kind)


def _split_overrides(overrides: Sequence[str] | str) -> list[str]:
    if not isinstance(overrides, str):
        return [str(item) for item in overrides]
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise ValueError(
            f"config: expected overrides like 'key=value key=value', got {overrides!r} ({error}); close it"
        ) from None


def _check_override(item: str, preset: str) -> None:
    key, equals, value = item.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ValueError(f"config: expected key=value, got {item!r}; see the keys with 'tat config show {preset}'")
    if "${" in value:
        raise ValueError(f"config: expected a plain value for {key}, got {value!r}; write the value itself")
    known = known_keys(RunConfig)
    if any(name.startswith(key + ".") for name in known):
        inner = next(name for name in known if name.startswith(key + "."))
        raise ValueError(f"config: expected a single setting, got the section {key!r}; set its keys, such as {inner}=...")
    if key not in known:
        raise unknown_key(key, known)
    if key == "preset" and value != preset:
        raise ValueError(f"config: expected preset {preset!r} to stand, got {item!r}; name the preset once")
