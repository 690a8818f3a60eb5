"""Every fault that `tat data check` promises to find is found, and nothing else; no image is changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from data_sets import TEN, head, make_data_set, with_noise, write_splits
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage, generate_uid
from typer.testing import CliRunner

from tat_core.data.check import Report, check
from tat_core.data.check_case import unit_findings
from tat_core.data.commands import app
from tat_core.data.dicom_write import write_dicom_series
from tat_core.data.prepared import open_split, prepare
from tat_core.data.volume import Volume, read_volume, write_nifti
from tat_core.tasks import CT, MRI, PET


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("clean"))


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "set"))


def codes(report: Report, level: str = "") -> set[tuple[str, str]]:
    return {(finding.case, finding.code) for finding in report.findings if level in ("", finding.level)}


def content(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_clean_data_set_is_clean(folder: Path) -> None:
    before = content(folder)
    report = check(folder)
    assert report.findings == ()
    assert report.exit_code == 0
    assert content(folder) == before


def change(folder: Path, side: str, edit: Callable[[Volume], Volume]) -> None:
    path = folder / side / "case-03.nii.gz"
    write_nifti(edit(read_volume(path, CT)), path)


def voxels(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Volume], Volume]:
    return lambda volume: Volume(edit(volume.voxels).astype(np.float32), volume.affine, volume.unit)


def moved_affine(volume: Volume) -> Volume:
    affine = volume.affine.copy()
    affine[0, 3] += 5
    return Volume(volume.voxels, affine, volume.unit)


def with_text(array: np.ndarray) -> np.ndarray:
    marked = array.copy()
    marked[2:4, 2:30:2, :] = 3000
    return marked


def with_empty_slices(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, np.full((40, 36, 2), -1000.0)], axis=2)


@pytest.mark.parametrize(
    ("side", "edit", "code"),
    [
        ("LQ", voxels(lambda a: a[:, :, :3]), "unreadable"),
        ("LQ", moved_affine, "unreadable"),
        ("LQ", voxels(lambda a: np.where(a > 200, np.nan, a)), "unreadable"),
        ("LQ", voxels(lambda a: np.roll(a, 4, axis=0)), "shifted"),
        ("LQ", voxels(lambda a: np.full_like(a, -1000)), "constant"),
        ("HQ", voxels(lambda a: a + 1024), "unit"),
        ("HQ", voxels(lambda a: a / 1000), "unit"),
    ],
)
def test_bad_case_goes_to_quarantine(folder: Path, side: str, edit, code: str) -> None:
    change(folder, side, edit)
    report = check(folder)
    assert ("case-03", code) in codes(report, "error")
    assert report.exit_code == 2
    assert list(json.loads((folder / "quarantine.json").read_text())["cases"]) == ["case-03"]
    write_nifti(with_noise(head(3), 1), folder / "LQ" / "case-03.nii.gz")
    write_nifti(head(3), folder / "HQ" / "case-03.nii.gz")
    assert check(folder).findings == ()  # repaired cases come back
    assert json.loads((folder / "quarantine.json").read_text())["cases"] == {}


@pytest.mark.parametrize(
    ("edit", "code"),
    [(with_text, "burned-in"), (with_empty_slices, "empty-slices")],
)
def test_warnings_about_content(folder: Path, edit, code: str) -> None:
    for side in ("LQ", "HQ"):
        change(folder, side, voxels(edit))
    report = check(folder)
    assert codes(report) == {("case-03", code)}
    assert report.exit_code == 1


def test_identical_sides(folder: Path) -> None:
    shutil.copy(folder / "HQ" / "case-03.nii.gz", folder / "LQ" / "case-03.nii.gz")
    assert codes(check(folder)) >= {("case-03", "identical")}


def test_pairing(folder: Path) -> None:
    (folder / "LQ" / "case-03.nii.gz").unlink()
    for side in ("LQ", "HQ"):
        (folder / side / "case-05.nii.gz").rename(folder / side / "extra.nii.gz")
    found = codes(check(folder))
    assert found >= {("case-03", "unpaired"), ("case-05", "unpaired"), ("extra", "unused")}


def test_patient_on_two_sides_and_too_few_patients(folder: Path) -> None:
    write_splits(
        folder,
        {name: entry | {"patient": "p01" if name in ("case-01", "case-09") else entry["patient"]} for name, entry in TEN.items()},
    )
    assert codes(check(folder), "error") == {("", "leak")}
    write_splits(folder, {name: entry | {"patient": f"p{entry['split']}"} for name, entry in TEN.items()})
    assert codes(check(folder)) == {("", "few-patients")}
    write_splits(folder, {name: entry | {"patient": ""} for name, entry in TEN.items()})
    assert ("case-00", "no-patient") in codes(check(folder), "error")


def test_duplicates_are_found_by_content(folder: Path) -> None:
    for source, target in (("case-01", "case-02"), ("case-04", "case-09")):
        for side in ("LQ", "HQ"):
            shutil.copy(folder / side / f"{source}.nii.gz", folder / side / f"{target}.nii.gz")
    report = check(folder)
    assert codes(report, "warning") == {("case-02", "duplicate")}
    assert ("case-09", "duplicate") in codes(report, "error")


def copy_case(folder: Path, source: str, target: str) -> None:
    for side in ("LQ", "HQ"):
        shutil.copy(folder / side / f"{source}.nii.gz", folder / side / f"{target}.nii.gz")


def test_an_unused_copy_costs_no_used_case(folder: Path) -> None:
    copy_case(folder, "case-02", "a-copy")
    report = check(folder)
    assert set(report.quarantine) == {"a-copy"}
    assert "of another split" not in report.quarantine["a-copy"]
    assert open_split(prepare(folder), "train").num_patients == 8


def test_an_unused_copy_hides_no_copy_across_splits(folder: Path) -> None:
    copy_case(folder, "case-02", "a-copy")
    copy_case(folder, "case-02", "case-09")
    assert set(check(folder).quarantine) == {"a-copy", "case-09"}


def test_two_unused_copies_of_each_other_are_a_warning(folder: Path) -> None:
    copy_case(folder, "case-02", "a-copy")
    write_splits(folder, {name: entry for name, entry in TEN.items() if name != "case-02"})
    report = check(folder)
    assert ("case-02", "duplicate") in codes(report, "warning")
    assert report.quarantine == {}


def test_identifying_names_and_headers(folder: Path) -> None:
    cases = dict(TEN)
    for old, new in (("case-01", "Meier_Anna"), ("case-02", "20211204-head"), ("case-04", "1234567890")):
        cases[new] = cases.pop(old)
        for side in ("LQ", "HQ"):
            (folder / side / f"{old}.nii.gz").rename(folder / side / f"{new}.nii.gz")
    write_splits(folder, cases)
    image = nib.load(folder / "LQ" / "case-05.nii.gz")
    image.header["descrip"] = b"MEIER^ANNA"
    nib.save(image, folder / "LQ" / "case-05.nii.gz")
    (folder / "LQ" / "case-06.nii.gz").unlink()
    volume = Volume(np.round(with_noise(head(6), 6).voxels), head(6).affine, "HU")
    write_dicom_series(
        volume, folder / "LQ" / "case-06", modality="CT", patient="x", study_key="s", series_key="r",
        extra={"PatientIdentityRemoved": "NO", "PatientBirthDate": "19700101"},
    )  # fmt: skip
    found = codes(check(folder))
    assert found == {
        *((name, "identifying-name") for name in ("Meier_Anna", "20211204-head", "1234567890")),
        *(("case-05", "identifying-header"), ("case-06", "identifying-header")),
    }


def test_units_of_mri_and_pet() -> None:
    image = np.abs(np.random.default_rng(0).normal(500, 300, (3, 20, 20))).astype(np.float32)
    assert [f.level for f in unit_findings("", image, MRI)] == []
    assert [f.level for f in unit_findings("", image / 2000, MRI)] == ["error"]
    assert [f.code for f in unit_findings("", image * 20, MRI)] == ["range"]
    assert [f.code for f in unit_findings("", image - 500, MRI)] == ["negative"]
    assert [f.level for f in unit_findings("", image * 50, PET)] == ["error"]
    assert [f.level for f in unit_findings("", image / 100, PET)] == []
    assert [f.level for f in unit_findings("", image / 1e5, PET)] == ["warning"]


def test_other_files_beside_the_images_of_a_series_harm_no_case(folder: Path) -> None:
    (folder / "HQ" / "case-03.nii.gz").unlink()
    volume = Volume(np.round(head(3).voxels), head(3).affine, "HU")
    series = folder / "HQ" / "case-03"
    named = {"PatientIdentityRemoved": "NO", "PatientBirthDate": "19700101"}
    write_dicom_series(volume, series, modality="CT", patient="x", study_key="s", series_key="r", extra=named)
    (series / "!readme.txt").write_text("viewer")
    (series / "0-empty").write_bytes(b"")
    directory = FileDataset(None, Dataset(), preamble=b"\0" * 128, file_meta=FileMetaDataset())
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.save_as(series / "0-DICOMDIR")  # is DICOM, but says nothing of the images' headers
    report = check(folder)
    assert codes(report) == {("case-03", "identifying-header")}
    assert report.quarantine == {}


def test_bad_cases_taken_out_of_the_splits_do_not_count(folder: Path) -> None:
    (folder / "LQ" / "case-03.nii.gz").write_bytes(b"nonsense")
    assert ("", "mostly-bad") in codes(check(folder), "error")
    write_splits(folder, {name: entry for name, entry in TEN.items() if name != "case-03"})
    report = check(folder)
    assert ("", "mostly-bad") not in codes(report)
    assert set(report.quarantine) == {"case-03"}
    assert open_split(prepare(folder), "train").num_patients == 7


def test_over_five_per_cent_bad_is_refused_and_less_goes_on(folder: Path, tmp_path: Path) -> None:
    (folder / "LQ" / "case-03.nii.gz").write_bytes(b"nonsense")
    assert ("", "mostly-bad") in codes(check(folder), "error")
    with pytest.raises(ValueError, match="1 of 10"):
        prepare(folder)
    large = make_data_set(tmp_path / "large", {f"c{k:02}": {"patient": f"p{k}", "split": "train"} for k in range(20)})
    (large / "LQ" / "c03.nii.gz").write_bytes(b"nonsense")
    train = open_split(prepare(large), "train")
    assert train.num_patients == 19
    assert list(json.loads((large / "quarantine.json").read_text())["cases"]) == ["c03"]


def test_command_prints_for_people_and_programs(folder: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["check", str(folder), "--workers", "1"]).exit_code == 0
    (folder / "LQ" / "case-03.nii.gz").unlink()
    result = runner.invoke(app, ["check", str(folder), "--workers", "1"])
    assert result.exit_code == 2
    assert "case-03" in result.stdout
    result = runner.invoke(app, ["check", str(folder), "--json", "--workers", "1"])
    parsed = json.loads(result.stdout)
    assert parsed["exit_code"] == result.exit_code == 2
    assert {"level", "case", "code", "what", "why", "do"} == set(parsed["findings"][0])
