"""DP-SGD whose example is a patient (Abadi et al., arXiv:1607.00133): what a step learns of one patient is bounded and noised.

A step samples every patient of the site with the same probability, takes the gradient of a few random patches of each, shortens
it to ``clip_norm``, adds them up, and adds Gaussian noise. The loss statistics that the coordinator balances the tasks with are
extra entries of the same vector, so that one Gaussian release a step is all that is ever accounted for. Validation scores are not
released at all: a hospital's few validation patients would need noise far above the differences that the scores are for.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch

from tat_core.config import PrivacyConfig, RunConfig
from tat_core.data.patches import sample_patient
from tat_core.data.prepared import PreparedSplit
from tat_core.groups import group_of
from tat_core.loss import TaskStats, per_sample_l1
from tat_core.privacy import noise_multiplier_for
from tat_core.sample_gradients import per_sample_gradients

log = logging.getLogger("fed_tat.site")

# Largest L1 of images in 0..1 that the statistics count in full: ten times what a usable network has.
_LARGEST_L1 = 0.1
# What is reported of a patch, as multiples of these: L1(lq, hq), L1(lq, restored), L1(restored, hq) and the last one's square.
_SCALES = np.array([_LARGEST_L1, _LARGEST_L1, _LARGEST_L1, _LARGEST_L1**2])
_LENGTH = math.sqrt(len(_SCALES))
_TOGETHER = 8  # patches whose gradients are in memory at a time

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
        self, model: torch.nn.Module, splits: Mapping[str, PreparedSplit], patch_size: int, device: str = "cpu"
    ) -> None:
        """Write one step's noisy mean gradient of the L1 to ``.grad`` of the trained parameters.

        Parameters
        ----------
        model : torch.nn.Module
        splits : mapping of task name to PreparedSplit
            The patients to sample from: all of the site's, or those of the task whose turn it is.
        patch_size : int
        device : str

        Raises
        ------
        ValueError
            A parameter that is to be trained has no influence on the loss: its gradient could not be bounded. Or no patient.
        """
        parameters = {name: p for name, p in model.named_parameters() if group_of(name) in self._config.groups}
        sizes = [p.numel() for p in parameters.values()]
        size, share, bound = sum(sizes), self._config.statistics_share, self._config.clip_norm
        patients = sorted({patient for split in splits.values() for patient in split.slices_by_patient})
        if not patients:
            raise ValueError("privacy: expected at least one patient of every task, got none; check splits.json")
        rng = np.random.default_rng(int.from_bytes(self._random_bytes(32)))
        sampled = [patient for patient, u in zip(patients, rng.random(len(patients)), strict=True) if u < self.sample_rate]
        # One vector is released: gradient, then statistics. A patient's part of it is no longer than 1.
        total = torch.zeros(size + len(_SCALES) * len(splits), device=device)
        together = max(1, _TOGETHER // self._config.patches_per_patient)
        for first in range(0, len(sampled), together):
            gradients, statistics = self._contributions(
                model, list(parameters), splits, sampled[first : first + together], patch_size, rng, device
            )
            total[:size] += _shortened_sum(gradients, bound) * (math.sqrt(1 - share) / bound)
            total[size:] += _shortened_sum(statistics, _LENGTH) * (math.sqrt(share) / _LENGTH)
        if self.noise_multiplier:
            noise = torch.from_numpy(standard_normal(len(total), self._random_bytes)).to(device)
            total.add_(noise, alpha=self.noise_multiplier)
        self._keep_statistics(total[size:].cpu().double().numpy() * (_LENGTH / math.sqrt(share)), splits)
        mean = total[:size] * (bound / math.sqrt(1 - share) / (self.sample_rate * len(patients)))
        for parameter, part in zip(parameters.values(), mean.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def statistics(self, count_in_all: int) -> dict[str, TaskStats]:
        """Noisy statistics of all steps so far, brought back into the range that they can have.

        The gradient's length is not among them: after clipping it says little.

        Parameters
        ----------
        count_in_all : int
            How many samples the run asks for, as if the site had them; the tasks get equal parts. How many patients a site has,
            of which task, and how many were really sampled does not leave it.
        """
        stats = {}
        for task, sums in self._sums.items():
            count = max(1, count_in_all // len(self._sums))
            # A loss of zero would mean an endless weight to the balancer.
            scaled = np.clip(sums / self._expected[task], 1e-3 * _SCALES, _SCALES) * count
            stats[task] = TaskStats(count, *scaled.tolist())
        return stats

    def _contributions(
        self,
        model: torch.nn.Module,
        names: list[str],
        splits: Mapping[str, PreparedSplit],
        patients: list[str],
        patch_size: int,
        rng: np.random.Generator,
        device: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each patient's mean over its patches: gradients (P, parameters) and scaled statistics (P, tasks · 4)."""
        count = self._config.patches_per_patient
        batches = [sample_patient(splits, patient, count, patch_size, rng) for patient in patients]
        lq, hq = (torch.cat([getattr(batch, side) for batch in batches]).to(device) for side in ("lq", "hq"))
        seen: list[torch.Tensor] = []

        def loss_of(restored: torch.Tensor) -> torch.Tensor:
            loss = per_sample_l1(restored, hq)
            three = (per_sample_l1(lq, hq), per_sample_l1(lq, restored.detach()), loss.detach())
            seen.append(torch.stack((*three, three[2].square()), 1))
            return loss

        by_name = per_sample_gradients(model, lq, loss_of, names)
        gradients = torch.cat([by_name.pop(name).flatten(1) for name in names], 1)
        belongs = torch.tensor([[task == own for task in sorted(splits)] for batch in batches for own in batch.tasks])
        values = seen[0] / torch.from_numpy(_SCALES).to(seen[0])
        statistics = (belongs.to(values)[:, :, None] * values[:, None, :]).flatten(1)
        return _mean_of_each(gradients, count), _mean_of_each(statistics, count)

    def _keep_statistics(self, released: np.ndarray, splits: Mapping[str, PreparedSplit]) -> None:
        for task, sums in zip(sorted(splits), released.reshape(-1, len(_SCALES)) * _SCALES, strict=True):
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
        sigma = noise_multiplier_for(privacy.epsilon, privacy.delta, rate, config.local_steps_in_all)
    return PatientSgd(privacy, sigma, rate, random_bytes)


def _mean_of_each(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(P · count, n) → (P, n)."""
    return rows if count == 1 else rows.unflatten(0, (-1, count)).mean(1)


def _shortened_sum(rows: torch.Tensor, bound: float) -> torch.Tensor:
    """Sum of the rows (P, n), each shortened to `bound`; one that is not finite counts as zero and stops nothing."""
    lengths = rows.norm(dim=1)
    if not bool(lengths.isfinite().all()):
        log.warning("a patient's gradient is not finite and counts as zero")
        rows = torch.where(lengths.isfinite()[:, None], rows, 0.0)
        lengths = rows.norm(dim=1)
    return (bound / lengths.clamp_min(bound)) @ rows


def standard_normal(count: int, random_bytes: RandomBytes = os.urandom) -> np.ndarray:
    """Independent standard normal float32 numbers made from random bytes (Box and Muller), without any seed.

    torch's generator on the CPU keeps 32 bits of its seed, few enough to be tried one by one until the noise is found.
    """
    half = (count + 1) // 2
    bits = np.frombuffer(random_bytes(8 * half), np.uint32).astype(np.float32)
    radius = np.sqrt(-2 * np.log((bits[:half] + 1) * np.float32(2**-32)))
    angle = bits[half:] * np.float32(2 * math.pi * 2**-32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
