"""At a hospital with several tasks each task's own parameters move as if the hospital had that task alone."""

from __future__ import annotations

import numpy as np
import torch

from tat_core.config import ModelConfig, PrivacyConfig, TrainConfig
from tat_core.data.prepared import PreparedSplit, StoredCase
from tat_core.dpsgd import PatientSgd
from tat_core.groups import group_of
from tat_core.model.tat import build_model
from tat_core.tasks import TASKS
from tat_core.train import TrainResult, make_optimiser, train

# Patches as large as the slices, the same gradient at every draw, and no schedule: only how often a task was drawn matters.
TRAIN = TrainConfig(patch_size=16, batch_size=2, lr=1e-3, schedule="constant", weight_decay=0.0)
SMALL = ModelConfig(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, tren_features=4, tren_code=8, kernel_init="awake")
Own = dict[str, dict[str, torch.Tensor]]


class Offset(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.zeros(1))

    def forward(self, lq: torch.Tensor) -> torch.Tensor:
        return lq + self.offset


def off_by(task: str, difference: float, patients: int = 1) -> PreparedSplit:
    """Constant images; the high-dose ones are brighter by this much of the range."""
    low, high = TASKS[task].intensity_range
    lq = np.full((1, 16, 16), low + 0.5 * (high - low), np.float32)
    case = np.stack([lq, lq + np.float32(difference * (high - low))])
    return PreparedSplit(TASKS[task], [StoredCase(f"c{i}", f"p{i}", case) for i in range(patients)])


TWO = {"CT": off_by("CT", 0.3), "MRI": off_by("MRI", -0.2)}


def own_offsets(splits: dict[str, PreparedSplit], steps: int) -> tuple[Own, TrainResult]:
    own = {task: {"offset": torch.zeros(1)} for task in splits}
    return own, train(Offset(), splits, TRAIN, rng=np.random.default_rng(0), num_steps=steps, own=own)


def test_tasks_own_parameters_are_not_moved_by_another_tasks_momentum() -> None:
    own, done = own_offsets(TWO, 40)
    for task in TWO:
        steps = done.stats[task].count // TRAIN.batch_size
        alone, _ = own_offsets({task: TWO[task]}, steps)
        assert 0 < steps < 40
        assert torch.equal(own[task]["offset"], alone[task]["offset"])
    assert own["CT"]["offset"] > 0 > own["MRI"]["offset"]


def test_tasks_own_parameters_are_not_moved_by_another_tasks_momentum_with_privacy() -> None:
    patients = {"CT": off_by("CT", 0.3, patients=2), "MRI": off_by("MRI", -0.2, patients=2)}
    start = {
        name: p.detach().clone() for name, p in build_model(SMALL, 0).named_parameters() if group_of(name) == "adapter"
    }  # nothing else is trained, so that the tasks share nothing that moves

    def privately(splits: dict[str, PreparedSplit], steps: int) -> tuple[Own, TrainResult]:
        own = {task: {name: value.clone() for name, value in start.items()} for task in splits}
        private = PatientSgd(PrivacyConfig(enabled=True, groups=("adapter",), noise_multiplier=0.0), 0.0, 1.0)
        rng = np.random.default_rng(0)
        return own, train(build_model(SMALL, 0), splits, TRAIN, rng=rng, num_steps=steps, own=own, private=private)

    own, done = privately(patients, 6)
    for task in patients:
        steps = done.stats[task].count // 2
        alone, _ = privately({task: patients[task]}, steps)
        assert 0 < steps < 6
        for name, value in own[task].items():
            torch.testing.assert_close(value, alone[task][name])
    assert any(not torch.equal(own["CT"][name], own["MRI"][name]) for name in start)


def test_a_state_kept_before_tasks_had_their_own_goes_on() -> None:
    whole = Offset()
    train(whole, {"CT": TWO["CT"]}, TRAIN, rng=np.random.default_rng(0), num_steps=6)
    model = Offset()
    optimiser = make_optimiser(model, TRAIN)
    train(model, {"CT": TWO["CT"]}, TRAIN, rng=np.random.default_rng(0), num_steps=3, optimiser=optimiser)
    own = {"CT": {"offset": model.offset.detach().clone()}}
    train(model, {"CT": TWO["CT"]}, TRAIN, rng=np.random.default_rng(0), num_steps=3, optimiser=optimiser, own=own)
    assert torch.equal(own["CT"]["offset"], whole.offset.detach())
    assert optimiser.state_dict()["state"]["CT"]["offset"]["step"] == 6
