"""The benchmark's yardstick is the published network, and its numbers come out."""

import json
import subprocess
import sys

import pytest
import torch
from model_golden import OUTPUTS, golden_image, published_state
from typer.testing import CliRunner

from simulations.bench.model import CASES, TARGETS, VARIANTS
from simulations.bench.transcription import restore
from tat_core.model.commands import app


def test_transcription_reproduces_the_golden_values() -> None:
    image, golden = golden_image(1, (1, 1, 128, 128)), OUTPUTS["tat.1.1x1x128x128"]
    with torch.no_grad():
        restored = restore(published_state(), image)
    assert (restored - golden).norm() < 1e-4 * (golden - image).norm()


def test_targets_name_what_is_measured() -> None:
    for numerator, denominator, case, what, _, sense in TARGETS.values():
        assert {numerator, denominator} <= VARIANTS.keys()
        assert case in CASES
        assert what in ("seconds", "mib")
        assert sense in ("min", "max")


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
