from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional

from tat_core.metrics import Scores, is_scorable, slice_scores, ssim_map
from tat_core.tasks import CT, MRI, PET, TASKS


def pair(task_name: str, shape: tuple[int, int] = (70, 53), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image and a noisy copy, both reaching outside the evaluation window."""
    rng = np.random.default_rng(seed)
    low, high = TASKS[task_name].evaluation_window
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    hq = low + (high - low) * (0.5 + 0.6 * np.sin(rows / 7) * np.cos(columns / 5))
    lq = hq + rng.normal(0, 0.08 * (high - low), shape)
    return lq.astype(np.float32), hq.astype(np.float32)


def benchmark_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """The benchmark's own recipe: pytorch-ssim with five 2-D convolutions."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    line /= line.sum()
    window = torch.outer(line, line)[None, None]

    def blur(image: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(image, window, padding=5)

    a, b = torch.from_numpy(x)[None, None], torch.from_numpy(y)[None, None]
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = ((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return float(values.mean())


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_psnr_and_rmse_agree_with_scikit_image(task) -> None:
    lq, hq = pair(task.name)
    scores = slice_scores(lq, hq, task)
    x, y = (np.clip(image.astype(np.float64), *task.evaluation_window) for image in (lq, hq))
    assert scores["psnr"] == pytest.approx(peak_signal_noise_ratio(y, x, data_range=y.max() - y.min()), abs=1e-9)
    assert scores["rmse"] == pytest.approx(float(np.sqrt(np.mean((x - y) ** 2))), rel=1e-12)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_ssim_agrees_with_scikit_image_away_from_the_border(task) -> None:
    lq, hq = pair(task.name)
    x, y = (np.clip(image.astype(np.float64), *task.evaluation_window) for image in (lq, hq))
    data_range = y.max() - y.min()
    _, theirs = structural_similarity(
        x, y, data_range=data_range, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True, truncate=3.5
    )
    inside = (slice(5, -5), slice(5, -5))
    np.testing.assert_allclose(ssim_map(x, y, data_range)[inside], theirs[inside], rtol=0, atol=1e-9)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_ssim_is_the_benchmarks_including_its_zero_padding(task) -> None:
    lq, hq = pair(task.name, shape=(40, 61))
    x, y = (np.clip(image.astype(np.float64), *task.evaluation_window) for image in (lq, hq))
    assert slice_scores(lq, hq, task)["ssim"] == pytest.approx(benchmark_ssim(x, y, y.max() - y.min()), abs=1e-9)


def test_known_values() -> None:
    hq = np.zeros((16, 16), np.float32)
    hq[:, 8:] = 200.0
    scores = slice_scores(hq + 20.0, hq, CT)
    assert scores["rmse"] == pytest.approx(20.0)
    assert scores["psnr"] == pytest.approx(20.0)  # 20 log10(200 / 20)


def test_equal_images_score_a_finite_top() -> None:
    _, hq = pair("PET")
    assert slice_scores(hq, hq, PET) == {"psnr": 100.0, "ssim": pytest.approx(1.0), "rmse": 0.0}


def test_what_lies_outside_the_window_does_not_count() -> None:
    lq, hq = pair("CT")
    far = np.where(hq > CT.evaluation_window[1], 3000.0, hq).astype(np.float32)
    assert slice_scores(lq, far, CT) == slice_scores(lq, hq, CT)


def test_refusals_say_what_is_wrong() -> None:
    lq, hq = pair("MRI")
    with pytest.raises(ValueError, match="2-D shape, got"):
        slice_scores(lq[None], hq[None], MRI)
    with pytest.raises(ValueError, match="2-D shape, got"):
        slice_scores(lq[:-1], hq, MRI)
    with pytest.raises(ValueError, match=r"window \[-160, 240\] HU"):
        slice_scores(lq, np.full_like(hq, -1000.0), CT)
    broken = lq.copy()
    broken[3, 3] = np.nan
    with pytest.raises(ValueError, match="got 1 NaN or infinite in the image"):
        slice_scores(broken, hq, MRI)
    with pytest.raises(ValueError, match="in the target"):
        slice_scores(hq, broken, MRI)
    assert is_scorable(lq, hq, MRI)
    assert not is_scorable(broken, hq, MRI)
    assert not is_scorable(lq, np.full_like(hq, -1000.0), CT)


def test_scores_add_up_over_slices_not_over_hospitals() -> None:
    one = Scores(1, 30.0, 0.9, 4.0)
    three = Scores(3, 60.0, 1.5, 6.0)
    assert (one + three).mean() == {"psnr": 22.5, "ssim": pytest.approx(0.6), "rmse": 2.5, "count": 4}
    assert Scores() + one == one
    with pytest.raises(ValueError, match="at least one slice"):
        Scores().mean()
    assert math.isfinite((one + Scores(1, 100.0, 1.0, 0.0)).mean()["psnr"])
