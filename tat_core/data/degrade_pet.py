"""The physics of PET: an activity map is scanned, and the same scan is repeated with a fraction of its counts.

2-D, slice by slice, parallel-beam; pure functions of arrays and a random generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array

MU_WATER_511_PER_MM = 0.0096
_FWHM = 2.3548  # full width at half maximum of a Gaussian of unit sigma


@dataclass(frozen=True)
class PetScanner:
    """What the simulated scanner does.

    Attributes
    ----------
    counts_per_slice : float
        Detected coincidences of the full-count scan, mean over slices.
    psf_mm : float
        Resolution (FWHM), the same everywhere and modelled in the reconstruction.
    background : float
        Scattered and random coincidences as a part of the true ones, spread flat.
    views, subsets, iterations : int
        Projection angles and the OSEM schedule.
    post_filter_mm : float
        Gaussian filter (FWHM) after reconstruction.
    """

    counts_per_slice: float = 1e6
    psf_mm: float = 4.5
    background: float = 0.3
    views: int = 120
    subsets: int = 8
    iterations: int = 3
    post_filter_mm: float = 4.0


def pet_low_count(
    suv: np.ndarray,
    mu_per_mm: np.ndarray,
    spacing_mm: float,
    dose_reduction: float,
    scanner: PetScanner,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Scan an activity map with full and with reduced counts.

    The low-count data are a binomial thinning of the full-count data, as when a list-mode file is cut short, so both share their
    noise.

    Parameters
    ----------
    suv : numpy.ndarray, (slices, n, n), float32
        Activity in SUV (body weight), not negative.
    mu_per_mm : numpy.ndarray, (slices, n, n), float32
        Attenuation at 511 keV.
    spacing_mm : float
        Pixel size.
    dose_reduction : float
        Full counts divided by low counts, at least 1.
    scanner : PetScanner
    rng : numpy.random.Generator

    Returns
    -------
    low, full : numpy.ndarray, (slices, n, n), float32
        Reconstructed images in SUV.

    Raises
    ------
    ValueError
        If shapes differ, slices are not square, activity is negative or the reduction is below 1.
    """
    if suv.ndim != 3 or suv.shape[1] != suv.shape[2] or suv.shape != mu_per_mm.shape:
        raise ValueError(
            f"pet_low_count: expected two stacks (slices, n, n), got {suv.shape} and {mu_per_mm.shape}; pad them to squares"
        )
    if dose_reduction < 1.0:
        raise ValueError(
            f"pet_low_count: expected a dose reduction of at least 1, got {dose_reduction}; give full counts / low counts"
        )
    if float(suv.min(initial=0.0)) < 0.0:
        raise ValueError("pet_low_count: expected activity >= 0, got negative values; clip the map first")
    slices, n, _ = suv.shape
    matrix = system_matrix(n, scanner.views)
    sensitivity = np.exp(-(matrix @ _columns(mu_per_mm)) * spacing_mm)  # what part of the pairs leaves the body
    psf_pixels = scanner.psf_mm / _FWHM / spacing_mm
    trues = sensitivity * (matrix @ _columns(_blur(suv, psf_pixels)))
    total = trues.sum()
    if total <= 0.0:
        raise ValueError("pet_low_count: expected some activity, got an empty map; check the labels")
    scale = scanner.counts_per_slice * slices / ((1.0 + scanner.background) * total)
    background = np.broadcast_to(trues.mean(axis=0) * scanner.background, trues.shape)
    full_counts = rng.poisson(scale * (trues + background))
    low_counts = rng.binomial(full_counts, 1.0 / dose_reduction)
    low, full = (
        _osem(matrix, counts / (scale * part), sensitivity, background, scanner, psf_pixels, n)
        for counts, part in ((low_counts, 1.0 / dose_reduction), (full_counts, 1.0))
    )
    post_pixels = scanner.post_filter_mm / _FWHM / spacing_mm
    return _blur(low, post_pixels), _blur(full, post_pixels)


def system_matrix(n: int, views: int) -> csr_array:
    """Line integrals of an n × n image along `views` parallel beams over 180 degrees, in pixel units.

    Each pixel's content is shared linearly by the two nearest of the n detectors.

    Returns
    -------
    scipy.sparse.csr_array, (views·n, n·n), float32
        Row ``view·n + detector``.
    """
    y, x = np.mgrid[:n, :n].astype(np.float64) - (n - 1) / 2
    rows, columns, values = [], [], []
    pixels = np.arange(n * n)
    for view in range(views):
        angle = np.pi * view / views
        position = (x * np.cos(angle) - y * np.sin(angle) + (n - 1) / 2).ravel()
        lower = np.floor(position).astype(np.int64)
        for detector, weight in ((lower, lower + 1 - position), (lower + 1, position - lower)):
            inside = (detector >= 0) & (detector < n) & (weight > 0)
            rows.append(view * n + detector[inside])
            columns.append(pixels[inside])
            values.append(weight[inside].astype(np.float32))
    indices = (np.concatenate(rows), np.concatenate(columns))
    return csr_array((np.concatenate(values), indices), shape=(views * n, n * n), dtype=np.float32)


def _osem(
    matrix: csr_array,
    measured: np.ndarray,
    sensitivity: np.ndarray,
    background: np.ndarray,
    scanner: PetScanner,
    psf_pixels: float,
    n: int,
) -> np.ndarray:
    """Ordered-subsets expectation maximisation with attenuation, background and resolution in the model."""
    slices = measured.shape[1]
    subsets = []
    for first in range(scanner.subsets):
        rows = (np.arange(first, scanner.views, scanner.subsets)[:, None] * n + np.arange(n)).ravel()
        part = matrix[rows]
        transposed = part.T.tocsr()
        norm = _blur(_slices(transposed @ sensitivity[rows], n), psf_pixels)
        subsets.append((rows, part, transposed, np.maximum(norm, 1e-6)))
    image = np.ones((slices, n, n), np.float32)
    for _ in range(scanner.iterations):
        for rows, part, transposed, norm in subsets:
            expected = sensitivity[rows] * (part @ _columns(_blur(image, psf_pixels))) + background[rows]
            ratio = sensitivity[rows] * measured[rows] / np.maximum(expected, 1e-6)
            image *= _blur(_slices(transposed @ ratio.astype(np.float32), n), psf_pixels) / norm
    return image


def _blur(stack: np.ndarray, sigma_pixels: float) -> np.ndarray:
    return gaussian_filter(stack, (0.0, sigma_pixels, sigma_pixels), mode="constant", truncate=3.0).astype(np.float32)


def _columns(stack: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(stack.reshape(len(stack), -1).T, dtype=np.float32)


def _slices(columns: np.ndarray, n: int) -> np.ndarray:
    return np.ascontiguousarray(columns.T).reshape(-1, n, n)
