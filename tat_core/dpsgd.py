"""DP-SGD whose example is a patient (Abadi et al., arXiv:1607.00133): what one step may learn of one patient is bounded and noised.

A step samples every patient of the site with the same probability, takes the gradient of a few random patches of each, shortens
it to ``clip_norm``, adds them up, and adds Gaussian noise. The loss statistics that the coordinator balances the tasks with are
extra entries of the same vector, so that one Gaussian release a step is all that is ever accounted for. Validation scores are not
released at all: a hospital's few validation patients would need noise far above the differences that the scores are for.

Patients are taken one at a time, by plain backward passes: no layer needs a rule of its own, none can be forgotten, and on a CPU
it is the fastest of the ways that were measured (docs/results/privacy.md).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch

from tat_core.config import PrivacyConfig, RunConfig, TrainConfig
from tat_core.data.patches import sample_patient
from tat_core.data.prepared import PreparedSplit
from tat_core.groups import group_of
from tat_core.loss import TaskStats, count_by_task, objective, per_sample_l1
from tat_core.privacy import noise_multiplier_for

log = logging.getLogger("fed_tat.site")

# Largest value of a statistic, an L1 of images in 0..1, that counts in full: ten times what a usable network has.
_LARGEST_L1 = 0.1
_SCALES = (_LARGEST_L1, _LARGEST_L1, _LARGEST_L1, _LARGEST_L1**2)  # of the sums of TaskStats, in order
_LENGTH = math.sqrt(len(_SCALES))

RandomBytes = Callable[[int], bytes]


class PatientSgd:
    """The gradients of one site's steps, and afterwards their statistics; both may leave the site.

    Parameters
    ----------
    config : PrivacyConfig
    noise_multiplier : float
        Standard deviation of the noise, as a multiple of the largest contribution of a patient to a step's release.
    sample_rate : float
        Probability with which each patient is in a step.
    random_bytes : callable
        Number of bytes → that many random ones: all of the sampling and noise. A coordinator that could predict them could
        subtract the noise, so that only tests give other ones than the operating system's.
    """

    def __init__(
        self, config: PrivacyConfig, noise_multiplier: float, sample_rate: float, random_bytes: RandomBytes = os.urandom
    ) -> None:
        self.noise_multiplier, self.sample_rate = noise_multiplier, sample_rate
        self._config, self._random_bytes = config, random_bytes
        self._sums: dict[str, np.ndarray] = {}
        self._expected: dict[str, float] = {}

    def set_gradients(
        self, model: torch.nn.Module, splits: Mapping[str, PreparedSplit], train: TrainConfig, device: str = "cpu"
    ) -> None:
        """Write one step's noisy mean gradient to ``.grad`` of the trained parameters, and none to the others'.

        Parameters
        ----------
        model : torch.nn.Module
        splits : mapping of task name to PreparedSplit
            The patients to sample from: all of the site's, or those of the task whose turn it is.
        train : TrainConfig
            Patch size and loss.
        device : str

        Raises
        ------
        ValueError
            A parameter that is to be trained has no influence on a patient's loss: its gradient could not be bounded.
        """
        parameters = {name: p for name, p in model.named_parameters() if group_of(name) in self._config.groups}
        size = sum(p.numel() for p in parameters.values())
        patients = sorted({patient for split in splits.values() for patient in split.slices_by_patient})
        rng = np.random.default_rng(int.from_bytes(self._random_bytes(32)))
        # One vector is released: gradient entries, then statistics. Each part's length is at most the root of its share.
        gradient_unit = self._config.clip_norm / math.sqrt(1 - self._config.statistics_share)
        statistics_unit = _LENGTH / math.sqrt(self._config.statistics_share)
        total = torch.zeros(size + len(_SCALES) * len(splits), device=device)
        for patient in (p for p, u in zip(patients, rng.random(len(patients)), strict=True) if u < self.sample_rate):
            gradient, statistics = self._of_patient(model, parameters, splits, patient, train, rng, device)
            length = float(gradient.norm())
            if not math.isfinite(length):
                log.warning("a patient's gradient is not finite and counts as zero")
                continue
            total[:size].add_(gradient, alpha=min(1.0, self._config.clip_norm / max(length, 1e-30)) / gradient_unit)
            excess = max(1.0, float(statistics.norm()) / _LENGTH)
            total[size:] += statistics / (excess * statistics_unit)
        if self.noise_multiplier:
            noise = torch.from_numpy(standard_normal(len(total), self._random_bytes)).to(device)
            total.add_(noise, alpha=self.noise_multiplier)
        self._keep_statistics(total[size:].cpu().double().numpy() * statistics_unit, splits)
        mean = total[:size] * (gradient_unit / (self.sample_rate * len(patients)))
        model.zero_grad(set_to_none=True)
        for parameter, part in zip(parameters.values(), mean.split([p.numel() for p in parameters.values()]), strict=True):
            parameter.grad = part.view_as(parameter)

    def statistics(self) -> dict[str, TaskStats]:
        """Noisy statistics of all steps so far, brought back into the range that they can have.

        The count is the expected one: how many patients were really sampled is nobody's business.
        """
        stats = {}
        for task, sums in self._sums.items():
            count = max(1, round(self._expected[task]))
            # A loss of zero would mean an endless weight to the balancer.
            scaled = np.clip(sums / self._expected[task], [1e-3 * scale for scale in _SCALES], _SCALES) * count
            stats[task] = TaskStats(count, *scaled.tolist())
        return stats

    def _of_patient(
        self,
        model: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        splits: Mapping[str, PreparedSplit],
        patient: str,
        train: TrainConfig,
        rng: np.random.Generator,
        device: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A patient's gradient, flat, and statistics by task, as multiples of their scales."""
        count = self._config.patches_per_patient
        batch = sample_patient(splits, patient, count, train.patch_size, rng)
        lq, hq = batch.lq.to(device), batch.hq.to(device)
        restored = model(lq)
        loss = per_sample_l1(restored, hq)
        gradient = patient_gradient(objective(loss, train.loss), parameters)
        seen = count_by_task(batch.tasks, lq, restored.detach(), hq, loss.detach())
        values = [
            value / (count * scale)
            for stats in (seen.get(task, TaskStats()) for task in sorted(splits))
            for value, scale in zip(
                (stats.input_sum, stats.change_sum, stats.loss_sum, stats.loss_square_sum), _SCALES, strict=True
            )
        ]
        return gradient, torch.tensor(values, device=device)

    def _keep_statistics(self, released: np.ndarray, splits: Mapping[str, PreparedSplit]) -> None:
        for number, task in enumerate(sorted(splits)):
            sums = released[len(_SCALES) * number :][: len(_SCALES)] * _SCALES
            self._sums[task] = self._sums.get(task, 0.0) + sums
            self._expected[task] = self._expected.get(task, 0.0) + self.sample_rate * splits[task].num_patients


