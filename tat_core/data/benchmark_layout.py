"""Import the published all-in-one benchmark: {PET,CT,MRI}/{train,validation,test}/{LQ,HQ}, 2-D slices as .bin pickles and .nii.

The .bin files of the AMIR release hold a pickled tensor [1, H, W] in physical units. A pickle can run any code, so they are read
by an unpickler that knows
nothing but how to rebuild a tensor or an array.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tat_core.data.dataset import SPLITS, write_json
from tat_core.data.volume import Volume, read_nifti, write_nifti
from tat_core.tasks import TASKS, Task

SLICES_PER_CASE = 256
_MAX_BYTES = 256 * 2**20


def _storage_from_bytes(content: bytes) -> Any:
    """torch's own way into a pickled tensor, but without the freedom to run code."""
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError("only latin1 is needed for arrays")
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Any]:
    from numpy._core import multiarray, numeric  # private, but these are the names that pickled arrays carry

    reconstruct, frombuffer = multiarray._reconstruct, numeric._frombuffer  # type: ignore[attr-defined]
    return {
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): _storage_from_bytes,
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.numeric", "_frombuffer"): frombuffer,
        ("numpy._core.numeric", "_frombuffer"): frombuffer,
        ("_codecs", "encode"): _encode,
    }


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        known: Callable[..., Any] | None = _allowed().get((module, name))
        if known is None:
            raise pickle.UnpicklingError("a name that no array needs")
        return known


def read_pickled_array(path: Path) -> np.ndarray:
    """Read a pickled tensor or array without running any code from it.

    Returns
    -------
    numpy.ndarray, float32, as stored.

    Raises
    ------
    ValueError
        If it is anything but one real tensor or array.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"read_pickled_array: expected at most {_MAX_BYTES} bytes, got more; a slice is smaller")
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a hostile or damaged pickle can raise anything; nothing of it has run
        raise ValueError(
            f"read_pickled_array: expected a pickled tensor or array, got {type(error).__name__}; do not trust the file"
        ) from None
    if isinstance(content, torch.Tensor) and content.layout == torch.strided and not content.is_quantized:
        content = content.detach().to(torch.float32).numpy() if not content.is_complex() else None
    if not isinstance(content, np.ndarray) or content.dtype.kind not in "iuf":
        raise ValueError("read_pickled_array: expected a real tensor or array, got another object; do not trust it")
    return content.astype(np.float32)


def import_benchmark(root: Path, output: Path) -> list[Path]:
    """Turn the benchmark's folders into data sets, one a task, many slices a case.

    Parameters
    ----------
    root : pathlib.Path
        Holds some of ``PET``, ``CT``, ``MRI``.
    output : pathlib.Path
        Gets ``<TASK>/`` with dataset.json; existing data sets are refused.

    Returns
    -------
    list of pathlib.Path
        The data sets written.

    Raises
    ------
    ValueError
        If nothing is found, sides do not match, or a slice cannot be read.
    """
    written = []
    for task in TASKS.values():
        if not (root / task.name).is_dir():
            continue
        folder = output / task.name
        if (folder / "dataset.json").exists():
            raise ValueError("import_benchmark: expected no data set at the output, got one; choose an empty folder")
        cases: dict[str, dict[str, str]] = {}
        for split in SPLITS:
            cases |= _import_split(root / task.name / split, split, folder, task)
        if not cases:
            raise ValueError(f"import_benchmark: expected slices below {task.name}, got none; see docs/dataset.md")
        write_json(folder / "splits.json", {"format": 1, "cases": cases})
        about = {"format": 1, "name": f"benchmark-{task.name}", "task": task.name, "unit": task.unit, "synthetic": False}
        origin = {"origin": "published", "method": "all-in-one benchmark (AMIR, MICCAI 2024)"}
        write_json(
            folder / "dataset.json", about | {"low_quality": origin, "split_by": "published", "note": "patients are unknown"}
        )
        written.append(folder)
    if not written:
        raise ValueError("import_benchmark: expected folders PET, CT or MRI, got none of them; give the benchmark's root")
    return written


def _import_split(source: Path, split: str, folder: Path, task: Task) -> dict[str, dict[str, str]]:
    names = [
        {path.name for path in (source / side).glob("*") if path.suffix in (".bin", ".nii")}
        if (source / side).is_dir()
        else set()
        for side in ("LQ", "HQ")
    ]
    if names[0] != names[1]:
        odd = len(names[0] ^ names[1])
        raise ValueError(
            f"import_benchmark: expected the same names in LQ and HQ of {split}, got {odd} on one side only; complete it"
        )
    pending: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    cases: dict[str, dict[str, str]] = {}

    def flush(shape: tuple[int, int]) -> None:
        pairs = pending.pop(shape, [])
        if pairs:
            name = f"{split}-{len(cases):05d}"
            cases[name] = {"patient": f"unknown-{split}", "split": split}
            for side, slices in zip(("LQ", "HQ"), zip(*pairs, strict=True), strict=True):
                # rows and columns as published: laid so that they come back unturned (columns to the left, rows to the back)
                volume = Volume(np.stack(slices).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]), task.unit)
                write_nifti(volume, folder / side / f"{name}.nii.gz")

    for name in sorted(names[0]):
        lq, hq = (_read_slice(source / side / name, task) for side in ("LQ", "HQ"))
        if lq.shape != hq.shape:
            raise ValueError(
                f"import_benchmark: expected pairs of one shape, got {lq.shape} and {hq.shape}; complete the download"
            )
        pending.setdefault(hq.shape, []).append((lq, hq))
        if len(pending[hq.shape]) == SLICES_PER_CASE:
            flush(hq.shape)
    for shape in list(pending):
        flush(shape)
    return cases


def _read_slice(path: Path, task: Task) -> np.ndarray:
    # .nii was written row by row (SimpleITK), so nibabel sees columns first
    array = read_pickled_array(path) if path.suffix == ".bin" else read_nifti(path, task.unit).voxels.T
    array = array.reshape([n for n in array.shape if n != 1] or [1, 1])
    if array.ndim != 2:
        raise ValueError(
            f"import_benchmark: expected one slice a file, got shape {array.shape}; this is not the published layout"
        )
    return array
