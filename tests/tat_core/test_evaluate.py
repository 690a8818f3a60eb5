from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from tat_core.config import EvaluateConfig
from tat_core.evaluate import evaluate_split, restore_image, slice_scores, spread
from tat_core.tasks import CT, MRI, PET, Task


class Recorder(nn.Module):
    """Smooths by a 3×3 mean, and keeps the shapes that it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.modes: list[bool] = []

    def forward(self, lq: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(lq.shape))
        self.modes.append(self.training)
        assert not torch.is_grad_enabled()
        assert lq.dtype is torch.float32
        return nn.functional.avg_pool2d(nn.functional.pad(lq, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


class FakeSplit:
    """A prepared split held in memory."""

    def __init__(self, task: Task, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.task = task
        self.pairs = pairs
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(index)
        return self.pairs[index]


def image(shape: tuple[int, int], task: Task = CT, seed: int = 0) -> np.ndarray:
    low, high = task.intensity_range
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


@pytest.mark.parametrize("task", [CT, MRI, PET], ids=lambda task: task.name)
def test_identity_gives_the_input_back_in_its_unit(task: Task) -> None:
    lq = image((45, 31), task)
    restored = restore_image(nn.Identity(), lq, task, 64, 8)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, lq, atol=1e-6 * (task.intensity_range[1] - task.intensity_range[0]))


def test_values_outside_the_range_are_clipped() -> None:
    lq = np.array([[-2000.0, 0.0], [5000.0, 40.0]], np.float32)
    np.testing.assert_allclose(restore_image(nn.Identity(), lq, CT, 8, 0), [[-1024, 0], [3072, 40]], atol=1e-2)


def test_an_image_that_fits_is_shown_whole_and_once() -> None:
    model = Recorder()
    model.train()
    restore_image(model, image((64, 40)), CT, 64, 16)
    assert model.shapes == [(1, 1, 64, 40)]
    assert model.modes == [False]
    assert model.training


@pytest.mark.parametrize("shape", [(65, 40), (200, 131), (64, 300), (33, 129)])
@pytest.mark.parametrize("overlap", [0, 7, 16, 48])
def test_tiles_cover_everything_and_blend_without_seams(shape: tuple[int, int], overlap: int) -> None:
    lq = image(shape)
    restored = restore_image(nn.Identity(), lq, CT, 64, overlap)
    np.testing.assert_allclose(restored, lq, atol=5e-3)


def test_tiled_equals_whole_up_to_what_a_tile_border_sees() -> None:
    # A smooth picture: then only the padding at a tile's border differs, and blending must keep that below its weight there.
    rows, columns = np.mgrid[0:150, 0:170]
    lq = (100 * np.sin(rows / 9) + 80 * np.cos(columns / 11)).astype(np.float32)
    whole = restore_image(Recorder(), lq, CT, 256, 32)
    tiled = restore_image(Recorder(), lq, CT, 64, 32)
    assert np.abs(tiled - whole).max() < 0.02
    abutting = restore_image(Recorder(), lq, CT, 64, 0)
    assert np.abs(abutting - whole).max() > 1.0


def test_constant_offset_between_tiles_leaves_no_step() -> None:
    class TileMean(nn.Module):
        def forward(self, lq: torch.Tensor) -> torch.Tensor:
            return lq.mean().expand_as(lq)

    ramp = np.tile(np.linspace(0, 4000, 256, dtype=np.float32), (64, 1))
    restored = restore_image(TileMean(), ramp, MRI, 64, 32)
    assert np.abs(np.diff(restored, axis=1)).max() < 60  # a hard seam would be 1000


def test_refusals() -> None:
    with pytest.raises(ValueError, match="2-D image"):
        restore_image(nn.Identity(), np.zeros((1, 8, 8), np.float32), CT, 64, 8)
    with pytest.raises(ValueError, match="non-empty"):
        restore_image(nn.Identity(), np.zeros((0, 8), np.float32), CT, 64, 8)
    with pytest.raises(ValueError, match="finite"):
        restore_image(nn.Identity(), np.full((8, 8), np.inf, np.float32), CT, 64, 8)
    with pytest.raises(ValueError, match="tile_overlap < tile_size"):
        restore_image(nn.Identity(), np.zeros((8, 8), np.float32), CT, 16, 16)


def test_spread_is_even_and_stable() -> None:
    assert spread(10, None) == list(range(10))
    assert spread(3, 5) == [0, 1, 2]
    assert spread(10, 2) == [2, 7]
    assert spread(9, 3) == [1, 4, 7]
    assert spread(0, 4) == []
    assert spread(5, 0) == []


def test_evaluate_split_scores_both_arms_on_the_same_slices() -> None:
    pairs = [(image((24, 24), PET, seed), image((24, 24), PET, seed + 100)) for seed in range(9)]
    split = FakeSplit(PET, pairs)
    arms = evaluate_split(Recorder(), split, EvaluateConfig(), max_slices=3)
    assert split.asked == [1, 4, 7]
    assert arms["input"].count == arms["restored"].count == 3
    expected = np.mean([slice_scores(*pairs[i], PET)["psnr"] for i in (1, 4, 7)])
    assert arms["input"].mean()["psnr"] == pytest.approx(expected)
    assert arms["restored"].mean()["psnr"] > arms["input"].mean()["psnr"]


def test_evaluate_split_without_a_model_or_slices() -> None:
    assert set(evaluate_split(None, FakeSplit(CT, [(image((8, 8)), image((8, 8), seed=1))]), EvaluateConfig())) == {"input"}
    empty = evaluate_split(Recorder(), FakeSplit(CT, []), EvaluateConfig())
    assert empty["input"].count == empty["restored"].count == 0


def test_slices_that_cannot_be_scored_are_left_out_of_both_arms() -> None:
    good = (image((16, 16)), image((16, 16), seed=1))
    air = (good[0], np.full((16, 16), -1000.0, np.float32))
    broken = (np.full((16, 16), np.nan, np.float32), good[1])
    arms = evaluate_split(nn.Identity(), FakeSplit(CT, [good, air, broken]), EvaluateConfig())
    assert arms["input"].count == arms["restored"].count == 1


class Elsewhere(nn.Conv2d):
    """Ends what runs it once it has seen that the image is where its weights are."""

    def __init__(self) -> None:
        super().__init__(1, 1, 3)

    def forward(self, lq: torch.Tensor) -> torch.Tensor:
        assert lq.device == self.weight.device == torch.device("meta")
        raise InterruptedError


def test_a_network_goes_where_the_site_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site loads the model that arrives into main memory; on a GPU site it must not be left there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    split = FakeSplit(CT, [(image((24, 24)), image((24, 24), seed=1))])
    with pytest.raises(InterruptedError):
        evaluate_split(Elsewhere(), split, EvaluateConfig(), device="meta")
