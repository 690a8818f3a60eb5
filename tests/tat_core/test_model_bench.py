"""The benchmark's yardstick is the published network, and its numbers come out."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from model_golden import OUTPUTS, golden_image, published_state
from typer.testing import CliRunner

from simulations.bench.loss_curve import compare, loss_curve
from simulations.bench.transcription import restore
from tat_core.config import ModelConfig
from tat_core.model.commands import app


def test_transcription_reproduces_the_golden_values() -> None:
    image, golden = golden_image(1, (1, 1, 128, 128)), OUTPUTS["tat.1.1x1x128x128"]
    with torch.no_grad():
        restored = restore(published_state(), image)
    assert (restored - golden).norm() < 1e-4 * (golden - image).norm()


@pytest.mark.parametrize("gpu", [False, True])
def test_targets_name_what_is_measured(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    bench = runpy.run_module("simulations.bench.model")
    assert bench["TARGETS"]
    for numerator, denominator, case, what, _, sense in bench["TARGETS"].values():
        assert {numerator, denominator} <= bench["VARIANTS"].keys()
        assert case in bench["CASES"]
        assert what in ("seconds", "mib")
        assert sense in ("min", "max")


def test_loss_curves_fall_and_are_compared_by_the_distance_between_seeds() -> None:
    config = ModelConfig(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, tren_features=8, tren_code=32)
    losses = loss_curve(config, seed=0, steps=20, batch=2, side=32)
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    exact = [[9.0, 9.0, 1.0], [9.0, 9.0, 2.0], [9.0, 9.0, 3.0]]
    figures = compare(exact, [[0.0, 0.0, last + 0.5] for *_, last in exact])
    assert list(figures.values()) == [2.0, 2.5, 0.5]


@pytest.mark.slow
def test_quick_benchmark_ends_in_one_json_line() -> None:
    command = [
        sys.executable,
        "-m",
        "simulations.bench.model",
        "--quick",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--case",
        "step B=1",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"figures", "targets", "holds"}
    assert result["figures"]["like for like: step B=1 fp32"] > 0


def test_model_info_prints_groups_cost_and_shares() -> None:
    result = CliRunner().invoke(app, ["info", "--preset", "smoke", "--side", "32"])
    assert result.exit_code == 0, result.output
    for word in ("backbone", "hypernetwork", "adapter", "GFLOP", "MiB", "latent"):
        assert word in result.output
