"""A hundred files that a reader may meet and must refuse: each entry makes one below a folder and returns what to read."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from dicom_samples import write_ct

Maker = Callable[[Path], Path]
RAW = pydicom.uid.ExplicitVRLittleEndian


def _series(folder: Path) -> list[Path]:
    return sorted(write_ct(folder / "series").iterdir())


def _with_bytes(suffix: str, content: bytes) -> Maker:
    def make(folder: Path) -> Path:
        path = folder / f"a{suffix}"
        path.write_bytes(content)
        return path

    return make


def _with_element(**elements: object) -> Maker:
    """A series in which one slice has other elements; None deletes."""

    def make(folder: Path) -> Path:
        path = _series(folder)[2]
        dataset = pydicom.dcmread(path)
        for keyword, value in elements.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        dataset.save_as(path)
        return path.parent

    return make


def _in_all(**elements: object) -> Maker:
    def make(folder: Path) -> Path:
        paths = _series(folder)
        for path in paths:
            dataset = pydicom.dcmread(path)
            for keyword, value in elements.items():
                if value is None:
                    delattr(dataset, keyword)
                else:
                    setattr(dataset, keyword, value)
            dataset.save_as(path)
        return paths[0].parent

    return make


def _edited_bytes(edit: Callable[[bytes], bytes]) -> Maker:
    def make(folder: Path) -> Path:
        path = _series(folder)[1]
        path.write_bytes(edit(path.read_bytes()))
        return path.parent

    return make


def _raw_element(keyword: str, vr: bytes, value: bytes, claimed: int | None = None) -> Maker:
    """Replace an element's bytes on disk: a wrong VR, a value that does not parse, a length that lies."""
    tag = pydicom.datadict.tag_for_keyword(keyword)
    assert tag is not None
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)

    def edit(content: bytes) -> bytes:
        start = content.index(head, 132)
        length = struct.unpack("<H", content[start + 6 : start + 8])[0]
        new = head + vr + struct.pack("<H", len(value) if claimed is None else claimed) + value
        return content[:start] + new + content[start + 8 + length :]

    return _edited_bytes(edit)


def _pixel_length(claimed: int) -> Maker:
    def edit(content: bytes) -> bytes:
        start = content.rindex(struct.pack("<HH", 0x7FE0, 0x0010))
        return content[: start + 8] + struct.pack("<I", claimed) + content[start + 12 : -10]

    return _edited_bytes(edit)


def _transfer_syntax(uid: str) -> Maker:
    def make(folder: Path) -> Path:
        path = _series(folder)[0]
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = uid
        if pydicom.uid.UID(uid).is_private or uid not in pydicom.uid.UID_dictionary or pydicom.uid.UID(uid).is_compressed:
            dataset.PixelData = pydicom.encaps.encapsulate([dataset.PixelData])
            dataset["PixelData"].VR = "OB"
        pydicom.dcmwrite(path, dataset, implicit_vr=False, little_endian=True, force_encoding=True)
        return path.parent

    return make


def _jpeg2000(edit: Callable[[bytes], bytes]) -> Maker:
    """A JPEG 2000 code stream that is not what the header says."""

    def make(folder: Path) -> Path:
        path = _series(folder)[0]
        dataset = pydicom.dcmread(path)
        dataset.Rows = dataset.Columns = 32
        dataset.PixelData = bytes(2 * 32 * 32)
        dataset.compress(pydicom.uid.JPEG2000Lossless)
        frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
        dataset.PixelData = pydicom.encaps.encapsulate([edit(frame)])
        dataset.save_as(path)
        for other in sorted(path.parent.iterdir())[1:]:
            other.unlink()
        return path.parent

    return make


def _nifti(array: np.ndarray, affine: np.ndarray | None = None, suffix: str = ".nii") -> Maker:
    def make(folder: Path) -> Path:
        path = folder / f"a{suffix}"
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
        return path

    return make


