"""Reading and writing volumes: geometry, units, and what must be refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_samples import multi_frame, pet_header, ramp_volume, turned_affine, write_ct
from pydicom.data import get_testdata_file
from pydicom.uid import JPEG2000Lossless, RLELossless

from tat_core.data.dicom_write import write_dicom_series
from tat_core.data.volume import Volume, display_axes, from_display, read_volume, to_display, write_nifti
from tat_core.tasks import CT, MRI, PET, TASKS

ORIENTATIONS = [
    (permutation, signs) for permutation in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("permutation", "signs"), ORIENTATIONS)
def test_write_then_read_is_identity_in_every_orientation(tmp_path: Path, permutation, signs) -> None:
    volume = ramp_volume(turned_affine(permutation, signs))
    write_nifti(volume, tmp_path / "a.nii", np.int16)
    write_dicom_series(volume, tmp_path / "d", modality="CT", patient="p", study_key="s", series_key="r")
    nifti = read_volume(tmp_path / "a.nii", CT)
    np.testing.assert_array_equal(nifti.voxels, volume.voxels)
    np.testing.assert_array_equal(nifti.affine, volume.affine)
    dicom = read_volume(tmp_path / "d", CT)
    # DICOM sorts slices along its own normal, so a left-handed grid comes back with k reversed, voxels at their places
    for index in ((0, 0, 0), (6, 5, 4), (3, 1, 2)):
        place = volume.affine @ [*index, 1]
        there = np.rint(np.linalg.solve(dicom.affine, place))[:3].astype(int)
        np.testing.assert_allclose(dicom.affine @ [*there, 1], place, atol=1e-6)
        assert dicom.voxels[tuple(there)] == volume.voxels[index]


def test_oblique_geometry_survives_dicom(tmp_path: Path) -> None:
    angle = 0.3
    rotation = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ rotation * [0.859375, 0.859375, 7.0]
    affine[:3, 3] = 1 / 3, -78.3063, -72.7575
    volume = ramp_volume(affine)
    dicom = read_volume(write_ct(tmp_path / "d", volume), CT)
    np.testing.assert_allclose(dicom.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(dicom.voxels, volume.voxels)


@pytest.mark.parametrize(("permutation", "signs"), ORIENTATIONS)
def test_display_orientation(permutation, signs) -> None:
    affine = turned_affine(permutation, signs)
    places = np.stack(np.meshgrid(*(range(n) for n in (4, 5, 6)), indexing="ij"), -1) @ affine[:3, :3].T
    for patient_axis, array_axis, sign in ((2, 0, 1), (1, 1, -1), (0, 2, -1)):
        stack = to_display(Volume(places[..., patient_axis].astype(np.float32), affine, "HU"))
        assert (np.sign(np.diff(stack, axis=array_axis)) == sign).all()


def test_display_round_trip_and_slice_axis() -> None:
    affine = turned_affine((1, 2, 0), (-1, 1, -1))
    affine[:3, 2] *= 2  # thick along the patient's right-left axis: sagittal slices
    volume = ramp_volume(affine)
    stack = to_display(volume)
    assert stack.shape == (5, 6, 7)
    assert display_axes(volume)[0] == (2, 1, 0)
    np.testing.assert_array_equal(from_display(stack * 2, volume).voxels, volume.voxels * 2)


def test_order_of_files_does_not_matter_and_rescale_is_per_slice(tmp_path: Path) -> None:
    folder = write_ct(tmp_path / "d")
    expected = read_volume(folder, CT)
    for number, path in enumerate(sorted(folder.iterdir())):
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, number - 1024
        dataset.PixelData = ((stored.astype(int) - (number - 1024)) * 2).astype(np.int16).tobytes()
        dataset.InstanceNumber = 99
        dataset.save_as(folder / f"{(number * 3) % 5}-shuffled.dcm")
        path.unlink()
    (folder / "DICOMDIR-notes.txt").write_text("not an image")
    volume = read_volume(folder, CT)
    np.testing.assert_array_equal(volume.voxels, expected.voxels)
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert "1 files are not DICOM images" in volume.notes[0]


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless])
def test_compressed_transfer_syntaxes(tmp_path: Path, syntax) -> None:
    volume = Volume(ramp_volume().voxels.repeat(8, 0).repeat(8, 1), np.eye(4), "HU")
    folder = write_ct(tmp_path / "d", volume)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(syntax)
        dataset.save_as(path)
    np.testing.assert_array_equal(read_volume(folder, CT).voxels, volume.voxels[:, :, :])


@pytest.mark.parametrize(
    "name", ["MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_bigendian", "MR_small_implicit"]
)
def test_every_encoding_of_one_image_gives_the_same_voxels(name: str) -> None:
    plain, encoded = (read_volume(Path(str(get_testdata_file(f"{file}.dcm"))), MRI) for file in ("MR_small", name))
    np.testing.assert_array_equal(encoded.voxels, plain.voxels)
    np.testing.assert_array_equal(encoded.affine, plain.affine)


def test_enhanced_multi_frame_equals_single_frame(tmp_path: Path) -> None:
    volume = ramp_volume(turned_affine((0, 1, 2), (-1, -1, 1)))
    enhanced = read_volume(multi_frame(volume, tmp_path), CT)
    single = read_volume(tmp_path / "single", CT)
    np.testing.assert_array_equal(enhanced.voxels, single.voxels)
    np.testing.assert_array_equal(enhanced.affine, single.affine)


def edit(folder: Path, number: int, **elements: object) -> None:
    path = sorted(folder.iterdir())[number]
    dataset = pydicom.dcmread(path)
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)


def test_missing_slice_is_named(tmp_path: Path) -> None:
    folder = write_ct(tmp_path / "d")
    (folder / "0002.dcm").unlink()
    with pytest.raises(ValueError, match="1 are missing"):
        read_volume(folder, CT)


def test_equal_duplicates_are_dropped_and_different_ones_refused(tmp_path: Path) -> None:
    folder = write_ct(tmp_path / "d")
    (folder / "again.dcm").write_bytes((folder / "0002.dcm").read_bytes())
    volume = read_volume(folder, CT)
    assert volume.voxels.shape == (7, 6, 5)
    assert any("came twice" in note for note in volume.notes)
    edit(folder, 5, PixelData=bytes(2 * 7 * 6))
    with pytest.raises(ValueError, match="several different ones"):
        read_volume(folder, CT)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"SeriesInstanceUID": "1.2.3"}, "one series"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, "parallel slices"),
        ({"PixelSpacing": [9, 9]}, "parallel slices"),
        ({"PhotometricInterpretation": "RGB"}, "grey images"),
        ({"Modality": "MR"}, "one modality"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
        ({"ImagePositionPatient": [0, 0, 100]}, "missing"),
    ],
)
def test_mixed_series_are_refused(tmp_path: Path, elements, message) -> None:
    folder = write_ct(tmp_path / "d")
    edit(folder, 4, **elements)
    with pytest.raises(ValueError, match=message):
        read_volume(folder, CT)


def test_wrong_modality_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="modality MR for MRI"):
        read_volume(write_ct(tmp_path / "d"), MRI)


def test_written_dicom_is_valid_and_deterministic(tmp_path: Path) -> None:
    first, second = (write_ct(tmp_path / name) for name in ("a", "b"))
    for one, other in zip(sorted(first.iterdir()), sorted(second.iterdir()), strict=True):
        assert one.read_bytes() == other.read_bytes()
    dataset = pydicom.dcmread(first / "0000.dcm")
    assert dataset.SOPInstanceUID.is_valid
    assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID
    with pytest.raises(ValueError, match="nothing was overwritten"):
        write_ct(first)


def test_pet_series_keeps_suv(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).gamma(2, 2, (8, 8, 3)).astype(np.float32)
    folder = write_ct(tmp_path / "d", Volume(voxels, np.eye(4), "SUV"), modality="PT")
    np.testing.assert_allclose(read_volume(folder, PET).voxels, voxels, atol=voxels.max() / 65535)


@pytest.mark.parametrize("head_first", [False, True])
def test_pet_of_several_beds_gives_the_same_suv_in_both_directions(tmp_path: Path, head_first: bool) -> None:
    """Slices are sorted from the feet up, so that head first the first slice is of the last bed."""
    extra = {element.keyword: element.value for element in pet_header(SeriesTime="150000")}  # reconstructed later
    volume = Volume(np.full((8, 8, 4), 2500.0, np.float32), np.diag([-4.0, -4.0, 3.0, 1.0]), "SUV")
    folder = write_ct(tmp_path / "d", volume, modality="PT", extra=extra)
    beds = ["114946.2", "114946.2", "120946.2", "120946.2"]
    for number, time in enumerate(reversed(beds) if head_first else beds):
        edit(folder, number, AcquisitionTime=time)
    np.testing.assert_allclose(read_volume(folder, PET).voxels, 1.0, rtol=1e-4)


def test_nifti_units_and_notes(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((3, 4, 5, 1), np.int16), None)
    image.header.set_xyzt_units("meter")
    image.header.set_zooms((0.002, 0.002, 0.003, 1))
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz", TASKS["MRI"])
    np.testing.assert_allclose(volume.spacing_mm, (2, 2, 3), rtol=1e-6)
    assert "states no orientation" in volume.notes[0]
    assert volume.stored_dtype == "int16"


def test_integers_are_rounded_and_clipped_when_written(tmp_path: Path) -> None:
    volume = Volume(np.array([[[1.4, 1.6, -40000.0, 40000.0]]], np.float32), np.eye(4), "HU")
    write_nifti(volume, tmp_path / "a.nii.gz", np.int16)
    assert read_volume(tmp_path / "a.nii.gz", CT).voxels.tolist() == [[[1.0, 2.0, -32768.0, 32767.0]]]
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]
