"""The store that training reads: right, resumable, quick."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_sets import TEN, make_data_set, write_splits
from dying import dies
from typer.testing import CliRunner

from tat_core.data import prepared
from tat_core.data.commands import app
from tat_core.data.describe import fingerprint
from tat_core.data.parallel import run_each
from tat_core.data.patches import sample_batch
from tat_core.data.prepared import PreparedSplit, StoredCase, open_split, prepare
from tat_core.data.volume import read_volume, to_display
from tat_core.tasks import CT, MRI, denormalise


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data_set(tmp_path_factory.mktemp("prepared"))
    prepare(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def test_slices_are_those_of_the_files(made: Path) -> None:
    store = made / "prepared"
    test = open_split(store, "test")
    assert (len(test), test.num_patients, test.task) == (4, 1, CT)
    assert {len(open_split(store, split)) for split in ("train", "validation")} == {32, 4}
    expected = [to_display(read_volume(made / side / "case-09.nii.gz", CT)) for side in ("LQ", "HQ")]
    for index in range(4):
        assert (test.case(index), test.patient(index)) == ("case-09", "p09")
        for side, image in enumerate(test.pair(index)):
            assert image.dtype == np.float32
            np.testing.assert_array_equal(image, expected[side][index])
            with pytest.raises(ValueError, match="read-only"):
                image[0, 0] = 1
    with pytest.raises(IndexError):
        test.pair(4)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reads: list[str] = []
    original = prepared.read_pair

    def counted(case, task):
        reads.append(case.name)
        return original(case, task)

    monkeypatch.setattr(prepared, "read_pair", counted)
    return reads


def test_second_call_reads_nothing_and_a_change_only_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    prepare(folder)
    assert reads == []
    os.utime(folder / "LQ" / "case-02.nii.gz", ns=(1, 1))
    prepare(folder)
    assert reads == ["case-02"]
    write_splits(folder, {name: entry for name, entry in TEN.items() if name != "case-00"})
    prepare(folder)
    assert reads == ["case-02"]
    assert len(list((folder / "prepared").glob("*.npy"))) == 9
    assert open_split(folder / "prepared", "train").num_patients == 7


def test_an_interrupted_call_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "prepared")
    original = prepared.read_pair

    def interrupted(case, task):
        if case.name == "case-06":
            raise KeyboardInterrupt
        return original(case, task)

    monkeypatch.setattr(prepared, "read_pair", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder)
    with pytest.raises(ValueError, match="manifest"):
        open_split(folder / "prepared", "train")
    monkeypatch.setattr(prepared, "read_pair", original)
    reads = count_reads(monkeypatch)
    with (folder / "prepared" / "journal.jsonl").open("a") as journal:
        journal.write('{"case": "cut o')
    prepare(folder)
    assert reads == [f"case-{number:02}" for number in (6, 7, 8, 9)]
    assert sorted(path.suffix for path in (folder / "prepared").iterdir()) == [".json", *[".npy"] * 10]


def test_damaged_store_is_refused_not_trusted(folder: Path) -> None:
    victim = next((folder / "prepared").glob("*.npy"))
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        [open_split(folder / "prepared", split) for split in ("train", "validation", "test")]
    prepare(folder)
    assert len(open_split(folder / "prepared", "train")) == 32
    with pytest.raises(ValueError, match="train, validation, test"):
        open_split(folder / "prepared", "all")


@pytest.mark.parametrize("split_by", ["patient", "slices", "published", None])
def test_a_patient_in_several_splits_is_refused_unless_that_is_declared(folder: Path, split_by: str | None) -> None:
    write_splits(folder, {name: entry | {"patient": "Anna"} for name, entry in TEN.items()})
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(about | {"split_by": split_by}))
    if split_by in ("slices", "published"):
        assert open_split(prepare(folder), "test").num_patients == 1
        return
    with pytest.raises(ValueError, match="prepare: expected each patient in one split, got 1 in several; ") as caught:
        prepare(folder)
    assert "Anna" not in str(caught.value)
    assert str(folder) not in str(caught.value)


def test_a_patient_may_have_unused_cases_and_several_in_one_split(folder: Path) -> None:
    unused = {name: {"patient": "p09", "split": ""} for name in ("case-00", "case-01")}
    write_splits(folder, TEN | unused)
    assert open_split(prepare(folder), "train").num_patients == 6
    write_splits(folder, {name: entry | {"patient": "p" + entry["split"]} for name, entry in TEN.items()})
    assert open_split(prepare(folder), "train").num_patients == 1


def test_workers_give_the_same_store(folder: Path) -> None:
    def hashes() -> list[str]:
        manifest = json.loads((folder / "prepared" / "manifest.json").read_text())
        return [entry["sha256"] for entries in manifest["splits"].values() for entry in entries]

    before = hashes()
    shutil.rmtree(folder / "prepared")
    prepare(folder, workers=2)
    assert hashes() == before


def test_two_processes_at_once_make_one_store_and_blame_no_case(folder: Path) -> None:
    expected = prepared.prepare(folder)
    manifest = (expected / "manifest.json").read_text()
    context = mp.get_context("fork")
    for _ in range(5):
        shutil.rmtree(expected)
        with ProcessPoolExecutor(4, mp_context=context) as pool:
            assert set(pool.map(prepare, [folder] * 4)) == {expected}
        assert (expected / "manifest.json").read_text() == manifest
        assert not (folder / "quarantine.json").exists()


def test_a_dying_worker_costs_one_case() -> None:
    outcomes = dict(run_each(dies, range(5), 2, "test"))
    assert {number: outcomes[number] for number in (0, 1, 4)} == {0: 0, 1: 1, 4: 4}
    assert "ended its process" in str(outcomes[2])
    assert "RuntimeError" in str(outcomes[3])


def split_of(arrays: list[np.ndarray], task=CT) -> PreparedSplit:
    return PreparedSplit(task, [StoredCase(f"c{k}", f"p{k}", array) for k, array in enumerate(arrays)])


def test_batches_are_normalised_pairs_of_all_tasks() -> None:
    rng = np.random.default_rng(0)
    arrays = [
        np.stack([image, image + 100]) for image in (rng.uniform(-900, 900, (3, 70, 50)), rng.uniform(-900, 900, (2, 40, 90)))
    ]
    splits = {
        "CT": split_of([array.astype(np.float32) for array in arrays]),
        "MRI": split_of([np.full((2, 4, 64, 64), 819.0, np.float32)], MRI),
    }
    splits["PET"] = PreparedSplit(CT, [])
    batch = sample_batch(splits, 64, 48, np.random.default_rng(1))
    assert batch.lq.shape == batch.hq.shape == (64, 1, 48, 48)
    assert set(batch.tasks) == {"CT", "MRI"}
    assert 16 < batch.tasks.count("MRI") < 48
    for lq, hq, task in zip(batch.lq, batch.hq, batch.tasks, strict=True):
        if task == "CT":
            np.testing.assert_allclose(denormalise(hq, CT) - denormalise(lq, CT), 100, atol=0.01)
        else:
            np.testing.assert_allclose(lq, 0.2, atol=1e-6)
    same = sample_batch(splits, 64, 48, np.random.default_rng(1))
    assert same.tasks == batch.tasks
    assert bool((same.lq == batch.lq).all())
    turned = sample_batch(splits, 64, 48, np.random.default_rng(1), augment=True)
    np.testing.assert_allclose(turned.lq.numpy().mean((1, 2, 3)), batch.lq.numpy().mean((1, 2, 3)), atol=0.2)
    with pytest.raises(ValueError, match="only empty splits"):
        sample_batch({"PET": splits["PET"]}, 1, 8, rng)


def test_augmentation_turns_both_sides_alike() -> None:
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    split = split_of([np.stack([image, image])])
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        batch = sample_batch({"CT": split}, 1, 8, rng, augment=True)
        assert bool((batch.lq == batch.hq).all())
        seen.add(tuple(np.rint(denormalise(batch.lq, CT).numpy().ravel()[[0, 7, 56]]).tolist()))
    assert len(seen) == 8


def test_sampling_is_quick() -> None:
    """Training must never wait for it; the figure itself is measured by simulations/bench/data.py."""
    split = split_of([np.zeros((2, 4, 512, 512), np.float32)])
    rng = np.random.default_rng(0)
    start = time.process_time()
    for _ in range(32):
        sample_batch({"CT": split}, 32, 128, rng)
    assert 1024 / (time.process_time() - start) > 3000


def test_fingerprint_names_nobody(made: Path) -> None:
    described = fingerprint(made)
    assert described["splits"]["train"] == {"patients": 8, "cases": 8, "slices": 32}
    assert described["spacing_mm"] == {"3.00x1.00x1.00": 10}
    assert sum(described["histogram"]["HQ"]) == pytest.approx(1, abs=1e-4)
    text = json.dumps(described)
    assert not any(name in text or entry["patient"] in text for name, entry in TEN.items())


def test_commands(made: Path, folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["prepare", str(folder), "--workers", "1"])
    assert "32 train, 4 validation, 4 test" in result.stdout
    assert json.loads(runner.invoke(app, ["fingerprint", str(made)]).stdout)["task"] == "CT"
    result = runner.invoke(app, ["show", str(folder), "case-09", "-o", str(tmp_path / "a.png")])
    assert result.exit_code == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert isinstance(runner.invoke(app, ["show", str(folder), "nobody"]).exception, ValueError)
    shutil.rmtree(folder / "LQ")
    assert runner.invoke(app, ["simulate", str(folder), "photons=1e5"]).exit_code == 0
    assert len(list((folder / "LQ").iterdir())) == 10
    assert json.loads((folder / "dataset.json").read_text())["low_quality"]["photons"] == 1e5
