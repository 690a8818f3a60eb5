"""The patients of each demonstration hospital: real sample images with a simulated low-quality side, or synthetic PET."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulations import sources
from simulations.synthetic_pet import attenuation_from_hu, attenuation_of_head, brain_activity, trunk_activity
from tat_core.data.degrade import ct_low_dose, mri_super_resolution
from tat_core.data.degrade_pet import PetScanner, pet_low_count
from tat_core.data.volume import Volume
from tat_core.tasks import CT, MRI

# (case, split, first slice, one past the last): contiguous blocks with at least one slice left out between two splits
Blocks = tuple[tuple[str, str, int, int], ...]


@dataclass(frozen=True)
class Patient:
    """One person's (or phantom's) images: both sides on one grid and how the slices are shared among the splits."""

    name: str
    lq: Volume
    hq: Volume
    blocks: Blocks


Made = tuple[list[Patient], dict[str, Any]]  # patients and the parameters of the degradation


def _ct(source: str, dose_fraction: float, photons: float, blocks: Blocks, smoke: bool, rng: np.random.Generator) -> Made:
    factor = 6 if smoke else 1
    hq = sources.shrink(sources.load(source, CT), factor)
    settings: dict[str, Any] = {
        "dose_fraction": dose_fraction,
        "photons": photons / 12 if smoke else photons,
        "electronic_noise": 10.0,
    }
    settings |= {"views": 720, "path_length_size": 128}
    lq = ct_low_dose(sources.slices_of(hq), hq.spacing_mm[0], rng=rng, **settings)
    patient = Patient("patient-1", sources.with_slices(hq, lq), hq, blocks)
    return [patient], {"method": "noise inserted in the sinogram, filtered back-projection (Hann)", **settings}


def ct_abdomen(smoke: bool, rng: np.random.Generator) -> Made:
    blocks = (("abdomen-a", "train", 0, 12), ("abdomen-b", "validation", 13, 15), ("abdomen-c", "test", 16, 20))
    return _ct("ct_abdomen", 0.25, 1e6, blocks, smoke, rng)


def ct_chest(smoke: bool, rng: np.random.Generator) -> Made:
    blocks = (("chest-a", "train", 0, 9), ("chest-b", "validation", 10, 12), ("chest-c", "test", 13, 16))
    return _ct("ct_chest.nii.gz", 0.20, 1.5e5, blocks, smoke, rng)


def _mri(
    name: str, source: str, blocks: Blocks, noise_std: float, smoke: bool, rng: np.random.Generator, cut: slice = slice(None)
) -> tuple[Patient, float]:
    raw = sources.shrink(
        sources.cut(sources.load(source, MRI), cut.start or 0, cut.stop or 999, cut.step or 1), 3 if smoke else 1
    )
    gain = 3500.0 / float(np.percentile(raw.voxels, 99.9))  # scanner units are arbitrary: fill the task's range
    hq = sources.with_slices(raw, np.rint(sources.slices_of(raw) * gain).clip(0, 4095))
    lq = sources.with_slices(hq, mri_super_resolution(sources.slices_of(hq), 4, noise_std, rng))
    return Patient(name, lq, hq, blocks), gain


MRI_METHOD = "central 1/4 x 1/4 of k-space with complex noise, zero-filled, magnitude"


def mri_pd(smoke: bool, rng: np.random.Generator) -> Made:
    noise_std = 120.0
    blocks = (("brain-a", "validation", 0, 2), ("brain-b", "train", 3, 14), ("brain-c", "test", 15, 19))
    patient, gain = _mri("patient-1", "mr_brain_pd", blocks, noise_std, smoke, rng)
    return [patient], {"method": MRI_METHOD, "factor": 4, "noise_std": noise_std, "intensity_gain": {"patient-1": gain}}


def mri_t1(smoke: bool, rng: np.random.Generator) -> Made:
    noise_std = 150.0
    # Trained on the template, a network makes the real patient worse (-1.6 dB): an average of many brains has no fine detail.
    template_blocks, person_blocks = (("template", "test", 0, 20),), (("patient-1", "train", 0, 24),)
    template, template_gain = _mri("template", "mni_icbm152_t1.nii.gz", template_blocks, noise_std, smoke, rng, slice(28, 148, 6))
    person, person_gain = _mri("patient-1", "mr_brain_t1c.nii.gz", person_blocks, noise_std, smoke, rng)
    gains = {"template": template_gain, "patient-1": person_gain}
    return [template, person], {"method": MRI_METHOD, "factor": 4, "noise_std": noise_std, "intensity_gain": gains}


def _pet(
    activity: Volume, mu: Volume, counts: float, dose_reduction: float, blocks: Blocks, smoke: bool, rng: np.random.Generator
) -> Made:
    size = 64 if smoke else 128
    activity, mu = sources.pad_square(activity, size), sources.pad_square(mu, size)
    scanner = PetScanner(counts_per_slice=counts / 4 if smoke else counts, views=64 if smoke else 120)
    low, full = pet_low_count(
        sources.slices_of(activity), sources.slices_of(mu), activity.spacing_mm[0], dose_reduction, scanner, rng
    )
    patient = Patient("phantom-1", sources.with_slices(activity, low), sources.with_slices(activity, full), blocks)
    settings = {"method": "binomial thinning of the full counts, OSEM with resolution model", "dose_reduction": dose_reduction}
    return [patient], settings | vars(scanner)


def pet_trunk(smoke: bool, rng: np.random.Generator) -> Made:
    factor = 2 if smoke else 1
    hu = sources.load("ct_trunk_3mm.nii.gz", CT)
    labels = sources.slices_of(sources.load("ct_trunk_3mm_labels.nii.gz", CT)).astype(np.uint8)
    names = {int(k): v for k, v in json.loads((sources.IMAGES / "ct_trunk_3mm_labels.json").read_text("utf-8")).items()}
    suv = trunk_activity(sources.slices_of(hu), labels, names, rng, lesions=14)
    mu = sources.with_slices(hu, attenuation_from_hu(sources.slices_of(hu)))
    blocks = (
        ("trunk-a", "train", 0, 34),
        ("trunk-b", "validation", 36, 44),
        ("trunk-c", "test", 46, 68),
        ("trunk-d", "train", 70, 112),
    )
    activity = sources.shrink(sources.with_slices(hu, suv), factor)
    return _pet(activity, sources.shrink(mu, factor), counts=7e5, dose_reduction=12.0, blocks=blocks, smoke=smoke, rng=rng)


def pet_brain(smoke: bool, rng: np.random.Generator) -> Made:
    factor = 2 if smoke else 1
    maps = [sources.cut(sources.load(f"mni_icbm152_{tissue}_2mm.nii.gz", MRI), 6, 76) for tissue in ("gm", "wm")]
    grey, white = (sources.slices_of(tissue) / np.float32(255.0) for tissue in maps)
    activity = sources.with_slices(maps[0], brain_activity(grey, white, rng))
    mu = sources.with_slices(maps[0], attenuation_of_head(grey, white, maps[0].spacing_mm[0]))
    blocks = (
        ("brain-a", "train", 0, 27),
        ("brain-b", "validation", 29, 35),
        ("brain-c", "test", 37, 51),
        ("brain-d", "train", 53, 70),
    )
    activity, mu = sources.shrink(activity, factor), sources.shrink(mu, factor)
    return _pet(activity, mu, counts=1e6, dose_reduction=10.0, blocks=blocks, smoke=smoke, rng=rng)