def patient_sgd(config: RunConfig, splits: Mapping[str, PreparedSplit], random_bytes: RandomBytes = os.urandom) -> PatientSgd:
    """DP-SGD for a site: its number of patients decides the sampling, and with the run's budget and length the noise.

    Parameters
    ----------
    config : RunConfig
    splits : mapping of task name to PreparedSplit
        All of the site's training slices; a patient with images of several tasks is one patient.
    random_bytes : callable
        See `PatientSgd`.

    Raises
    ------
    ValueError
        No patient, or so many that δ is not below one over their number.
    """
    privacy = config.privacy
    patients = {patient for split in splits.values() for patient in split.slices_by_patient}
    if not 0 < len(patients) < 1 / privacy.delta:
        raise ValueError(
            f"privacy: expected at least one patient and privacy.delta below 1 / patients, got delta {privacy.delta} "
            "and a number of patients that it does not fit; lower privacy.delta"
        )
    rate = min(1.0, config.train.batch_size / len(patients))
    sigma = privacy.noise_multiplier
    if sigma is None:
        sigma = noise_multiplier_for(privacy.epsilon, privacy.delta, rate, config.num_rounds * config.train.local_steps)
    return PatientSgd(privacy, sigma, rate, random_bytes)


def patient_gradient(loss: torch.Tensor, parameters: Mapping[str, torch.nn.Parameter]) -> torch.Tensor:
    """The gradient of one patient's loss, flat, in the parameters' order.

    Raises
    ------
    ValueError
        The loss does not depend on one of the parameters.
    """
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"privacy: expected a gradient for every trained parameter, got none for {name}; "
                "leave its group out of privacy.groups"
            )
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def standard_normal(count: int, random_bytes: RandomBytes = os.urandom) -> np.ndarray:
    """Independent standard normal float32 numbers made from random bytes (Box and Muller), without any seed.

    torch's generator on the CPU keeps 32 bits of its seed, few enough to be tried one by one until the noise is found.
    """
    half = (count + 1) // 2
    bits = np.frombuffer(random_bytes(8 * half), np.uint32).astype(np.float32)
    radius = np.sqrt(-2 * np.log((bits[:half] + 1) * np.float32(2**-32)))
    angle = bits[half:] * np.float32(2 * math.pi * 2**-32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
