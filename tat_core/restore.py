"""A study in, a derived study out: restore DICOM series and NIfTI files with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn

from tat_core.checkpoint import SavedModel, read_model
from tat_core.config import EvaluateConfig
from tat_core.data.check_case import unit_findings
from tat_core.data.dicom_derive import Derivation, write_derived_series
from tat_core.data.dicom_read import MODALITIES, DicomSeries, by_series, modality_of, read_dicom_files
from tat_core.data.listing import files_below
from tat_core.data.volume import NIFTI_SUFFIXES, Volume, from_display, read_volume, to_display, write_nifti
from tat_core.evaluate import restore_image
from tat_core.evaluation import usable_device
from tat_core.model.tat import MIN_SIDE
from tat_core.tasks import TASKS, Task


@dataclass(frozen=True)
class RestoreOptions:
    """How to restore.

    Attributes
    ----------
    task : str or None
        Needed for NIfTI, which does not state a modality.
    device : str
    tile_size, tile_overlap : int
        Pixels; larger images are restored in overlapping tiles.
    residual : bool
        Also write restored minus input.
    contact_sheet : bool
        Also write a PNG with a few slices before and after.
    """

    task: str | None = None
    device: str = "cpu"
    tile_size: int = EvaluateConfig.tile_size
    tile_overlap: int = EvaluateConfig.tile_overlap
    residual: bool = False
    contact_sheet: bool = False


@dataclass(frozen=True)
class Restored:
    """What was done with one input: where the output lies, or why there is none."""

    source: Path
    outputs: tuple[Path, ...]
    error: str = ""


def restore_study(source: Path, model_file: Path, output: Path, options: RestoreOptions) -> list[Restored]:
    """Restore a DICOM folder, a NIfTI file, or every one of them in a directory.

    Parameters
    ----------
    source : pathlib.Path
        A NIfTI file, a folder of one DICOM series, or a directory of such files and folders.
    model_file : pathlib.Path
        As written by training; its hash is verified.
    output : pathlib.Path
        New folder; existing outputs are never overwritten.
    options : RestoreOptions

    Returns
    -------
    list of Restored
        One an input; an input that was refused does not stop the others.

    Raises
    ------
    ValueError
        If the model or the task is wrong, or there is no input.
    """
    if options.task is not None and options.task not in TASKS:
        raise ValueError(f"restore: expected task {', '.join(TASKS)}, got {options.task!r}; choose one of them")
    usable_device(options.device)
    model = read_model(model_file)
    results = []
    for item in track(_inputs(source), description="Restoring", transient=True, disable=not sys.stdout.isatty()):
        try:
            results.append(Restored(item.source, tuple(_restore_one(item, model, output, options))))
        except ValueError as error:
            results.append(Restored(item.source, (), str(error)))
        except OSError as error:
            text = f"restore: expected readable images and free disk space, got {type(error).__name__}; check both"
            results.append(Restored(item.source, (), text))
        except Exception as error:  # whatever a damaged header makes a decoder do, the other inputs go on
            text = f"restore: expected a series that can be restored, got {type(error).__name__}; look at this input by itself"
            results.append(Restored(item.source, (), text))
    return results


@dataclass(frozen=True)
class _Input:
    """A NIfTI file (no `paths`), or the files of one DICOM series."""

    source: Path
    name: str
    paths: tuple[Path, ...] = ()


def _inputs(source: Path) -> list[_Input]:
    if not source.exists():
        raise ValueError("restore: expected an input file or folder, got one that does not exist; check the path")
    if not source.is_dir():
        return [_nifti(source)] if _is_nifti(source) else _dicom(source, [source])
    visible = [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]
    found = [_nifti(path) for path in visible if _is_nifti(path)]
    for folder in (path for path in visible if path.is_dir() and any(path.iterdir())):
        found += _dicom(folder, files_below(folder))
    loose = [path for path in visible if path.is_file() and not _is_nifti(path)]
    if by_series(loose):
        found += _dicom(source, loose)
    if not found:
        raise ValueError("restore: expected DICOM or NIfTI images, got none; give the folder of a series")
    return found


def _is_nifti(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(NIFTI_SUFFIXES)


def _nifti(path: Path) -> _Input:
    return _Input(path, path.name[: -len(".nii.gz" if path.name.lower().endswith(".gz") else ".nii")])


def _dicom(source: Path, paths: Sequence[Path]) -> list[_Input]:
    """One input a series; a folder without any is one that will be refused by name."""
    name = source.stem if source.is_file() else source.name
    groups = list(by_series(paths).values()) or [list(paths)]
    if len(groups) == 1:
        return [_Input(source, name, tuple(paths))]
    return [_Input(source, f"{name}_{number}", tuple(group)) for number, group in enumerate(groups, 1)]


def _restore_one(item: _Input, model: SavedModel, output: Path, options: RestoreOptions) -> list[Path]:
    if not item.paths:
        return _restore_nifti(item, model, output, options)
    modality = modality_of(item.paths)
    task_name = next((name for name, known in MODALITIES.items() if known == modality), None)
    if task_name is None:
        raise ValueError(f"restore: expected modality CT, MR or PT, got {modality or 'none'}; this network knows no other")
    if options.task not in (None, task_name):
        raise ValueError(f"restore: expected a {options.task} series, got modality {modality}; leave --task out")
    series = read_dicom_files(item.paths, task_name)
    task = TASKS[task_name]
    volume = Volume(series.voxels, series.affine, task.unit)
    restored = restore_volume(model.network(task.name), volume, task, options)
    stacks = {"restored": restored.voxels}
    if options.residual:
        stacks["residual"] = restored.voxels - volume.voxels
    return [
        *(_write_series(series, voxels, output / f"{item.name}_{kind}", model.sha256, kind) for kind, voxels in stacks.items()),
        *_contact_sheet(volume, restored, output / f"{item.name}_contact.png", options, task),
    ]


def _write_series(series: DicomSeries, voxels: np.ndarray, folder: Path, model_hash: str, kind: str) -> Path:
    description = "TAT network, restored" if kind == "restored" else "TAT network, restored minus source"
    write_derived_series(series, voxels.transpose(2, 1, 0), folder, Derivation(model_hash, description, kind))
    return folder


def _restore_nifti(item: _Input, model: SavedModel, output: Path, options: RestoreOptions) -> list[Path]:
    if options.task is None:
        raise ValueError(
            "restore: expected --task for NIfTI, which does not state its modality, got none; add --task CT, MRI or PET"
        )
    task = TASKS[options.task]
    suffix = ".nii.gz" if item.source.name.lower().endswith(".gz") else ".nii"
    kinds = ("restored", "residual") if options.residual else ("restored",)
    targets = {kind: output / f"{item.name}_{kind}{suffix}" for kind in kinds}
    if any(target.exists() for target in targets.values()):
        raise ValueError("restore: expected a new output, got one that exists; nothing was overwritten")
    volume = read_volume(item.source, task)
    restored = restore_volume(model.network(task.name), volume, task, options)
    write_nifti(restored, targets["restored"], volume.stored_dtype)
    if options.residual:
        residual = Volume(restored.voxels - volume.voxels, volume.affine, volume.unit)
        write_nifti(residual, targets["residual"], np.float32)
    return [*targets.values(), *_contact_sheet(volume, restored, output / f"{item.name}_contact.png", options, task)]


def restore_volume(model: nn.Module, volume: Volume, task: Task, options: RestoreOptions) -> Volume:
    """Restore slice by slice, in the orientation that training uses.

    What lies outside the task's intensity range (padding, metal) is outside what the network can express and passes unchanged.

    Raises
    ------
    ValueError
        If values are not finite or far outside what the task's images hold.
    """
    stack = np.ascontiguousarray(to_display(volume))
    if not np.isfinite(stack).all():
        raise ValueError("restore: expected finite values, got NaN or infinity; export the images again")
    for finding in unit_findings("", stack, task):
        if finding.level == "error":
            raise ValueError(f"restore: expected {task.name} in {task.unit}, got {finding.what}; {finding.do}")
    low, high = task.intensity_range
    if float(np.percentile(stack, 99.0)) > high:
        raise ValueError(f"restore: expected values up to {high:g} {task.unit}, got more than 1 % above; scale the images first")
    rows, columns = stack.shape[1:]
    missing = max(MIN_SIDE - rows, 0), max(MIN_SIDE - columns, 0)
    padded = np.pad(stack, ((0, 0), (0, missing[0]), (0, missing[1])), mode="symmetric") if any(missing) else stack
    restored = np.empty_like(stack)
    for k, image in enumerate(padded):
        whole = restore_image(model, image, task, options.tile_size, options.tile_overlap, options.device)
        restored[k] = whole[:rows, :columns]
    return from_display(np.where((stack < low) | (stack > high), stack, restored), volume)


def _contact_sheet(before: Volume, after: Volume, target: Path, options: RestoreOptions, task: Task) -> Sequence[Path]:
    if not options.contact_sheet:
        return ()
    if target.exists():
        raise ValueError("restore: expected a new contact sheet, got one that exists; nothing was overwritten")
    stacks = to_display(before), to_display(after)
    chosen = np.unique(np.linspace(0, len(stacks[0]) - 1, 8).round().astype(int))[:8]
    low, high = task.evaluation_window
    high = min(high, max(float(np.percentile(stacks[0], 99.9)), low + 1e-3))
    figure = Figure(figsize=(2.2 * len(chosen), 4.8), layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for row, (stack, label) in enumerate(zip(stacks, ("input", "restored"), strict=True)):
        for column, k in enumerate(chosen):
            axes[row][column].imshow(stack[k], cmap="gray_r" if task.name == "PET" else "gray", vmin=low, vmax=high)
            axes[row][column].set_title(f"{label} {k + 1}", fontsize=8)
            axes[row][column].axis("off")
    figure.suptitle(f"{task.name}, window {low:g} to {high:g} {task.unit}, research use", fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=80)
    return (target,)
