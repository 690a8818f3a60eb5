"""The physics that turns a good image into a poor one: low-dose CT and low-resolution MRI (PET: `tat_core.data.pet`).

Pure functions of arrays and a random generator. Everything is 2-D slice by slice, slices stacked in front.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import torch
from scipy.ndimage import zoom
from skimage.transform import radon

MU_WATER_PER_MM = 0.0192  # at about 70 keV, the effective energy of a 120 kV beam
_VIEWS_PER_BLOCK = 8  # so many views' samples stay in the cache while they are spread over the image


def ct_low_dose(
    hu: np.ndarray,
    spacing_mm: float,
    dose_fraction: float,
    photons: float,
    rng: np.random.Generator,
    *,
    electronic_noise: float = 10.0,
    views: int = 720,
    path_length_size: int = 128,
) -> np.ndarray:
    """Add to CT slices the noise that a lower dose would have added, with its streaks.

    The noise that is missing between the full and the reduced dose is drawn in the sinogram, where its variance follows from the
    line integrals (Zeng et al., "A simple low-dose x-ray CT simulation from high-dose scan", IEEE TNS 2015), and reconstructed by
    filtered back-projection with a Hann window; the slices themselves pass untouched. Line integrals are smooth, so they are
    taken from slices reduced to `path_length_size`.

    Parameters
    ----------
    hu : numpy.ndarray, (slices, n, n), float32
        Square slices in HU.
    spacing_mm : float
        Pixel size.
    dose_fraction : float
        In (0, 1]: the low dose divided by the full one. 1 adds nothing.
    photons : float
        Photons per detector element of the full-dose scan, before the patient.
    rng : numpy.random.Generator
    electronic_noise : float
        Variance of the read-out, in photons².
    views : int
        Projection angles over 180 degrees.
    path_length_size : int
        Slices are reduced to about this many pixels a side for the line integrals.

    Returns
    -------
    numpy.ndarray, (slices, n, n), float32
        Noisy slices in HU, not clipped.

    Raises
    ------
    ValueError
        If the slices are not square or a parameter is out of range.
    """
    if hu.ndim != 3 or hu.shape[1] != hu.shape[2]:
        raise ValueError(f"ct_low_dose: expected square slices (slices, n, n), got {hu.shape}; pad them with air first")
    if not 0.0 < dose_fraction <= 1.0:
        raise ValueError(
            f"ct_low_dose: expected a dose fraction in (0, 1], got {dose_fraction}; state what part of the full dose is wanted"
        )
    if photons <= 0 or views < 2:
        raise ValueError(
            f"ct_low_dose: expected photons > 0 and views >= 2, got {photons} and {views}; use the scanner's figures"
        )
    paths = _line_integrals(hu, spacing_mm, views, path_length_size)
    missing = (1.0 - dose_fraction) / dose_fraction
    inverse_counts = np.exp(np.minimum(paths, 12.0)) / photons  # 1/transmitted photons; beyond e^-12 nothing is detected anyway
    variance = missing * inverse_counts * (1.0 + (1.0 + dose_fraction) / dose_fraction * electronic_noise * inverse_counts)
    noise = rng.standard_normal(variance.shape, dtype=np.float32) * np.sqrt(variance).astype(np.float32)
    mu_noise = filtered_back_projection(noise, hu.shape[1]) / spacing_mm
    return (hu + mu_noise * (1000.0 / MU_WATER_PER_MM)).astype(np.float32)


def _line_integrals(hu: np.ndarray, spacing_mm: float, views: int, size: int) -> np.ndarray:
    """Attenuation along each ray, (slices, n detectors, views), from reduced slices and a quarter of the views."""
    n = hu.shape[1]
    factor = max(n // size, 1)
    small_n = n // factor
    trimmed = hu[:, : small_n * factor, : small_n * factor]
    mu = MU_WATER_PER_MM * np.maximum(1.0 + trimmed / 1000.0, 0.0)
    mu = mu.reshape(len(hu), small_n, factor, small_n, factor).mean((2, 4))
    coarse_views = max(views // 4, 2)
    angles = np.arange(coarse_views) * (180.0 / coarse_views)
    paths = np.stack([radon(slice_, theta=angles, circle=False) for slice_ in mu]) * (spacing_mm * factor)
    centred = _centre_crop(paths, small_n)
    return np.maximum(zoom(centred, (1.0, n / small_n, views / coarse_views), order=1, grid_mode=True, mode="nearest"), 0.0)


def _centre_crop(sinogram: np.ndarray, size: int) -> np.ndarray:
    start = (sinogram.shape[1] - size) // 2
    return sinogram[:, start : start + size]


def filtered_back_projection(sinograms: np.ndarray, size: int) -> np.ndarray:
    """Reconstruct parallel-beam sinograms with a Hann-windowed ramp.

    Agrees with `skimage.transform.iradon(..., filter_name="hann", circle=True)`, which takes a hundred times as long because it
    goes slice by slice.

    Parameters
    ----------
    sinograms : numpy.ndarray, (slices, size, views)
        Line integrals in pixel units, views spread evenly over 180 degrees from 0.
    size : int
        Rows and columns of the image.

    Returns
    -------
    numpy.ndarray, (slices, size, size), float32
    """
    slices, detectors, views = sinograms.shape
    padded = max(64, 2 ** int(np.ceil(np.log2(2 * detectors))))
    oversampling = (
        4  # band-limited interpolation to quarter samples, then the nearest one: as good as linear, one look-up instead of two
    )
    spectrum = scipy.fft.rfft(sinograms, n=padded, axis=1) * _hann_ramp(padded)[None, :, None]
    fine_spectrum = np.zeros((slices, padded * oversampling // 2 + 1, views), spectrum.dtype)
    fine_spectrum[:, : spectrum.shape[1]] = spectrum
    fine = (
        scipy.fft.irfft(fine_spectrum, n=padded * oversampling, axis=1)[:, : detectors * oversampling].astype(np.float32)
        * oversampling
    )
    table = torch.from_numpy(np.ascontiguousarray(fine.transpose(2, 1, 0)))  # views, samples, slices
    samples = table.shape[1]
    centre = size // 2
    y, x = (np.mgrid[:size, :size].astype(np.float32) - centre) * oversampling
    angles = np.deg2rad(np.arange(views) * (180.0 / views))
    image = torch.zeros(size * size, slices)
    for start in range(0, views, _VIEWS_PER_BLOCK):
        block = angles[start : start + _VIEWS_PER_BLOCK]
        index = np.empty((size * size, len(block)), np.int32)
        for k, angle in enumerate(block):
            position = (x * np.float32(np.cos(angle)) - y * np.float32(np.sin(angle)) + (centre * oversampling + 0.5)).astype(
                np.int32
            )
            outside = (position < 0) | (position >= samples)
            index[:, k] = np.where(outside, len(block) * samples, position + k * samples).ravel()
        weights = torch.cat([table[start : start + len(block)].reshape(-1, slices), torch.zeros(1, slices)])
        image += torch.nn.functional.embedding_bag(torch.from_numpy(index), weights, mode="sum")
    radius = x**2 + y**2 <= (size // 2 * oversampling) ** 2
    return (image.numpy().T.reshape(slices, size, size) * radius * np.float32(np.pi / (2 * views))).astype(np.float32)


def _hann_ramp(size: int) -> np.ndarray:
    """Half of the Fourier filter: the ramp of Kak & Slaney (chapter 3, equation 61) under a Hann window."""
    n = np.concatenate([np.arange(1, size / 2 + 1, 2, dtype=int), np.arange(size / 2 - 1, 0, -2, dtype=int)])
    kernel = np.zeros(size)
    kernel[0] = 0.25
    kernel[1::2] = -1.0 / (np.pi * n) ** 2
    ramp = 2.0 * np.real(scipy.fft.rfft(kernel))
    return ramp * (0.5 + 0.5 * np.cos(np.pi * np.arange(size // 2 + 1) / (size // 2)))


def mri_super_resolution(
    image: np.ndarray, factor: int = 4, noise_std: float = 0.0, rng: np.random.Generator | None = None
) -> np.ndarray:
    """What a scan with `factor` times coarser pixels in both directions would show on the same grid.

    Keeps the central 1/factor of k-space along rows and columns, fills the rest with zeros and takes the magnitude (the published
    benchmark's recipe). A short or low-field scan is noisy as well: complex Gaussian noise in the samples kept.

    Parameters
    ----------
    image : numpy.ndarray, (..., rows, columns)
        Magnitude image in scanner units.
    factor : int
        1 keeps everything.
    noise_std : float
        Standard deviation of the noise in each of the real and imaginary parts of the zero-filled image, in scanner units.
    rng : numpy.random.Generator, optional
        Draws the noise; needed if there is any.

    Returns
    -------
    numpy.ndarray, same shape, float32, not negative.

    Raises
    ------
    ValueError
        If nothing of k-space would be left.
    """
    rows, columns = image.shape[-2:]
    kept_rows, kept_columns = rows // factor if factor else 0, columns // factor if factor else 0
    if factor < 1 or min(kept_rows, kept_columns) < 1:
        raise ValueError(
            f"mri_super_resolution: expected a factor from 1 to {min(rows, columns)}, got {factor}; choose a smaller factor"
        )
    spectrum = np.fft.fftshift(np.fft.fft2(image), axes=(-2, -1))
    mask = np.zeros((rows, columns), bool)
    top, left = rows // 2 - kept_rows // 2, columns // 2 - kept_columns // 2
    mask[top : top + kept_rows, left : left + kept_columns] = True
    if noise_std > 0:
        assert rng is not None, "noise needs a random generator"
        # The inverse transform divides by the number of pixels, and only the kept samples carry noise.
        scale = noise_std * rows * columns / np.sqrt(kept_rows * kept_columns)
        spectrum += scale * (rng.standard_normal(spectrum.shape) + 1j * rng.standard_normal(spectrum.shape))
    return np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum * mask, axes=(-2, -1)))).astype(np.float32)
