"""Typed configuration of a run. The sole importer of hydra."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """Size and variants of the TAT network; the defaults are the published ones."""

    dim: int = 48
    num_blocks: tuple[int, int, int, int] = (4, 6, 6, 8)
    num_refinement_blocks: int = 4
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    ffn_expansion: float = 2.66
    tren_features: int = 64
    tren_code: int = 256
    kernel_init: str = "published"  # published: generated kernels start at zero weight; awake: they matter from the first step


@dataclass(frozen=True)
class TrainConfig:
    """The local training loop."""

    patch_size: int = 128
    batch_size: int = 4
    local_steps: int = 100
    lr: float = 2e-4
    lr_min: float = 1e-7
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    schedule: str = "cosine"  # over num_rounds * local_steps; or constant
    loss: str = "balanced"  # balanced | l1
    ema_decay: float = 0.999  # 0 switches it off
    num_threads: int = 1


@dataclass(frozen=True)
class BalanceConfig:
    """How a task's loss statistics become its weight."""

    kind: str = "closed_form"  # closed_form | published | equal | count
    smoothing: float = 0.5


@dataclass(frozen=True)
class FederationConfig:
    """Rounds at the coordinator."""

    num_sites: int = 6
    wait_timeout_s: float = 120.0
    round_timeout_s: float = 3600.0
    server_lr: float = 1.0
    evaluate_every: int = 1


@dataclass(frozen=True)
class EvaluateConfig:
    """Tiled restoration and how much of the validation set is scored each time."""

    tile_size: int = 256
    tile_overlap: int = 32
    max_validation_slices: int = 4


@dataclass(frozen=True)
class RunConfig:
    """Everything the coordinator decides about a run."""

    name: str = "run"
    preset: str = "paper"
    output_dir: str = "runs"
    seed: int = 42
    num_rounds: int = 100
    tasks: tuple[str, ...] = ("CT", "MRI", "PET")
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
