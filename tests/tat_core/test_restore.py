"""A study in, a derived study out: values, geometry, headers and refusals."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from dicom_samples import multi_frame, pet_header, turned_affine

from tat_core.checkpoint import arrays_of, save_model
from tat_core.config import ModelConfig
from tat_core.data.dicom_derive import Derivation, write_derived_series
from tat_core.data.dicom_read import read_dicom_files
from tat_core.data.dicom_write import new_item, write_dicom_series
from tat_core.data.volume import Volume, read_volume, write_nifti
from tat_core.model.tat import build_model
from tat_core.restore import RestoreOptions, restore_study, restore_volume
from tat_core.tasks import CT, MRI, PET, TASKS

SAMPLES = Path(__file__).parents[2] / "simulations" / "images"
TINY = ModelConfig(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 1, 1), tren_features=4, tren_code=16)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, arrays_of(build_model(TINY, seed=0)), TINY)
    return path


class Brighter(torch.nn.Module):
    """Adds a hundredth of the range, so that what must come out is known."""

    def forward(self, lq: torch.Tensor) -> torch.Tensor:
        return lq + 0.01


def abdomen(slices: int = 3, size: int = 64) -> Volume:
    whole = read_volume(SAMPLES / "ct_abdomen", CT)
    affine = whole.affine.copy()
    affine[:3, :2] *= 512 / size
    voxels = whole.voxels[:: 512 // size, :: 512 // size, :slices]
    return Volume(np.ascontiguousarray(voxels), affine, "HU")


def source_series(folder: Path, volume: Volume | None = None, modality: str = "CT") -> Path:
    write_dicom_series(
        volume or abdomen(),
        folder,
        modality=modality,
        patient="p-1",
        study_key="study",
        series_key="series",
        description="CT Body 3.0",
    )
    return folder


def test_restored_values_are_exact_and_padding_passes() -> None:
    volume = abdomen()
    volume.voxels[0, 0, 0] = -2000  # padding outside the range
    restored = restore_volume(Brighter(), volume, CT, RestoreOptions(tile_size=48, tile_overlap=8))
    expected = np.clip(volume.voxels + 40.96, -1024, 3072)
    expected[0, 0, 0] = -2000
    np.testing.assert_allclose(restored.voxels, expected, atol=0.01)
    np.testing.assert_array_equal(restored.affine, volume.affine)


def test_dicom_series_becomes_a_derived_series(tmp_path: Path, model_file: Path) -> None:
    source = source_series(tmp_path / "in" / "série 1")
    (result,) = restore_study(source, model_file, tmp_path / "out", RestoreOptions(residual=True, contact_sheet=True))
    assert result.error == ""
    restored, residual, sheet = result.outputs
    assert sheet.read_bytes()[:4] == b"\x89PNG"
    before, after, difference = (read_volume(path, CT) for path in (source, restored, residual))
    np.testing.assert_array_equal(after.affine, before.affine)
    np.testing.assert_allclose(after.voxels - before.voxels, difference.voxels, atol=1.01)
    assert np.abs(difference.voxels).max() > 0
    originals = {ds.ImagePositionPatient[2]: ds for ds in map(pydicom.dcmread, source.iterdir())}
    uids = set()
    for path in restored.iterdir():
        derived = pydicom.dcmread(path)
        original = originals[derived.ImagePositionPatient[2]]
        for keyword in (
            "SOPClassUID",
            "PatientID",
            "StudyInstanceUID",
            "FrameOfReferenceUID",
            "PixelSpacing",
            "ImageOrientationPatient",
        ):
            assert derived[keyword].value == original[keyword].value
        assert derived.SeriesInstanceUID != original.SeriesInstanceUID
        assert derived.SOPInstanceUID == derived.file_meta.MediaStorageSOPInstanceUID
        assert derived.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert "research use" in derived.SeriesDescription
        assert derived.SourceImageSequence[0].ReferencedSOPInstanceUID == original.SOPInstanceUID
        assert derived.DerivationDescription
        assert derived.DerivationCodeSequence[0].CodeMeaning
        assert re.search(r"sha256 [0-9a-f]{64}", derived.ContributingEquipmentSequence[-1].ContributionDescription)
        assert (derived.BitsStored, derived.pixel_array.dtype) == (original.BitsStored, original.pixel_array.dtype)
        uids.add(derived.SOPInstanceUID)
    assert len(uids) == 3
    (again,) = restore_study(source, model_file, tmp_path / "out", RestoreOptions())
    assert "nothing was overwritten" in again.error


def test_compressed_sample_series_round_trip(tmp_path: Path, model_file: Path) -> None:
    for name in ("000.dcm", "001.dcm"):
        (tmp_path / "in").mkdir(exist_ok=True)
        dataset = pydicom.dcmread(SAMPLES / "mr_brain_pd" / name)
        assert dataset.file_meta.TransferSyntaxUID.is_compressed
        dataset.save_as(tmp_path / "in" / name)
    (result,) = restore_study(tmp_path / "in", model_file, tmp_path / "out", RestoreOptions())
    assert result.error == ""
    before, after = (read_volume(path, MRI) for path in (tmp_path / "in", result.outputs[0]))
    np.testing.assert_allclose(after.affine, before.affine)
    assert after.voxels.min() >= 0


def test_enhanced_multi_frame_stays_one_object(tmp_path: Path, model_file: Path) -> None:
    volume = Volume(
        np.random.default_rng(0).uniform(-1000, 1000, (24, 16, 4)).round().astype(np.float32),
        turned_affine((0, 1, 2), (-1, -1, 1)),
        "HU",
    )
    (tmp_path / "in").mkdir()
    source = multi_frame(volume, tmp_path / "in")
    (result,) = restore_study(source, model_file, tmp_path / "out", RestoreOptions())
    assert result.error == ""
    before, after = (read_volume(path, CT) for path in (source, result.outputs[0]))
    np.testing.assert_array_equal(after.affine, before.affine)
    direct = restore_study(tmp_path / "in" / "single", model_file, tmp_path / "out2", RestoreOptions())[0]
    np.testing.assert_array_equal(after.voxels, read_volume(direct.outputs[0], CT).voxels)


def holders(dataset: pydicom.Dataset) -> list[pydicom.Dataset]:
    """The object itself and each of its functional groups."""
    return [dataset, *dataset.SharedFunctionalGroupsSequence, *dataset.PerFrameFunctionalGroupsSequence]


@pytest.mark.parametrize("shared", [False, True])
def test_residual_of_a_multi_frame_object_reads_back(tmp_path: Path, shared: bool) -> None:
    (tmp_path / "in").mkdir()
    source = multi_frame(Volume(np.zeros((8, 6, 4), np.float32), np.eye(4), "HU"), tmp_path / "in", shared_rescale=shared)
    dataset = pydicom.dcmread(source)
    for holder in holders(dataset):  # both would describe the source's values and not the residual's
        holder.FrameVOILUTSequence = [new_item(WindowCenter=40, WindowWidth=400)]
        holder.RealWorldValueMappingSequence = [new_item(RealWorldValueSlope=1.0, RealWorldValueIntercept=-1024.0)]
    dataset.save_as(source)
    residual = np.full((4, 6, 8), 5.0, np.float32)
    residual[1], residual[2, 0, 0] = -7.0, 50_000.0  # more than int16 holds at the source's slope
    write_derived_series(read_dicom_files([source], "CT"), residual, tmp_path / "out", Derivation("ab" * 32, "x", "residual"))
    after = read_volume(tmp_path / "out", CT).voxels.transpose(2, 1, 0)
    np.testing.assert_array_equal(after[[0, 1, 3]], residual[[0, 1, 3]])
    np.testing.assert_allclose(after[2], residual[2], atol=1.0)
    derived = pydicom.dcmread(tmp_path / "out" / "0000.dcm")
    for holder in holders(derived):
        assert "RealWorldValueMappingSequence" not in holder
    for holder in holders(derived)[1:]:
        assert "FrameVOILUTSequence" not in holder
        for item in holder.get("PixelValueTransformationSequence", []):
            assert (item.RescaleIntercept, item.RescaleType) == (0, "HU")


def test_frames_that_came_twice_leave_the_multi_frame_object(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = multi_frame(Volume(abdomen(4, 16).voxels, np.eye(4), "HU"), tmp_path / "in")
    dataset = pydicom.dcmread(source)
    first = dataset.PixelData[: 2 * dataset.Rows * dataset.Columns]
    dataset.PerFrameFunctionalGroupsSequence.insert(0, dataset.PerFrameFunctionalGroupsSequence[0])
    dataset.NumberOfFrames, dataset.PixelData = 5, first + dataset.PixelData
    dataset.save_as(source)
    series = read_dicom_files([source], "CT")
    assert len(series.frames) == 4
    write_derived_series(series, series.voxels.transpose(2, 1, 0), tmp_path / "out", Derivation("ab" * 32, "x"))
    np.testing.assert_array_equal(read_volume(tmp_path / "out", CT).voxels, series.voxels)


def test_real_world_values_go_where_the_slope_changes(tmp_path: Path) -> None:
    voxels = np.ones((8, 6, 2), np.float32)
    source = source_series(tmp_path / "in", Volume(voxels, np.eye(4), "SUV"), "PT")
    edited(source, RealWorldValueMappingSequence=[new_item(RealWorldValueSlope=1 / 65535, RealWorldValueIntercept=0.0)])
    series = read_dicom_files(list(source.iterdir()), "PET")
    stack = np.stack([np.full((6, 8), 0.5, np.float32), np.full((6, 8), 2.0, np.float32)])
    for kind, kept in (("restored", [True, False]), ("residual", [False, False])):
        write_derived_series(series, stack, tmp_path / kind, Derivation("ab" * 32, "x", kind))
        derived = [pydicom.dcmread(tmp_path / kind / f"000{k}.dcm") for k in range(2)]
        assert ["RealWorldValueMappingSequence" in dataset for dataset in derived] == kept
        after = read_volume(tmp_path / kind, PET).voxels.transpose(2, 1, 0)
        np.testing.assert_allclose(after, stack, atol=1e-4)


def test_pet_series_fits_its_slopes(tmp_path: Path, model_file: Path) -> None:
    voxels = np.random.default_rng(0).gamma(2, 2, (16, 16, 3)).astype(np.float32) * np.array([1, 0.1, 2], np.float32)
    source = source_series(tmp_path / "in", Volume(voxels, np.diag([-4.0, -4.0, 3.0, 1.0]), "SUV"), "PT")
    (result,) = restore_study(source, model_file, tmp_path / "out", RestoreOptions(residual=True))
    assert result.error == ""
    before, after, residual = (read_volume(path, PET).voxels for path in (source, *result.outputs))
    np.testing.assert_allclose(after - before, residual, atol=1e-3)


def test_pet_in_becquerel_stays_in_becquerel(tmp_path: Path, model_file: Path) -> None:
    """Stored 70 kg and 350 MBq decayed by half: a factor of 2500 Bq/ml for each SUV."""
    suv = np.random.default_rng(0).gamma(2, 2, (16, 16, 3)).astype(np.float32)
    grid = np.diag([-4.0, -4.0, 3.0, 1.0])
    header = pet_header()
    extra = {element.keyword: element.value for element in header}
    series = {"modality": "PT", "patient": "p", "study_key": "s", "series_key": "r", "extra": extra}
    write_dicom_series(Volume(suv * 2500, grid, "SUV"), tmp_path / "in", **series)  # type: ignore[arg-type]
    np.testing.assert_allclose(read_volume(tmp_path / "in", PET).voxels, suv, rtol=1e-3, atol=1e-3)
    (result,) = restore_study(tmp_path / "in", model_file, tmp_path / "out", RestoreOptions(residual=True))
    assert result.error == ""
    restored, residual = (read_volume(path, PET).voxels for path in result.outputs)
    np.testing.assert_allclose(restored - suv, residual, atol=2e-3)
    assert pydicom.dcmread(result.outputs[0] / "0000.dcm").Units == "BQML"


def test_flat_study_is_taken_apart_by_series(tmp_path: Path, model_file: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in (1, 2):
        folder = tmp_path / f"series{number}"
        write_dicom_series(abdomen(2), folder, modality="CT", patient="p", study_key="s", series_key=str(number))
        for path in folder.iterdir():
            path.rename(tmp_path / "in" / f"{number}-{path.name}")
    results = restore_study(tmp_path / "in", model_file, tmp_path / "out", RestoreOptions())
    assert [result.error for result in results] == ["", ""]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["in_1_restored", "in_2_restored"]


@pytest.mark.parametrize(("name", "dtype"), [("a.nii.gz", "int16"), ("b.nii", "float32")])
def test_nifti_keeps_type_and_geometry(tmp_path: Path, model_file: Path, name: str, dtype: str) -> None:
    volume = Volume(abdomen().voxels, turned_affine((2, 0, 1), (1, -1, 1)), "HU")
    write_nifti(volume, tmp_path / name, dtype)
    (result,) = restore_study(tmp_path / name, model_file, tmp_path / "out", RestoreOptions(task="CT", residual=True))
    after = read_volume(result.outputs[0], CT)
    assert after.stored_dtype == dtype
    np.testing.assert_array_equal(after.affine, volume.affine)
    (again,) = restore_study(tmp_path / name, model_file, tmp_path / "out", RestoreOptions(task="CT"))
    assert "nothing was overwritten" in again.error


def test_one_bad_input_does_not_stop_the_others(tmp_path: Path, model_file: Path) -> None:
    source_series(tmp_path / "in" / "good")
    (tmp_path / "in" / "notes").mkdir()
    (tmp_path / "in" / "notes" / "a.txt").write_text("no image")
    write_nifti(abdomen(), tmp_path / "in" / "b.nii.gz")
    results = {
        result.source.name: result for result in restore_study(tmp_path / "in", model_file, tmp_path / "out", RestoreOptions())
    }
    assert results["good"].error == ""
    assert "--task" in results["b.nii.gz"].error
    assert "modality" in results["notes"].error


def edited(folder: Path, **elements: object) -> Path:
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)
    return folder


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"Modality": "US"}, "modality CT, MR or PT"),
        ({"PhotometricInterpretation": "RGB"}, "grey"),
        ({"RescaleIntercept": 1024}, "no air"),
        ({"StudyInstanceUID": ""}, "StudyInstanceUID"),
    ],
)
def test_foreign_images_are_refused(tmp_path: Path, model_file: Path, elements, message: str) -> None:
    source = edited(source_series(tmp_path / "in"), **elements)
    (result,) = restore_study(source, model_file, tmp_path / "out", RestoreOptions())
    assert message in result.error
    assert result.outputs == ()
    assert not (tmp_path / "out").exists()


def test_values_far_outside_and_wrong_models_are_refused(tmp_path: Path, model_file: Path) -> None:
    for task, voxels in (("MRI", 1e5), ("MRI", 0.5), ("PET", 5e4), ("CT", np.nan)):
        with pytest.raises(ValueError, match="restore: expected"):
            restore_volume(
                Brighter(), Volume(np.full((8, 8, 2), voxels, np.float32), np.eye(4), ""), TASKS[task], RestoreOptions()
            )
    damaged = tmp_path / "model.safetensors"
    content = bytearray(model_file.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="sha256"):
        restore_study(tmp_path, damaged, tmp_path / "out", RestoreOptions())


def complaints(path: Path) -> set[str]:
    run = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
    return {
        re.sub(r"<[^>]*>|'[^']*'|[0-9.]{9,}", "", line)
        for line in (run.stdout + run.stderr).splitlines()
        if line.startswith("Error")
    }


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian: dicom3tools) is not installed")
@pytest.mark.parametrize("sample", ["ct_abdomen", "mr_brain_pd", "pet"])
def test_derived_series_is_as_valid_as_its_source(tmp_path: Path, model_file: Path, sample: str) -> None:
    if sample == "pet":
        source = source_series(tmp_path / "in", Volume(np.full((16, 16, 2), 3.0, np.float32), np.eye(4), "SUV"), "PT")
    else:
        source = tmp_path / "in"
        source.mkdir()
        for name in ("000.dcm", "001.dcm"):
            shutil.copy(SAMPLES / sample / name, source)
            if sample == "ct_abdomen":  # small, so that the network is quick
                edit = pydicom.dcmread(source / name)
                edit.decompress()
                edit.PixelData, edit.Rows, edit.Columns = edit.pixel_array[192:320, 192:320].tobytes(), 128, 128
                edit.save_as(source / name)
    (result,) = restore_study(source, model_file, tmp_path / "out", RestoreOptions(residual=True))
    assert result.error == ""
    before = complaints(sorted(source.iterdir())[0])
    for folder in result.outputs:
        assert complaints(folder / "0000.dcm") - before == set()


def test_a_device_that_is_not_there_is_refused_before_any_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: expected one of this computer, got 'toaster'"):
        restore_study(tmp_path, tmp_path / "model.safetensors", tmp_path / "out", RestoreOptions(device="toaster"))
