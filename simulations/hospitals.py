"""Six hospitals on disk, two per task, made from the sample images by the physics of low dose, low resolution and low count.

CT and MRI are real images with a simulated low-quality side. PET is synthetic on both sides: no package ships a real PET image.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from simulations import sources
from simulations.patients import Blocks, Made, Patient, ct_abdomen, ct_chest, mri_pd, mri_t1, pet_brain, pet_trunk
from tat_core.data.dataset import write_json
from tat_core.data.dicom_write import write_dicom_series
from tat_core.data.prepared import prepare
from tat_core.data.volume import Volume, write_nifti
from tat_core.tasks import TASKS

BUILD_VERSION = 8  # raise it when this file or the physics changes what is written
MARKER = "built.json"
PROFILES = ("demo", "smoke")


@dataclass(frozen=True)
class Hospital:
    """What makes a hospital: its machine, its physics and how its files look.

    Attributes
    ----------
    make : callable
        (smoke, rng) to patients and the parameters of the degradation.
    dicom_header : dict or None
        Elements of its DICOM files; None writes NIfTI.
    """

    name: str
    task: str
    scanner: str
    synthetic: bool
    make: Callable[[bool, np.random.Generator], Made]
    dicom_header: Mapping[str, object] | None = None


HOSPITALS: tuple[Hospital, ...] = (
    Hospital(
        "ct-abdomen",
        "CT",
        "Siemens Biograph 40 mCT, 120 kV, kernel Br38f, 3 mm",
        False,
        ct_abdomen,
        {"Manufacturer": "SIEMENS", "ManufacturerModelName": "Biograph40_mCT", "ConvolutionKernel": "Br38f", "KVP": "120"},
    ),
    Hospital("ct-chest", "CT", "CT of the pyradiomics lung sample, 10 mm apart", False, ct_chest),
    Hospital(
        "mri-pd",
        "MRI",
        "GE SIGNA 1.5 T, fast spin echo, proton density",
        False,
        mri_pd,
        {
            "Manufacturer": "GE Medical Systems",
            "ManufacturerModelName": "SIGNA",
            "MagneticFieldStrength": "1.5",
            "ScanningSequence": "SE",
            "SequenceVariant": "SK",
            "RepetitionTime": "2300",
            "EchoTime": "22",
            "EchoTrainLength": "8",
        },
    ),
    Hospital("mri-t1", "MRI", "a patient's T1 with contrast agent (train) and the MNI152 T1 template (test)", False, mri_t1),
    Hospital("pet-brain", "PET", "synthetic: FDG brain from tissue maps, simulated scanner, 2 mm", True, pet_brain),
    Hospital("pet-trunk", "PET", "synthetic: FDG trunk from CT labels, simulated scanner, 3 mm", True, pet_trunk),
)


def hospitals_in(root: Path, profile: str = "demo", workers: int = 2) -> list[Path]:
    """The site folders below `root`, in the order in which Flower numbers them: a user's own as they are, else the samples."""
    found = sorted(path.parent for path in root.glob("*/site.yaml"))
    samples = {hospital.name for hospital in HOSPITALS}
    if any(folder.name not in samples or not (folder / MARKER).is_file() for folder in found):
        return found
    return build_hospitals(root, profile, workers=workers)


def build_hospitals(root: Path, profile: str = "demo", seed: int = 42, workers: int = 2) -> list[Path]:
    """Write the six hospitals below `root`; those that are there already and up to date are kept.

    Parameters
    ----------
    root : pathlib.Path
    profile : str
        ``"demo"``: real sizes, about half a minute. ``"smoke"``: a few slices of at most 96 x 96 pixels, seconds, for tests.
    seed : int
        Decides all noise.
    workers : int
        Hospitals made at a time.

    Returns
    -------
    list of pathlib.Path
        Site folders, sorted; each holds site.yaml and ``<TASK>/`` with dataset.json, splits.json, LQ, HQ and prepared.

    Raises
    ------
    ValueError
        If the profile is unknown, or a hospital's place is taken by a folder that was not made here.
    """
    if profile not in PROFILES:
        raise ValueError(f"build_hospitals: expected profile {' or '.join(PROFILES)}, got {profile!r}; choose one of them")
    root.mkdir(parents=True, exist_ok=True)
    made_of = {"build": BUILD_VERSION, "profile": profile, "seed": seed, "images": sources.images_hash()}
    missing = [hospital for hospital in HOSPITALS if not _is_built(root / hospital.name, made_of)]
    for site in (root / hospital.name for hospital in missing):
        if site.exists() and not (site / MARKER).is_file():
            raise ValueError(
                f"build_hospitals: expected sample hospitals or nothing in {root}, got {site.name} without {MARKER}; "
                "choose another folder, nothing was changed"
            )
    if missing:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress, ThreadPoolExecutor(workers) as pool:
            bar = progress.add_task("Simulating hospitals", total=len(missing))
            futures = [pool.submit(_build, root, hospital, profile == "smoke", seed, made_of) for hospital in missing]
            try:
                for future in futures:
                    future.result()
                    progress.advance(bar)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return sorted(root / hospital.name for hospital in HOSPITALS)


