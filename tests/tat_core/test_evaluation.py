from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tat_core.checkpoint import arrays_of, save_model
from tat_core.config import EvaluateConfig, ModelConfig
from tat_core.data.prepared import PreparedSplit, StoredCase, open_split, prepare
from tat_core.data.volume import Volume, write_nifti
from tat_core.evaluate import evaluate_split, score_slices
from tat_core.evaluate_command import command
from tat_core.evaluation import evaluation_of, find_data_sets, label_slices, usable_device, write_evaluation
from tat_core.model.tat import build_model
from tat_core.tasks import CT, PET, TASKS

SMALL = ModelConfig(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, tren_features=8, tren_code=8)


def stored(name: str, patient: str, num_slices: int, seed: int) -> StoredCase:
    rng = np.random.default_rng(seed)
    hq = rng.uniform(0, 10, (num_slices, 24, 24))
    return StoredCase(name, patient, np.stack([hq + rng.normal(0, 1 + seed, hq.shape), hq]).astype(np.float32))


@pytest.fixture
def split() -> PreparedSplit:
    cases = [stored("a1", "anna", 3, 0), stored("a2", "anna", 2, 1), stored("b1", "bert", 4, 2)]
    cases[0].array[1, 1] = 5.0  # a target without contrast
    return PreparedSplit(PET, cases)


def evaluation(split: PreparedSplit) -> dict:
    rows = list(label_slices(score_slices(None, split, EvaluateConfig()), split, "pet"))
    return evaluation_of(rows, {"file": "m.safetensors", "sha256": "ab"}, "test", EvaluateConfig())


def test_every_level_is_a_mean_over_its_slices(split: PreparedSplit) -> None:
    found = evaluation(split)
    slices = [entry for entry in found["slices"] if entry["input"]]
    assert [(entry["case"], entry["slice"]) for entry in slices] == [
        *(("a1", 0), ("a1", 2), ("a2", 0), ("a2", 1)),
        *(("b1", number) for number in range(4)),
    ]

    def mean(**where: str) -> float:
        chosen = [entry for entry in slices if all(entry[key] == value for key, value in where.items())]
        return float(np.mean([entry["input"]["psnr"] for entry in chosen]))

    for level in ("cases", "patients", "data_sets"):
        for entry in found[level]:
            where = {key: entry[key] for key in ("case", "patient", "data_set") if key in entry}
            assert entry["input"]["psnr"] == pytest.approx(mean(**where))
    assert [(entry["case"], entry["slices"], entry["not_scored"]) for entry in found["cases"]] == [
        ("a1", 2, 1),
        ("a2", 2, 0),
        ("b1", 4, 0),
    ]
    task = found["tasks"]["PET"]
    assert (task["slices"], task["not_scored"], task["patients"]) == (8, 1, 2)
    assert task["evaluation_window"] == [0.0, 20.0]
    assert task["data_range"] == "per slice: target max − min after clipping"
    assert task["input"]["psnr"] == pytest.approx(evaluate_split(None, split, EvaluateConfig())["input"].mean()["psnr"])
    assert task["restored"] is None
    assert task["gain_db"] is None


def test_the_csv_holds_the_same_numbers_with_window_and_data_range(split: PreparedSplit, tmp_path: Path) -> None:
    found = evaluation(split)
    csv_file, json_file = write_evaluation(found, tmp_path / "out")
    assert json.loads(json_file.read_text(encoding="utf-8")) == found
    with open(csv_file, encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["level"] for row in table] == ["task", "data_set", *["patient"] * 2, *["case"] * 3, *["slice"] * 9]
    assert {(row["unit"], row["window_low"], row["window_high"]) for row in table} == {("SUV", "0.0", "20.0")}
    last = table[-1]
    assert float(last["input_psnr_db"]) == found["slices"][-1]["input"]["psnr"]
    target = np.clip(split.pair(8)[1], 0, 20)
    assert float(last["data_range"]) == pytest.approx(float(target.max() - target.min()))
    blank = next(row for row in table if (row["level"], row["case"], row["slice"]) == ("slice", "a1", "1"))
    assert (blank["slices"], blank["input_psnr_db"], blank["data_range"]) == ("0", "", "")


def test_no_slice_is_refused() -> None:
    with pytest.raises(ValueError, match="expected slices in the test split"):
        evaluation_of([], {}, "test", EvaluateConfig())


def write_data_set(folder: Path, num_cases: int = 2) -> Path:
    rng = np.random.default_rng(0)
    for side in ("LQ", "HQ"):
        (folder / side).mkdir(parents=True)
    for number in range(num_cases):
        hq = rng.uniform(-160, 240, (20, 24, 2)).astype(np.float32)
        for side, voxels in (("HQ", hq), ("LQ", hq + rng.normal(0, 30, hq.shape).astype(np.float32))):
            write_nifti(Volume(voxels, np.diag([1.0, 1.0, 3.0, 1.0]), CT.unit), folder / side / f"case{number}.nii.gz")
    (folder / "dataset.json").write_text(
        json.dumps({"format": 1, "task": "CT", "unit": CT.unit, "low_quality": {"method": "test"}})
    )
    cases = {f"case{number}": {"patient": f"p{number}", "split": "test"} for number in range(num_cases)}
    (folder / "splits.json").write_text(json.dumps({"cases": cases}))
    return folder


def test_data_sets_are_found_below_a_hospital(tmp_path: Path) -> None:
    one, two = write_data_set(tmp_path / "hospitals" / "a" / "CT", 1), write_data_set(tmp_path / "hospitals" / "b" / "CT", 1)
    assert find_data_sets([tmp_path / "hospitals"]) == {"a/CT": one, "b/CT": two}
    assert find_data_sets([two, tmp_path / "hospitals" / "b"]) == {"b/CT": two}
    with pytest.raises(ValueError, match=r"dataset\.json"):
        find_data_sets([tmp_path / "hospitals", one / "LQ"])


def test_data_sets_whose_last_names_agree_are_all_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    years = [write_data_set(tmp_path / year / "site" / "CT", 1) for year in ("2024", "2025")]
    other = write_data_set(tmp_path / "other" / "CT", 1)
    expected = {"2024/site/CT": years[0], "2025/site/CT": years[1], "other/CT": other}
    assert find_data_sets([*(folder.parent for folder in years), other]) == expected
    monkeypatch.chdir(tmp_path)
    assert list(find_data_sets([other, Path("other"), Path("2024/../other/CT")])) == ["other/CT"]


def test_tat_evaluate(tmp_path: Path) -> None:
    folder = write_data_set(tmp_path / "site" / "CT")
    model = build_model(SMALL, seed=0)
    save_model(tmp_path / "model.safetensors", arrays_of(model), SMALL)
    app = typer.Typer()
    app.command()(command)
    output = tmp_path / "out"
    result = CliRunner().invoke(app, [str(tmp_path / "model.safetensors"), str(folder.parent), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "window [-160, 240] HU" in result.output
    found = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    expected = evaluate_split(model, open_split(prepare(folder), "test"), EvaluateConfig())
    for arm in ("input", "restored"):
        assert found["tasks"]["CT"][arm]["psnr"] == pytest.approx(expected[arm].mean()["psnr"])
    assert found["tasks"]["CT"]["patients"] == 2
    assert set(found["tasks"]) <= set(TASKS)
    assert len(found["slices"]) == 4


def test_a_device_that_is_not_there_is_refused() -> None:
    assert usable_device("cpu").type == "cpu"
    for name in ("cuda:99", "toaster"):
        with pytest.raises(ValueError, match="device: expected one of this computer"):
            usable_device(name)
