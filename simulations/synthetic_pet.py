"""Activity maps for the synthetic PET hospitals: how much tracer (FDG) each tissue takes up."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from tat_core.data.degrade_pet import MU_WATER_511_PER_MM

# Typical FDG uptake in SUV (body weight) one hour after injection, by the beginning of the label's name; the first match counts.
ORGAN_SUV: tuple[tuple[str, float], ...] = (
    ("kidney_cyst", 0.6),
    ("kidney", 4.5),
    ("urinary_bladder", 12.0),
    ("brain", 8.0),
    ("heart", 3.0),
    ("liver", 2.3),
    ("spleen", 1.9),
    ("stomach", 1.9),
    ("small_bowel", 1.7),
    ("duodenum", 1.7),
    ("colon", 1.6),
    ("pancreas", 1.5),
    ("prostate", 1.8),
    ("adrenal", 1.4),
    ("gallbladder", 0.6),
    ("thyroid", 1.5),
    ("lung", 0.45),
    ("trachea", 0.3),
    ("vertebrae", 1.5),
    ("sacrum", 1.4),
    ("hip", 1.1),
    ("femur", 0.8),
    ("rib", 0.9),
    ("sternum", 1.1),
    ("spinal_cord", 1.6),
    ("gluteus", 0.7),
    ("autochthon", 0.7),
    ("iliopsoas", 0.7),
    ("aorta", 1.7),
    ("inferior_vena_cava", 1.7),
    ("portal_vein", 1.7),
    ("iliac", 1.6),
)
SOFT_TISSUE_SUV = 0.5
FAT_SUV = 0.25
LESION_SUV = (5.0, 14.0)
_AIR_HU = -400.0
_FAT_HU = -30.0


def trunk_activity(
    hu: np.ndarray, labels: np.ndarray, names: dict[int, str], rng: np.random.Generator, lesions: int
) -> np.ndarray:
    """Tracer uptake of a trunk from its CT and organ labels, with made-up hot lesions.

    Parameters
    ----------
    hu, labels : numpy.ndarray, (slices, rows, columns)
        CT in HU and organ numbers on the same grid.
    names : dict[int, str]
        Organ names by number; numbers without an uptake count as soft tissue.
    rng : numpy.random.Generator
    lesions : int
        How many spheres of raised uptake, radius 2 to 4 voxels, are put into organs.

    Returns
    -------
    numpy.ndarray, same shape, float32
        SUV, uneven by about 10 % within an organ.
    """
    body = gaussian_filter((hu > _AIR_HU).astype(np.float32), 2.0) > 0.5
    activity = np.where(body, np.where(hu < _FAT_HU, FAT_SUV, SOFT_TISSUE_SUV), 0.0).astype(np.float32)
    uptake = np.full(max([*names, int(labels.max())]) + 1, SOFT_TISSUE_SUV, np.float32)
    for number, name in names.items():
        uptake[number] = next((suv for prefix, suv in ORGAN_SUV if name.startswith(prefix)), SOFT_TISSUE_SUV)
    activity = np.where(labels > 0, uptake[labels], activity) * _unevenness(hu.shape, rng)
    sites = np.argwhere((labels > 0) & body)
    z, y, x = np.ogrid[tuple(slice(0, n) for n in hu.shape)]
    for centre in rng.choice(sites, lesions, replace=False):
        radius = rng.uniform(2.0, 4.0)
        sphere = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 <= radius**2
        activity[sphere & body] = rng.uniform(*LESION_SUV)
    return activity.astype(np.float32)


def brain_activity(grey: np.ndarray, white: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """FDG uptake of a brain: 8 SUV in grey, 2 SUV in white matter.

    Parameters
    ----------
    grey, white : numpy.ndarray, (slices, rows, columns)
        Tissue fractions in [0, 1].

    Returns
    -------
    numpy.ndarray, same shape, float32, SUV.
    """
    return ((8.0 * grey + 2.0 * white) * _unevenness(grey.shape, rng)).astype(np.float32)


def attenuation_from_hu(hu: np.ndarray) -> np.ndarray:
    """Attenuation at 511 keV in 1/mm from CT: water's, scaled, with half the slope above water because bone is calcium."""
    return (MU_WATER_511_PER_MM * np.clip(1.0 + np.where(hu > 0, 0.5 * hu, hu) / 1000.0, 0.0, None)).astype(np.float32)


def attenuation_of_head(grey: np.ndarray, white: np.ndarray, spacing_mm: float) -> np.ndarray:
    """A head of water around the brain: the tissue maps grown by about 12 mm of scalp and skull."""
    grown = gaussian_filter(np.clip(grey + white, 0.0, 1.0).astype(np.float32), 8.0 / spacing_mm)
    return np.where(grown > 0.08, MU_WATER_511_PER_MM, 0.0).astype(np.float32)


def _unevenness(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    field = gaussian_filter(rng.standard_normal(shape).astype(np.float32), 2.0)
    return np.clip(1.0 + 0.1 * field / field.std(), 0.6, 1.4)
