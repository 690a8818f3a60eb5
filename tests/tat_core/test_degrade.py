"""The physics of the three degradations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d
from skimage.transform import iradon

from tat_core.data.degrade import ct_low_dose, filtered_back_projection, mri_super_resolution
from tat_core.data.degrade_pet import PetScanner, pet_low_count, system_matrix


def disc(n: int, radius: float, value: float, outside: float) -> np.ndarray:
    y, x = np.mgrid[:n, :n] - n / 2
    return np.where(x**2 + y**2 < radius**2, value, outside).astype(np.float32)[None]


def test_back_projection_agrees_with_scikit_image() -> None:
    rng = np.random.default_rng(0)
    sinograms = gaussian_filter1d(rng.standard_normal((2, 96, 120)).astype(np.float32), 3, axis=1)
    ours = filtered_back_projection(sinograms, 96)
    angles = np.arange(120) * 1.5
    theirs = np.stack([iradon(s, theta=angles, filter_name="hann", circle=True, interpolation="cubic") for s in sinograms])
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.05
    assert np.sum(ours * theirs) / np.sum(theirs**2) == pytest.approx(1.0, abs=0.01)


def test_low_dose_noise_follows_dose_and_leaves_the_mean() -> None:
    hu = np.repeat(disc(96, 35, 0.0, -1000.0), 4, axis=0)

    def noise(dose_fraction: float, photons: float, **options: float) -> np.ndarray:
        low = ct_low_dose(hu, 3.0, dose_fraction, photons, np.random.default_rng(0), views=180, **options)
        return (low - hu)[:, 40:56, 40:56]

    # without electronic noise the variance is (1 - a)/a / N0: a quarter dose is 3, a tenth 9; four times the photons, a quarter
    quarter, tenth, bright = (noise(a, n0, electronic_noise=0.0).std() for a, n0 in ((0.25, 1e6), (0.1, 1e6), (0.25, 4e6)))
    assert tenth / quarter == pytest.approx(np.sqrt(3), rel=1e-3)
    assert quarter / bright == pytest.approx(2, rel=1e-3)
    assert noise(0.25, 1e6).std() > quarter
    assert abs(noise(0.25, 1e6).mean()) < quarter / 3
    assert noise(1.0, 1e6).std() == 0


def test_low_dose_absolute_noise_level() -> None:
    """Behind 25 cm of water the sinogram's noise is known; filtered back-projection turns it into a known noise in HU."""
    n, pixel_mm, photons, views = 128, 2.5, 1e5, 360
    hu = np.repeat(disc(n, 50, 0.0, -1000.0), 6, axis=0)
    low = ct_low_dose(hu, pixel_mm, 0.5, photons, np.random.default_rng(1), views=views, electronic_noise=0.0)
    transmission = np.exp(-0.0192 * 2 * 50 * pixel_mm)
    # variance of FBP at the centre of a disc: pi^2/views * sigma^2 * integral of the squared windowed ramp
    frequency = np.linspace(-0.5, 0.5, 10_001)
    window = frequency**2 * (0.5 + 0.5 * np.cos(2 * np.pi * frequency)) ** 2
    sigma = np.sqrt(np.pi**2 / views * np.trapezoid(window, frequency) / (photons * transmission)) / pixel_mm * 1000 / 0.0192
    measured = (low - hu)[:, 56:72, 56:72].std()
    assert measured == pytest.approx(sigma, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "dose", "photons"), [((1, 8, 9), 0.5, 1e5), ((8, 8), 0.5, 1e5), ((1, 8, 8), 0.0, 1e5), ((1, 8, 8), 0.5, 0.0)]
)
def test_low_dose_refuses(shape, dose, photons) -> None:
    with pytest.raises(ValueError, match="ct_low_dose: expected"):
        ct_low_dose(np.zeros(shape, np.float32), 1.0, dose, photons, np.random.default_rng(0))


def test_super_resolution_keeps_low_frequencies_only() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((2, 64, 48)).astype(np.float32) + 5
    low = mri_super_resolution(image, 4)
    assert low.mean() == pytest.approx(image.mean(), rel=1e-5)
    spectrum = np.fft.fftshift(np.fft.fft2(low), axes=(-2, -1))
    kept = np.zeros((64, 48), bool)
    kept[24:40, 18:30] = True
    energy = (np.abs(spectrum) ** 2).sum(axis=0)
    energy[32, 24] = 0  # leave the mean out
    assert energy[~kept].sum() < 0.1 * energy[kept].sum()  # the magnitude mixes a little back in
    np.testing.assert_allclose(mri_super_resolution(image, 1), image, rtol=1e-5)
    with pytest.raises(ValueError, match="choose a smaller factor"):
        mri_super_resolution(image, 100)


def test_super_resolution_noise_has_the_stated_size() -> None:
    flat = np.full((4, 64, 64), 5000.0, np.float32)
    noisy = mri_super_resolution(flat, 4, 100.0, np.random.default_rng(0))
    assert (noisy - mri_super_resolution(flat, 4)).std() == pytest.approx(100, rel=0.1)  # the real part alone counts here


def test_system_matrix_keeps_content_and_geometry() -> None:
    matrix = system_matrix(32, 12)
    image = np.zeros((32, 32), np.float32)
    image[10, 20] = 2.0
    sinogram = (matrix @ image.ravel()).reshape(12, 32)
    np.testing.assert_allclose(sinogram.sum(axis=1), 2.0, rtol=1e-5)
    assert sinogram[0].argmax() == 20  # from the front columns are seen, from the side rows
    assert sinogram[6].argmax() == 31 - 10


def test_pet_counts_thinning_and_scale() -> None:
    activity = np.repeat(disc(48, 14, 4.0, 0.0), 3, axis=0)
    mu = np.repeat(disc(48, 16, 0.0096, 0.0), 3, axis=0)
    scanner = PetScanner(counts_per_slice=4e5, views=48, iterations=4)
    low, full = pet_low_count(activity, mu, 4.0, 10.0, scanner, np.random.default_rng(0))
    inside = disc(48, 9, 1.0, 0.0)[0] > 0
    assert full[:, inside].mean() == pytest.approx(4.0, rel=0.02)  # attenuation and background are corrected
    assert low[:, inside].mean() == pytest.approx(4.0, rel=0.05)
    assert low[:, inside].std() / full[:, inside].std() == pytest.approx(np.sqrt(10), rel=0.4)
    again, _ = pet_low_count(activity, mu, 4.0, 10.0, scanner, np.random.default_rng(0))
    np.testing.assert_array_equal(low, again)
    assert low.min() >= 0


def test_pet_refuses() -> None:
    good = np.ones((1, 16, 16), np.float32)
    for activity, mu, reduction in (
        (good[0], good[0], 2),
        (good, good[:, :8], 2),
        (good, good, 0.5),
        (-good, good, 2),
        (0 * good, good, 2),
    ):
        with pytest.raises(ValueError, match="pet_low_count: expected"):
            pet_low_count(activity, mu, 1.0, reduction, PetScanner(views=8), np.random.default_rng(0))


def test_noise_in_the_kept_samples_has_the_stated_strength_in_the_image() -> None:
    silent = np.zeros((4, 128, 96), np.float32)
    noisy = mri_super_resolution(silent, 4, noise_std=50.0, rng=np.random.default_rng(0))
    # The magnitude of complex Gaussian noise is Rayleigh-distributed: its mean square is 2σ².
    assert np.sqrt(np.square(noisy).mean() / 2) == pytest.approx(50.0, rel=0.05)
