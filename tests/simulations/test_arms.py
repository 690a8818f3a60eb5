"""Scoring hospitals that are not the samples: several tasks at one of them, or no test patients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from simulations.arms import Job, score
from simulations.run import summarise
from tat_core.checkpoint import arrays_of, save_model
from tat_core.config import load_config
from tat_core.model.tat import build_model


def _site(folder: Path, data: dict[str, Path]) -> Path:
    for task, source in data.items():
        shutil.copytree(source, folder / task)
    (folder / "site.yaml").write_text(
        yaml.safe_dump({"name": folder.name, "data": {task: task for task in data}, "state_dir": "s"})
    )
    return folder / "site.yaml"


def test_two_tasks_at_one_hospital_are_scored_each_and_no_test_patients_at_another_are_no_error(
    smoke_hospitals: list[Path], tmp_path: Path
) -> None:
    ct, mri = smoke_hospitals[0] / "CT", smoke_hospitals[2] / "MRI"
    config = load_config("smoke", ["federation.fine_tune_steps=0"])
    jobs = [
        Job(_site(tmp_path / name, data), config, tmp_path)
        for name, data in (("both", {"CT": ct, "MRI": mri}), ("one", {"CT": ct}))
    ]
    listing = tmp_path / "one/CT/splits.json"
    splits = json.loads(listing.read_text())
    splits["cases"] = {case: entry for case, entry in splits["cases"].items() if entry["split"] != "test"}
    listing.write_text(json.dumps(splits))
    arrays = arrays_of(build_model(config.model, 1))
    for name in ("model", "alone/both", "alone/one"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_model(tmp_path / f"{name}.safetensors", arrays, config.model, {"round": 1})

    results = [score(job) for job in jobs]
    summary = summarise(config, tmp_path, results, {})
    assert set(summary["hospitals"]) == {"both CT", "both MRI"}
    assert {name: facts["arms"]["together"]["count"] for name, facts in summary["hospitals"].items()} == {
        "both CT": 4,
        "both MRI": 4,
    }
    assert set(summary["tasks"]) == {"CT", "MRI"}
    assert sorted(path.stem for path in (tmp_path / "panels").iterdir()) == ["both CT", "both MRI"]