def _nifti_header(offset: int, content: bytes, suffix: str = ".nii") -> Maker:
    def make(folder: Path) -> Path:
        raw = bytearray(_nifti(np.zeros((4, 5, 6), np.int16))(folder).read_bytes())
        raw[offset : offset + len(content)] = content
        path = folder / f"b{suffix}"
        path.write_bytes(gzip.compress(bytes(raw)) if suffix.endswith(".gz") else bytes(raw))
        return path

    return make


def _dims(*dims: int) -> bytes:
    return struct.pack("<8h", *dims)


def _gzip_bomb(folder: Path) -> Path:
    """3 GB of zeros behind an honest-looking header."""
    header = bytearray(_nifti(np.zeros((4, 5, 6), np.int16))(folder).read_bytes()[:352])
    header[40:56] = _dims(3, 1200, 1200, 1200, 1, 1, 1, 1)
    path = folder / "bomb.nii.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(bytes(header))
        for _ in range(64):
            file.write(bytes(2**20))
    return path


def _loop(folder: Path) -> Path:
    inner = folder / "series" / "sub"
    inner.mkdir(parents=True)
    (inner / "loop").symlink_to(folder / "series", target_is_directory=True)
    (inner / "self").symlink_to(inner / "self")
    return folder / "series"


def _unreadable(folder: Path) -> Path:
    path = _series(folder)[1]
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens, but reading fails even for root
    return path.parent


def _fifo(folder: Path) -> Path:
    """A pipe blocks whoever opens it."""
    path = folder / "series"
    path.mkdir()
    os.mkfifo(path / "a.dcm")
    return path


def _odd_names(folder: Path) -> Path:
    path = folder / "pa th  ünï\n😀"
    path.mkdir()
    (path / "sch lecht.dcm").write_bytes(b"no image")
    return path


def _two_in_one(folder: Path) -> Path:
    write_ct(folder / "all" / "a", series_key="one")
    write_ct(folder / "all" / "b", series_key="two")
    return folder / "all"


def _gap(folder: Path) -> Path:
    paths = _series(folder)
    paths[2].unlink()
    return paths[0].parent


def _empty_sequence(folder: Path) -> Path:
    return _with_element(PerFrameFunctionalGroupsSequence=[], NumberOfFrames=3)(folder)


def _deep_sequence(folder: Path) -> Path:
    """Sequences within sequences, far deeper than any real file."""
    path = _series(folder)[0]
    head = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    content = path.read_bytes()
    place = content.rindex(struct.pack("<HH", 0x0010, 0x0010))
    path.write_bytes(content[:place] + head * 5000 + content[place:])
    return path.parent


def _text_as(suffix: str) -> Maker:
    return _with_bytes(suffix, b"This is a text file.\n" * 40)


def _cut_nifti(length: int) -> Maker:
    def make(folder: Path) -> Path:
        path = _nifti(np.ones((4, 5, 6), np.int16))(folder)
        path.write_bytes(path.read_bytes()[:length])
        return path

    return make


def _cut_dicom(length: int) -> Maker:
    return _edited_bytes(lambda content: content[:length])


def _made(path: Path) -> Path:
    path.mkdir()
    return path