def _is_built(site: Path, made_of: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((site / MARKER).read_text("utf-8")) == made_of)
    except (OSError, ValueError):
        return False


def _build(root: Path, hospital: Hospital, smoke: bool, seed: int, made_of: dict[str, Any]) -> None:
    """Make one hospital beside its place and move it there when it is complete, so that an interrupted one is never trusted."""
    site = root / hospital.name
    temporary = root / f".{hospital.name}.{os.getpid()}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        rng = np.random.default_rng([seed, *hospital.name.encode()])
        patients, settings = hospital.make(smoke, rng)
        folder = temporary / hospital.task
        splits: dict[str, dict[str, str]] = {}
        for patient in patients:
            for case, split, start, stop in _thinned(patient.blocks, smoke):
                splits[case] = {"patient": patient.name, "split": split}
                for side, volume in (("LQ", patient.lq), ("HQ", patient.hq)):
                    _write_case(sources.cut(volume, start, stop), folder / side, case, patient.name, side, hospital)
        write_json(folder / "splits.json", {"format": 1, "cases": splits})
        write_json(folder / "dataset.json", _about(hospital, patients, settings))
        prepare(folder)
        _write_site(temporary, hospital)
        write_json(temporary / MARKER, made_of)
        shutil.rmtree(site, ignore_errors=True)
        os.replace(temporary, site)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _thinned(blocks: Blocks, smoke: bool) -> Blocks:
    """For quick tests the middle four slices of each block."""
    if not smoke:
        return blocks
    return tuple((case, split, max(a, (a + b) // 2 - 2), min(b, (a + b) // 2 + 2)) for case, split, a, b in blocks)


def _write_case(volume: Volume, side_folder: Path, case: str, patient: str, side: str, hospital: Hospital) -> None:
    if hospital.dicom_header is not None:
        write_dicom_series(
            volume,
            side_folder / case,
            modality={"CT": "CT", "MRI": "MR", "PET": "PT"}[hospital.task],
            patient=patient,
            study_key=f"{hospital.name}/{patient}",
            series_key=f"{side}/{case}",
            series_number=1 if side == "HQ" else 2,
            description=f"{case} {side}",
            extra=hospital.dicom_header,
        )
    else:
        write_nifti(volume, side_folder / f"{case}.nii.gz", np.float32 if hospital.task == "PET" else np.int16)


def _about(hospital: Hospital, patients: list[Patient], settings: dict[str, Any]) -> dict[str, Any]:
    one = len(patients) == 1
    task = TASKS[hospital.task]
    return {
        "format": 1,
        "name": hospital.name,
        "task": task.name,
        "unit": task.unit,
        "synthetic": hospital.synthetic,
        "low_quality": {"origin": "simulated", **settings},
        "split_by": "slices" if one else "patient",
        "note": "one patient: contiguous slice blocks with a gap between the splits" if one else "no patient is on two sides",
    }


def _write_site(folder: Path, hospital: Hospital) -> None:
    site = {
        "name": hospital.name,
        "scanner": hospital.scanner,
        "device": "cpu",
        "data": {hospital.task: hospital.task},
        "state_dir": "state",
        "synthetic": hospital.synthetic,
    }
    sample = "# Sample data of a few patients: a real hospital leaves minimum_patients at 11.\nminimum_patients: 1\n"
    (folder / "site.yaml").write_text(yaml.safe_dump(site, sort_keys=False) + sample, "utf-8")
