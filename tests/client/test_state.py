"""What a site keeps on its disk: enough to repeat a round exactly, no more than that, and nothing half-written."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.site import Site, load_site
from client.state import load_optimiser, load_own, save_optimiser, save_own
from client.work import handle, train_round
from tat_core.checkpoint import arrays_of, model_hash
from tat_core.config import RunConfig, load_config
from tat_core.data.prepared import PreparedSplit, StoredCase
from tat_core.model.tat import build_model
from tat_core.packet import Packet
from tat_core.tasks import TASKS
from tat_core.train import make_optimiser, train

RUN = "ab" * 16


@pytest.fixture
def config() -> RunConfig:
    return load_config("smoke")


@pytest.fixture
def site(smoke_hospitals: list[Path], tmp_path: Path) -> Site:
    return replace(load_site(smoke_hospitals[2] / "site.yaml"), state_dir=tmp_path / "state")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def _train(site: Site, config: RunConfig, model: dict[str, np.ndarray], number: int) -> Packet:
    steps = config.train.local_steps
    about = {"run": RUN, "round": number, "nonce": "n", "base": model_hash(model), "steps": steps}
    return handle(train_round, site, config, Packet(model, {}, about))


def test_a_repeated_round_repeats_exactly_optimiser_included(site: Site, config: RunConfig) -> None:
    model = arrays_of(build_model(config.model, config.seed))
    first = _train(site, config, model, 1)
    moved = {name: value + first.arrays[name] for name, value in model.items()}
    second = _train(site, config, moved, 2)
    kept = (site.state_dir / "runs" / RUN / "000002.pt").read_bytes()
    again = _train(site, config, moved, 2)
    assert first.error is second.error is None
    assert model_hash(again.arrays) == model_hash(second.arrays)
    assert (site.state_dir / "runs" / RUN / "000002.pt").read_bytes() == kept
    # The state of the round before matters: a site without it ends elsewhere.
    fresh = _train(replace(site, state_dir=site.state_dir / "elsewhere"), config, moved, 2)
    assert model_hash(fresh.arrays) != model_hash(second.arrays)


def test_a_full_disk_is_a_code_and_the_round_can_be_repeated(site: Site, config: RunConfig, small_disk: Path) -> None:
    cramped = replace(site, state_dir=small_disk / "state")
    (small_disk / "ballast").write_bytes(bytes(800_000))
    model = arrays_of(build_model(config.model, config.seed))
    assert _train(cramped, config, model, 1).error == "SITE_IO"
    assert not [path for path in small_disk.rglob("*") if path.name.endswith((".pt", ".tmp"))]
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert model_hash(_train(cramped, config, model, 1).arrays) == model_hash(_train(site, config, model, 1).arrays)


def test_what_a_site_keeps_is_bounded(site: Site) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter])
    for number in range(1, 7):
        save_optimiser(site, RUN, number, optimiser)
        (site.state_dir / "runs" / RUN / f".{number:06d}.pt.77.tmp").touch()
    assert sorted(path.name for path in (site.state_dir / "runs" / RUN).iterdir()) == [
        ".000006.pt.77.tmp",
        *("000004.pt", "000005.pt", "000006.pt"),
    ]
    for run, days in (("cd" * 16, 40), ("ef" * 16, 20)):
        save_optimiser(site, run, 1, optimiser)
        os.utime(site.state_dir / "runs" / run / "000001.pt", (time.time() - days * 86400,) * 2)
    save_optimiser(site, RUN, 7, optimiser)
    assert {path.parent.name for path in (site.state_dir / "runs").glob("*/*.pt")} == {RUN, "ef" * 16}


@pytest.mark.parametrize("damage", [b"", b"not a state", None])
def test_a_damaged_or_absent_state_means_a_fresh_optimiser(site: Site, damage: bytes | None) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimiser.step()
    save_optimiser(site, RUN, 1, optimiser)
    path = site.state_dir / "runs" / RUN / "000001.pt"
    path.unlink() if damage is None else path.write_bytes(damage)
    fresh = torch.optim.AdamW([parameter])
    load_optimiser(site, RUN, 2, fresh)
    assert fresh.state_dict()["state"] == {}


def test_each_tasks_optimiser_state_goes_on_from_the_disk(site: Site, config: RunConfig) -> None:
    settings = replace(config.train, patch_size=16, schedule="constant")
    images = np.random.default_rng(0).random((2, 1, 16, 16), np.float32)
    splits = {task: PreparedSplit(TASKS[task], [StoredCase("c", "p", images)]) for task in ("CT", "MRI")}

    def trained(pause: bool) -> dict[str, torch.Tensor]:
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1))
        torch.nn.init.constant_(model[0].weight, 0.1)
        torch.nn.init.zeros_(model[0].bias)
        optimiser, rng = make_optimiser(model, settings), np.random.default_rng(1)
        own = {task: {"0.bias": torch.zeros(1)} for task in splits}
        for round_number in (1, 2):
            if pause and round_number == 2:
                save_optimiser(site, RUN, 1, optimiser)
                optimiser = make_optimiser(model, settings)
                load_optimiser(site, RUN, 2, optimiser)
            train(model, splits, settings, rng=rng, num_steps=8, optimiser=optimiser, own=own)
        assert {"CT", "MRI"} < set(optimiser.state_dict()["state"])
        return {"weight": model[0].weight.detach(), **{task: values["0.bias"] for task, values in own.items()}}

    straight, paused = trained(pause=False), trained(pause=True)
    assert all(torch.equal(paused[key], value) for key, value in straight.items())


def _own_after(site: Site, number: int) -> list[float]:
    return [float(value[0]) for value in load_own(site, RUN, number).values()]


def test_a_round_after_a_long_absence_can_be_repeated_with_the_sites_own_parameters(site: Site) -> None:
    for number in (4, 10):
        save_own(site, RUN, number, {"a": np.full(1, number, np.float32)})
    assert _own_after(site, 9) == [4]
    (site.state_dir / "runs" / RUN / "000010.safetensors").write_bytes(b"damaged")
    assert _own_after(site, 10) == [4]


def test_the_sites_own_parameters_that_are_kept_are_bounded(site: Site) -> None:
    for number in (1, 2, 6, 7, 20, 21):
        save_own(site, RUN, number, {"a": np.full(1, number, np.float32)})
    kept = sorted(path.name for path in (site.state_dir / "runs" / RUN).glob("*.safetensors"))
    assert kept == ["000007.safetensors", "000020.safetensors", "000021.safetensors"]