BAD_INPUTS: dict[str, Maker] = {
    # NIfTI: nothing, too little, something else
    **{f"nifti-empty{s}": _with_bytes(s, b"") for s in (".nii", ".nii.gz")},
    **{f"nifti-text{s}": _text_as(s) for s in (".nii", ".nii.gz")},
    **{f"nifti-zeros{s}": _with_bytes(s, bytes(400)) for s in (".nii", ".nii.gz")},
    "nifti-gz-damaged": _with_bytes(".nii.gz", gzip.compress(bytes(2000))[:-12]),
    "nifti-gz-wrong-sum": _with_bytes(".nii.gz", gzip.compress(os.urandom(2000))[:-8] + bytes(8)),
    "nifti-not-gz": lambda folder: _nifti(np.zeros((4, 5, 6)))(folder).rename(folder / "a.nii.gz"),
    **{f"nifti-cut-{length}": _cut_nifti(length) for length in (1, 100, 347, 348, 352, 400, 591)},
    # NIfTI: shapes and types that are no volume
    "nifti-4d": _nifti(np.zeros((4, 5, 6, 3), np.int16)),
    "nifti-5d": _nifti(np.zeros((4, 5, 6, 2, 2), np.int16)),
    "nifti-complex": _nifti(np.zeros((4, 5, 6), np.complex64)),
    "nifti-rgb": _nifti(np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    **{
        f"nifti-affine-{name}": _nifti_header(280, struct.pack("<12f", *rows))
        for name, rows in (
            ("singular", (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)),
            ("nan", (1, 0, 0, 0, 0, np.nan, 0, 0, 0, 0, 1, 0)),
            ("inf", (1, 0, 0, np.inf, 0, 1, 0, 0, 0, 0, 1, 0)),
        )
    },
    # NIfTI: headers that lie
    **{
        f"nifti-dims-{'-'.join(map(str, dims))}{s}": _nifti_header(40, _dims(*dims), s)
        for dims in (
            (3, 32767, 32767, 32767, 1, 1, 1, 1),
            (3, 1200, 1200, 1100, 1, 1, 1, 1),
            (3, 600, 600, 600, 1, 1, 1, 1),
            (3, -4, 5, 6, 1, 1, 1, 1),
            (3, 0, 5, 6, 1, 1, 1, 1),
            (9, 4, 5, 6, 1, 1, 1, 1),
            (0, 4, 5, 6, 1, 1, 1, 1),
            (7, 4, 5, 6, 9, 9, 9, 9),
        )
        for s in (".nii", ".nii.gz")
    },
    "nifti-type": _nifti_header(70, struct.pack("<h", 9999)),
    "nifti-magic": _nifti_header(344, b"xyz\0"),
    "nifti-offset-huge": _nifti_header(108, struct.pack("<f", 3e9)),
    "nifti-offset-nan": _nifti_header(108, struct.pack("<f", np.nan)),
    "nifti-offset-negative": _nifti_header(108, struct.pack("<f", -1e9)),
    "nifti-bomb": _gzip_bomb,
    "nifti-missing": lambda folder: folder / "none.nii.gz",
    "nifti-folder": lambda folder: _made(folder / "a.nii.gz"),
    # files that are not DICOM, folders that hold no series
    "dicom-empty-folder": lambda folder: _made(folder / "empty"),
    "dicom-missing": lambda folder: folder / "none",
    "dicom-text": lambda folder: _text_as(".dcm")(folder),
    "dicom-zero-byte": _with_bytes(".dcm", b""),
    "dicom-preamble-only": _with_bytes(".dcm", bytes(128) + b"DICM"),
    "dicom-noise": _with_bytes(".dcm", bytes(128) + b"DICM" + bytes(range(256)) * 20),
    "dicom-loop": _loop,
    "dicom-fifo": _fifo,
    "dicom-unreadable": _unreadable,
    "dicom-odd-names": _odd_names,
    "dicom-two-series": _two_in_one,
    "dicom-gap": _gap,
    "dicom-zero-byte-slice": _edited_bytes(lambda _: b""),
    "dicom-deep": _deep_sequence,
    **{f"dicom-cut-{length}": _cut_dicom(length) for length in (-1, -20, -60, -100, 700, 400, 140)},
    # elements that are missing, or do not parse
    **{
        f"dicom-without-{keyword}": _with_element(**{keyword: None})
        for keyword in (
            *("Rows", "Columns", "BitsAllocated", "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation"),
            *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SeriesInstanceUID", "Modality"),
        )
    },
    "dicom-no-pixels-at-all": _in_all(PixelData=None),
    "dicom-rows-as-text": _raw_element("Rows", b"LO", b"seventy "),
    "dicom-rows-as-float": _raw_element("Rows", b"FD", struct.pack("<d", 1e300)),
    "dicom-position-as-text": _raw_element("ImagePositionPatient", b"DS", b"left\\front\\up "),
    "dicom-spacing-nan": _raw_element("PixelSpacing", b"DS", b"nan\\nan "),
    "dicom-slope-text": _raw_element("RescaleSlope", b"DS", b"one "),
    "dicom-slope-inf": _raw_element("RescaleSlope", b"DS", b"inf "),
    "dicom-length-lies": _raw_element("PatientName", b"PN", b"p ", claimed=60000),
    "dicom-wrong-vr": _raw_element("SeriesInstanceUID", b"ZZ", b"1.2 "),
    "dicom-pixels-3gb": _pixel_length(3_000_000_000),
    "dicom-pixels-4gb": _pixel_length(0xFFFFFFFE),
    "dicom-pixels-undefined": _pixel_length(0xFFFFFFFF),
    "dicom-pixels-short": _pixel_length(10),
    # values that cannot be
    "dicom-rows-0": _with_element(Rows=0),
    "dicom-rows-65535": _in_all(Rows=65535, Columns=65535),
    "dicom-rows-16000": _in_all(Rows=16000, Columns=16000),
    "dicom-one-larger": _with_element(Rows=8),
    "dicom-frames-1e6": _in_all(NumberOfFrames=1_000_000),
    "dicom-frames-negative": _in_all(NumberOfFrames=-1),
    "dicom-frames-empty": _empty_sequence,
    "dicom-bits-12-of-7": _in_all(BitsAllocated=7),
    "dicom-bits-64": _in_all(BitsAllocated=64, BitsStored=64),
    "dicom-rgb": _in_all(PhotometricInterpretation="RGB", SamplesPerPixel=3),
    "dicom-palette": _in_all(PhotometricInterpretation="PALETTE COLOR"),
    "dicom-slope-0": _with_element(RescaleSlope=0),
    "dicom-spacing-0": _in_all(PixelSpacing=[0, 1]),
    "dicom-spacing-negative": _in_all(PixelSpacing=[-1, 1]),
    "dicom-orientation-0": _in_all(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]),
    "dicom-orientation-parallel": _in_all(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
    "dicom-orientation-short": _in_all(ImageOrientationPatient=[1, 0, 0]),
    "dicom-localiser": _with_element(ImageOrientationPatient=[0, 1, 0, 0, 0, 1]),
    "dicom-all-at-one-place": _in_all(ImagePositionPatient=[0, 0, 0]),
    "dicom-modality-us": _in_all(Modality="US"),
    "dicom-modality-mr": _in_all(Modality="MR"),
    "dicom-lut": _in_all(ModalityLUTSequence=[pydicom.Dataset()]),
    # pixel data that do not decode
    **{
        f"dicom-syntax-{name}": _transfer_syntax(uid)
        for name, uid in (
            ("unknown", "1.2.3.4.5"),
            ("jpeg", "1.2.840.10008.1.2.4.50"),
            ("jpeg-lossless", "1.2.840.10008.1.2.4.70"),
            ("jpeg-ls", "1.2.840.10008.1.2.4.80"),
            ("jpeg2000", "1.2.840.10008.1.2.4.90"),
            ("rle", "1.2.840.10008.1.2.5"),
            ("mpeg", "1.2.840.10008.1.2.4.100"),
        )
    },
    "jpeg2000-cut": _jpeg2000(lambda frame: frame[:60]),
    "jpeg2000-noise": _jpeg2000(lambda frame: frame[:80] + bytes(range(256)) + frame[80:]),
    "jpeg2000-other-size": _jpeg2000(lambda frame: frame[:8] + struct.pack(">II", 48, 48) + frame[16:]),
    "jpeg2000-bomb": _jpeg2000(lambda frame: frame[:8] + struct.pack(">II", 60000, 60000) + frame[16:]),
}
