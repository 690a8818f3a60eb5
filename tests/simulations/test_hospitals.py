"""The demonstration hospitals: complete, repeatable, honest about their splits, and never half-written."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from client.site import load_site
from simulations import hospitals
from simulations.hospitals import build_hospitals, hospitals_in
from simulations.sources import IMAGES
from tat_core.data.dataset import SPLITS, open_data_set
from tat_core.data.prepared import open_split
from tat_core.data.volume import read_volume

NAMES = ["ct-abdomen", "ct-chest", "mri-pd", "mri-t1", "pet-brain", "pet-trunk"]


def _data_set(site: Path) -> Path:
    (folder,) = load_site(site / "site.yaml").data.values()
    return folder


def test_six_hospitals_two_per_task(smoke_hospitals: list[Path]) -> None:
    assert [site.name for site in smoke_hospitals] == NAMES
    tasks = [_data_set(site).name for site in smoke_hospitals]
    assert tasks == ["CT", "CT", "MRI", "MRI", "PET", "PET"]
    kinds = {
        site.name: {path.suffix for path in (site / task / "LQ").rglob("*") if path.is_file()}
        for site, task in zip(smoke_hospitals, tasks, strict=True)
    }
    assert kinds["ct-abdomen"] == kinds["mri-pd"] == {".dcm"}
    assert kinds["ct-chest"] == kinds["mri-t1"] == kinds["pet-brain"] == {".gz"}


def test_no_slice_and_where_possible_no_patient_on_two_sides(smoke_hospitals: list[Path]) -> None:
    for site in smoke_hospitals:
        folder = _data_set(site)
        data = open_data_set(folder)
        patients = {split: {case.patient for case in data.cases if case.split == split} for split in SPLITS}
        if data.about["split_by"] == "patient":
            assert not patients["train"] & (patients["validation"] | patients["test"])
        places: dict[str, set[tuple[str, float]]] = {split: set() for split in SPLITS}
        for case in data.cases:
            assert case.hq is not None
            volume = read_volume(case.hq, data.task)
            depths = volume.affine[2, 3] + volume.affine[2, 2] * np.arange(volume.voxels.shape[2])
            places[case.split] |= {(case.patient, round(float(depth), 2)) for depth in depths}
        assert not places["train"] & places["test"]
        assert not places["train"] & places["validation"]
        assert not places["validation"] & places["test"]


def test_low_quality_is_poorer_but_the_same_picture(smoke_hospitals: list[Path]) -> None:
    for site in smoke_hospitals:
        folder = _data_set(site)
        test = open_split(folder / "prepared", "test")
        assert 1 <= len(test) <= 8
        lq, hq = test.pair(0)
        assert max(lq.shape) <= 96
        assert lq.dtype == hq.dtype == np.float32
        assert np.abs(lq - hq).max() > 0
        assert np.corrcoef(lq.ravel(), hq.ravel())[0, 1] > 0.6, site.name
        low, high = test.task.intensity_range
        assert (np.mean((hq >= low) & (hq <= high))) > 0.99


def test_patient_lies_as_a_radiologist_expects(smoke_hospitals: list[Path]) -> None:
    """The table is behind (below) the patient and the liver, the brighter bulk of the abdomen, on the image's left."""
    abdomen = open_split(smoke_hospitals[0] / "CT" / "prepared", "train")
    image = abdomen.pair(1)[1]
    rows, columns = np.nonzero(image > -300)
    assert image[rows.max() - 5 :].max() > -900  # the table
    body = image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 :]
    assert sum(((side > 40) & (side < 200)).sum() * sign for side, sign in zip(body, (1, -1), strict=True)) > 0
    assert columns.size


def test_second_call_returns_at_once_and_seed_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hospitals, "HOSPITALS", hospitals.HOSPITALS[1:2])
    (site,) = build_hospitals(tmp_path, "smoke", seed=1)
    manifest = json.loads((site / "CT/prepared/manifest.json").read_text())
    stamp = (site / hospitals.MARKER).stat().st_mtime_ns
    assert build_hospitals(tmp_path, "smoke", seed=1) == [site]
    assert (site / hospitals.MARKER).stat().st_mtime_ns == stamp
    hashes = [[entry["sha256"] for entry in manifest["splits"]["train"]]]
    for name, seed in (("b", 1), ("c", 2)):
        (other,) = build_hospitals(tmp_path / name, "smoke", seed=seed)
        hashes.append(
            [entry["sha256"] for entry in json.loads((other / "CT/prepared/manifest.json").read_text())["splits"]["train"]]
        )
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_interrupted_build_leaves_nothing_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hospitals, "HOSPITALS", hospitals.HOSPITALS[1:2])

    def interrupted(_folder: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(hospitals, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_hospitals(tmp_path, "smoke")
    assert list(tmp_path.iterdir()) == []


def test_a_users_own_hospitals_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("north", "ct-chest"):  # one of them called like a sample
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "site.yaml").write_text("name: mine\n")
        (tmp_path / name / "state/ledger.json").write_text("precious")
    assert hospitals_in(tmp_path, "smoke") == [tmp_path / "ct-chest", tmp_path / "north"]
    with pytest.raises(ValueError, match=r"got ct-chest without built\.json; .* nothing was changed"):
        build_hospitals(tmp_path, "smoke")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct-chest", "north"]
    assert (tmp_path / "ct-chest/state/ledger.json").read_text() == "precious"


def test_samples_are_made_where_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hospitals, "HOSPITALS", hospitals.HOSPITALS[1:2])
    made = hospitals_in(tmp_path / "new", "smoke")
    assert made == hospitals_in(tmp_path / "new", "smoke") == [tmp_path / "new" / "ct-chest"]


def test_unknown_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected profile"):
        build_hospitals(tmp_path, "full")


def test_sample_images_are_small_listed_and_anonymous() -> None:
    files = [path for path in IMAGES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16_000_000
    table = (IMAGES / "README.md").read_text("utf-8")
    for path in IMAGES.iterdir():
        assert path.name == "README.md" or f"`{path.name}" in table, path.name
    for path in IMAGES.rglob("*.dcm"):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        assert dataset.PatientName == dataset.PatientID == path.parent.name
        texts = [element for element in dataset if element.VR in ("PN", "LT", "ST", "UT", "DA", "DT") and element.value]
        assert [element.keyword for element in texts] == ["PatientName"]
        assert not any(element.tag.is_private for element in dataset)
    for path in IMAGES.glob("*.nii.gz"):
        header = nib.load(path).header
        assert not bytes(header["descrip"]).strip(b"\0")
        assert not bytes(header["intent_name"]).strip(b"\0")
        assert not header.extensions


def test_written_dicom_names_nobody(smoke_hospitals: list[Path]) -> None:
    for path in (smoke_hospitals[0] / "CT").rglob("*.dcm"):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        assert str(dataset.PatientID).startswith("patient-")
        assert dataset.StudyDate == dataset.PatientBirthDate == ""
        assert "InstitutionName" not in dataset
