"""What one step may learn of one patient: the gradients, their bound, the noise, and what is done when something is missing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tat_core.config import ModelConfig, PrivacyConfig, TrainConfig, load_config
from tat_core.data.patches import sample_patient
from tat_core.data.prepared import PreparedSplit, StoredCase
from tat_core.dpsgd import PatientSgd, patient_sgd, standard_normal
from tat_core.groups import group_of
from tat_core.loss import per_sample_l1
from tat_core.model.tat import TAT, build_model
from tat_core.sample_gradients import per_sample_gradients
from tat_core.tasks import TASKS
from tat_core.train import train

SMALL = ModelConfig(
    dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, tren_features=4, tren_code=8, kernel_init="awake", task_code=True
)
# One patch as large as the slice, so that a patient's gradient does not depend on where it was cropped.
TRAIN = TrainConfig(patch_size=24, batch_size=3, local_steps=2, lr=1e-3)
UNBOUNDED = PrivacyConfig(enabled=True, clip_norm=1e12, noise_multiplier=0.0)


def patients(task: str, count: int, seed: int = 0) -> PreparedSplit:
    """A split of patients with one slice each."""
    rng = np.random.default_rng(seed)
    low, high = TASKS[task].intensity_range
    arrays = [(low + (high - low) * rng.random((2, 1, 24, 24))).astype(np.float32) for _ in range(count)]
    return PreparedSplit(TASKS[task], [StoredCase(f"{task}-{i}", f"patient-{i}", array) for i, array in enumerate(arrays)])


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def images_of(split: PreparedSplit) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    batches = [sample_patient({split.task.name: split}, patient, 1, 24, rng) for patient in split.slices_by_patient]
    return torch.cat([b.lq for b in batches]), torch.cat([b.hq for b in batches])


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(16, 40),
    width=st.integers(16, 40),
    dim=st.sampled_from([8, 16]),
    heads=st.sampled_from([(1, 2, 4, 8), (2, 1, 1, 2)]),
    blocks=st.sampled_from([(1, 1, 1, 1), (2, 1, 1, 2)]),
    start=st.sampled_from(["published", "awake"]),
)
def test_each_samples_gradient_is_the_one_it_has_alone_for_every_parameter(
    batch, height, width, dim, heads, blocks, start
) -> None:
    config = replace(SMALL, dim=dim, heads=heads, num_blocks=blocks, kernel_init=start, task_code=start == "awake")
    model = build_model(config, seed=1).double()
    lq, hq = torch.rand(2, batch, 1, height, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    found = per_sample_gradients(model, lq, lambda restored: per_sample_l1(restored, hq), names)
    for b in range(batch):
        model.zero_grad()
        per_sample_l1(model(lq[b : b + 1]), hq[b : b + 1]).sum().backward()
        for name, parameter in model.named_parameters():
            assert found[name][b].shape == parameter.shape, name
            assert (found[name][b] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-14, name


def test_in_bf16_and_with_checkpointing_the_samples_gradients_add_up_to_the_batchs() -> None:
    lq, hq = torch.rand(2, 3, 1, 24, 24, generator=torch.Generator().manual_seed(2))
    model = build_model(replace(SMALL, precision="bf16", checkpointing=True), seed=1)
    names = [name for name, _ in model.named_parameters()]
    found = per_sample_gradients(model, lq, lambda restored: per_sample_l1(restored, hq), names)
    per_sample_l1(model(lq), hq).sum().backward()
    together = torch.cat([found[name].sum(0).flatten() for name in names])
    assert (together - flat(model)).norm() <= 0.02 * together.norm()


def test_without_noise_and_bound_a_step_is_the_mean_gradient_of_the_sampled_patients() -> None:
    split = patients("CT", 5)
    model = build_model(SMALL, seed=1)
    PatientSgd(UNBOUNDED, 0.0, 1.0).set_gradients(model, {"CT": split}, TRAIN.patch_size)
    private = flat(model)
    lq, hq = images_of(split)
    model.zero_grad()
    per_sample_l1(model(lq), hq).mean().backward()
    assert (private - flat(model)).norm() <= 1e-4 * private.norm()


@pytest.mark.parametrize("clip_norm", [1e-3, 1.0])
def test_one_patient_more_changes_a_step_by_at_most_the_bound(clip_norm: float) -> None:
    config = PrivacyConfig(enabled=True, clip_norm=clip_norm, noise_multiplier=0.0)
    model = build_model(SMALL, seed=1)
    sums = []
    for count in (3, 4):
        PatientSgd(config, 0.0, 1.0).set_gradients(model, {"CT": patients("CT", count)}, TRAIN.patch_size)
        sums.append(flat(model) * count)
    change = float((sums[1] - sums[0]).norm())
    assert 0 < change <= clip_norm * (1 + 1e-4)
    if clip_norm < 0.1:
        assert change > 0.99 * clip_norm  # these gradients are longer than that


def test_the_noise_has_the_size_that_is_accounted_for() -> None:
    """Nobody sampled: what is left is noise. Gradient and statistics share one release, as statistics_share says."""
    config = PrivacyConfig(enabled=True, clip_norm=0.5, noise_multiplier=2.0, statistics_share=0.2)
    model = build_model(SMALL, seed=1)
    private = PatientSgd(config, 2.0, 1e-9)
    private.set_gradients(model, {"CT": patients("CT", 4)}, TRAIN.patch_size)
    noise = flat(model) * (1e-9 * 4)
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / math.sqrt(0.8), rel=0.02)
    assert abs(float(noise.mean())) < 5 * float(noise.std()) / math.sqrt(len(noise))


def test_an_empty_step_still_moves_the_model_by_noise_alone() -> None:
    split = patients("CT", 4)
    model = build_model(SMALL, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    private = PatientSgd(PrivacyConfig(enabled=True, noise_multiplier=1.0), 1.0, 1e-9)
    result = train(model, {"CT": split}, TRAIN, rng=np.random.default_rng(0), num_steps=2, private=private)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert result.stats["CT"].count == 2 * TRAIN.batch_size


def test_groups_that_are_not_trained_stay_to_the_bit() -> None:
    model = build_model(SMALL, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = PrivacyConfig(enabled=True, noise_multiplier=1.0, groups=("adapter",))
    train(
        model, {"CT": patients("CT", 4)}, TRAIN, rng=np.random.default_rng(0), num_steps=2, private=PatientSgd(config, 1.0, 0.5)
    )
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) == (group_of(name) != "adapter"), name


class FixedKernels(TAT):
    """A network whose hypernetwork takes no part."""

    def forward(self, lq: torch.Tensor, kernels=None) -> torch.Tensor:
        generated = self.tren(self.deepest_features(lq))
        return super().forward(lq, {level: (a.detach(), f.detach()) for level, (a, f) in generated.items()})


def test_a_parameter_without_a_gradient_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"got none for tren\.\S+; leave its group out"):
        PatientSgd(UNBOUNDED, 0.0, 1.0).set_gradients(FixedKernels(SMALL), {"CT": patients("CT", 2)}, TRAIN.patch_size)
    config = replace(UNBOUNDED, groups=("backbone", "adapter"))
    without_code = FixedKernels(replace(SMALL, task_code=False))
    PatientSgd(config, 0.0, 1.0).set_gradients(without_code, {"CT": patients("CT", 2)}, TRAIN.patch_size)


class ScaledLinear(torch.nn.Linear):
    """A layer that nobody wrote a rule for."""


def test_a_layer_without_a_rule_is_an_error_that_names_it() -> None:
    model = build_model(SMALL, seed=1)
    first = model.tren.mlp[0]
    model.tren.mlp[0] = ScaledLinear(first.in_features, first.out_features, bias=False)
    with pytest.raises(ValueError, match=r"expected a rule for tren\.mlp\.0 \(ScaledLinear\), got none"):
        PatientSgd(UNBOUNDED, 0.0, 1.0).set_gradients(model, {"CT": patients("CT", 2)}, TRAIN.patch_size)


def test_a_patient_whose_gradient_is_not_finite_counts_as_zero() -> None:
    split = patients("CT", 3)
    broken = [replace(case, array=case.array * np.float32("nan")) if i == 0 else case for i, case in enumerate(split.cases)]
    model = build_model(SMALL, seed=1)
    PatientSgd(UNBOUNDED, 0.0, 1.0).set_gradients(model, {"CT": PreparedSplit(split.task, broken)}, TRAIN.patch_size)
    with_broken = flat(model) * 3
    PatientSgd(UNBOUNDED, 0.0, 1.0).set_gradients(model, {"CT": PreparedSplit(split.task, split.cases[1:])}, TRAIN.patch_size)
    assert torch.allclose(with_broken, flat(model) * 2, rtol=1e-3, atol=1e-6)


def test_a_patient_with_images_of_two_tasks_is_one_patient() -> None:
    """CT and PET of the same three people: sampled together, three contributions, not six."""
    splits = {"CT": patients("CT", 3, seed=1), "PET": patients("PET", 3, seed=2)}
    config = load_config("smoke", ["privacy.enabled=true", "privacy.noise_multiplier=0", "train.batch_size=3"])
    private = patient_sgd(config, splits)
    assert private.sample_rate == 1.0
    model = build_model(SMALL, seed=1)
    bound = replace(config.privacy, clip_norm=1e-3)
    PatientSgd(bound, 0.0, 1.0).set_gradients(model, splits, TRAIN.patch_size)
    assert float(flat(model).norm()) * 3 <= 3 * 1e-3 * (1 + 1e-5)


def test_statistics_without_noise_are_the_exact_ones() -> None:
    split = patients("CT", 3)
    near = PreparedSplit(split.task, [replace(c, array=np.stack([c.array[0], c.array[0] + 80])) for c in split.cases])
    model = build_model(SMALL, seed=1)
    private = PatientSgd(UNBOUNDED, 0.0, 1.0)
    private.set_gradients(model, {"CT": near}, TRAIN.patch_size)
    lq, hq = images_of(near)
    stats = private.statistics(3)["CT"]
    assert stats.count == 3
    assert stats.mean_input == pytest.approx(float(per_sample_l1(lq, hq).mean()), rel=1e-4)


def test_counts_say_nothing_of_how_many_patients_a_site_has() -> None:
    config = load_config("smoke", ["privacy.enabled=true", "privacy.noise_multiplier=1", "train.batch_size=3"])
    counts = []
    for number in (1, 2, 7):  # fewer than are asked for, and more
        splits = {"CT": patients("CT", number), "MRI": patients("MRI", 2)}
        private = patient_sgd(config, splits)
        done = train(build_model(SMALL, seed=1), splits, config.train, rng=np.random.default_rng(0), num_steps=2, private=private)
        counts.append({task: stats.count for task, stats in done.stats.items()})
    assert counts == [{"CT": 3, "MRI": 3}] * 3


def test_noise_is_standard_normal_and_never_the_same() -> None:
    from scipy import stats

    values = standard_normal(200_001)
    assert values.shape == (200_001,)
    assert values.dtype == np.float32
    assert stats.kstest(values, "norm").pvalue > 1e-6
    assert not np.array_equal(values[:100], standard_normal(100))
    assert np.isfinite(standard_normal(10, lambda count: b"\xff" * count)).all()
    assert np.isfinite(standard_normal(10, lambda count: b"\0" * count)).all()


def test_a_delta_that_one_patient_would_use_up_is_refused() -> None:
    config = load_config("smoke", ["privacy.enabled=true", "privacy.delta=0.3"])
    with pytest.raises(ValueError, match=r"delta below 1 / patients"):
        patient_sgd(config, {"CT": patients("CT", 4)})
