"""Import MRI and PET of a BIDS folder as the high-quality side of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tat_core.data.dataset import read_json, write_json
from tat_core.data.volume import Volume, read_nifti, write_nifti
from tat_core.tasks import TASKS

_FOLDER = {"MRI": "anat", "PET": "pet"}
_HALF_LIFE_S = {"F18": 6586.2, "C11": 1223.4, "GA68": 4057.7, "O15": 122.24, "N13": 597.9, "CU64": 45721.0, "ZR89": 282240.0}
_BQ_PER_UNIT = {"BQ": 1.0, "KBQ": 1e3, "MBQ": 1e6, "GBQ": 1e9}


def import_bids(root: Path, output: Path, task_name: str, suffix: str, seed: int = 0) -> Path:
    """Write HQ, dataset.json and splits.json from a BIDS folder; the LQ side is then simulated or added.

    Parameters
    ----------
    root : pathlib.Path
        BIDS folder with ``sub-*``.
    output : pathlib.Path
        New data set.
    task_name : str
        ``"MRI"`` (scanner units as they are) or ``"PET"`` (Bq/ml with a side-car, turned into SUV).
    suffix : str
        Which image, such as ``"T1w"`` or ``"pet"``.
    seed : int
        Decides which patients go to train (80 %), validation (10 %) and test (10 %); with fewer than ten, validation and test get
        one each.

    Returns
    -------
    pathlib.Path
        `output`.

    Raises
    ------
    ValueError
        If nothing is found or an image cannot be converted; names the missing field, not the patient.
    """
    if task_name not in _FOLDER:
        raise ValueError(f"import_bids: expected task MRI or PET, got {task_name}; BIDS has no CT")
    if (output / "dataset.json").exists():
        raise ValueError("import_bids: expected no data set at the output, got one; choose an empty folder")
    images = sorted(
        path
        for pattern in (f"sub-*/{_FOLDER[task_name]}/*_{suffix}.nii*", f"sub-*/ses-*/{_FOLDER[task_name]}/*_{suffix}.nii*")
        for path in root.glob(pattern)
    )
    if not images:
        raise ValueError(
            f"import_bids: expected images *_{suffix}.nii.gz in {_FOLDER[task_name]} folders, got none; check the suffix"
        )
    task = TASKS[task_name]
    splits = _split_patients(sorted({_subject(path) for path in images}), seed)
    cases = {}
    for path in images:
        volume = read_nifti(path, task.unit)
        if task_name == "PET":
            factor = bids_suv_factor(_sidecar(path), _weight_kg(root, _subject(path)))
            volume = Volume(volume.voxels * np.float32(factor), volume.affine, task.unit)
        name = path.name.split(".nii")[0]
        write_nifti(volume, output / "HQ" / f"{name}.nii.gz")
        cases[name] = {"patient": _subject(path), "split": splits[_subject(path)]}
    (output / "LQ").mkdir(exist_ok=True)
    write_json(output / "splits.json", {"format": 1, "cases": cases})
    about = {"format": 1, "name": output.name, "task": task.name, "unit": task.unit, "synthetic": False, "split_by": "patient"}
    write_json(output / "dataset.json", about | {"low_quality": {"origin": "missing"}, "note": "imported from BIDS"})
    return output


def _subject(path: Path) -> str:
    return path.name.split("_")[0]


def _split_patients(patients: list[str], seed: int) -> dict[str, str]:
    order = [patients[k] for k in np.random.default_rng(seed).permutation(len(patients))]
    held_out = 0 if len(order) < 3 else max(1, len(order) // 10)
    splits = dict.fromkeys(order, "train")
    splits |= dict.fromkeys(order[:held_out], "test") | dict.fromkeys(order[held_out : 2 * held_out], "validation")
    return splits


def _sidecar(path: Path) -> dict[str, Any]:
    return read_json(path.with_name(path.name.split(".nii")[0] + ".json"), "import_bids")


def _weight_kg(root: Path, subject: str) -> float | None:
    """The weight column of participants.tsv, where there is one."""
    table = root / "participants.tsv"
    if not table.is_file():
        return None
    rows = [line.split("\t") for line in table.read_text("utf-8").splitlines()]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    column = next((header.index(name) for name in ("weight", "body_weight", "weight_kg") if name in header), None)
    for row in rows[1:]:
        if column is not None and row[0] == subject and len(row) > column:
            try:
                return float(row[column])
            except ValueError:
                return None
    return None


def bids_suv_factor(sidecar: dict[str, Any], weight_kg: float | None) -> float:
    """What a BIDS PET image in Bq/ml (or kBq/ml) must be multiplied with to give SUV by body weight.

    Raises
    ------
    ValueError
        Names the field that is missing.
    """
    units = str(sidecar.get("Units", "")).replace(" ", "").upper()
    if units in ("SUV", "G/ML", "GML"):
        return 1.0
    if units not in ("BQ/ML", "KBQ/ML"):
        raise ValueError(f"bids_suv_factor: expected Units Bq/mL, got {units or 'none'}; complete the side-car")
    dose = _number(sidecar, "InjectedRadioactivity") * _BQ_PER_UNIT.get(
        str(sidecar.get("InjectedRadioactivityUnits", "MBq")).upper(), np.nan
    )
    weight = float(sidecar.get("BodyWeight", np.nan)) if weight_kg is None else weight_kg
    nuclide = str(sidecar.get("TracerRadionuclide", "")).upper().replace("-", "")
    swapped = nuclide.lstrip("0123456789") + nuclide[: len(nuclide) - len(nuclide.lstrip("0123456789"))]
    half_life = _HALF_LIFE_S.get(nuclide, _HALF_LIFE_S.get(swapped, np.nan))
    for value, name in ((dose, "InjectedRadioactivityUnits"), (weight, "BodyWeight"), (half_life, "TracerRadionuclide")):
        if not np.isfinite(value) or value <= 0:
            raise ValueError(f"bids_suv_factor: expected {name}, got none that is usable; complete the side-car")
    if sidecar.get("ImageDecayCorrected") is not True:
        raise ValueError("bids_suv_factor: expected ImageDecayCorrected true, got another; SUV needs decay-corrected images")
    waited = _number(sidecar, "ImageDecayCorrectionTime") - _number(sidecar, "InjectionStart")
    scale = 1000.0 if units == "KBQ/ML" else 1.0
    return float(scale * weight * 1000.0 / (dose * 0.5 ** (waited / half_life)))


def _number(sidecar: dict[str, Any], name: str) -> float:
    value = sidecar.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"bids_suv_factor: expected a number in {name}, got none; complete the side-car")
    return float(value)
