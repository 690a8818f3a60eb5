"""Look at a data set: a PNG panel of one case, and a fingerprint that says nothing about any patient."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tat_core.data.dataset import SPLITS, open_data_set, read_json
from tat_core.data.prepared import open_split, prepare, read_pair

HISTOGRAM_BINS = 64
_SLICES_PER_SPLIT = 200
_PANELS = 4


def show_case(folder: Path, case_name: str, target: Path) -> Path:
    """Write a PNG with a few slices of a case: low quality, high quality, and what differs.

    Parameters
    ----------
    folder : pathlib.Path
        Data set.
    case_name : str
    target : pathlib.Path
        PNG file; overwritten.

    Raises
    ------
    ValueError
        If there is no such case or it cannot be read.
    """
    data = open_data_set(folder)
    case = next((case for case in data.cases if case.name == case_name), None)
    if case is None:
        raise ValueError(
            f"show: expected a case of this data set, got another name; it has {len(data.cases)} cases, see LQ and HQ"
        )
    lq, hq, spacing_mm = read_pair(case, data.task)
    low, high = data.task.evaluation_window
    high = min(high, max(float(np.percentile(hq, 99.9)), low + 1e-3))
    chosen = np.unique(np.linspace(0, len(hq) - 1, _PANELS + 2)[1:-1].round().astype(int))
    figure = Figure(figsize=(3 * len(chosen), 9), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    grey = "gray_r" if data.task.name == "PET" else "gray"
    aspect = spacing_mm[1] / spacing_mm[2]
    for column, k in enumerate(chosen):
        rows = (lq[k], grey, low, high), (hq[k], grey, low, high), (np.abs(lq[k] - hq[k]), "magma", 0.0, 0.5 * (high - low))
        for row, (image, colours, bottom, top) in enumerate(rows):
            axes[row][column].imshow(image, cmap=colours, vmin=bottom, vmax=top, aspect=aspect)
            axes[row][column].set_title(f"{('LQ', 'HQ', '|LQ - HQ|')[row]} {k + 1}/{len(hq)}", fontsize=8)
            axes[row][column].axis("off")
    made = " (synthetic)" if data.about.get("synthetic") else ""
    figure.suptitle(f"{data.task.name}{made}, window {low:g} to {high:g} {data.task.unit}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=80)
    return target


def fingerprint(folder: Path) -> dict[str, Any]:
    """Counts, sizes, spacings and intensity histograms of a data set: nothing of a single patient.

    Returns
    -------
    dict
        JSON-able. Histograms have `HISTOGRAM_BINS` equal bins over the task's intensity range, as shares of all voxels of at most
        200 slices a split.
    """
    data = open_data_set(folder)
    store = prepare(folder)
    entries = {split: read_json(store / "manifest.json", "fingerprint")["splits"][split] for split in SPLITS}
    every = [entry for listed in entries.values() for entry in listed]
    return {
        "format": 1,
        "task": data.task.name,
        "unit": data.task.unit,
        "low_quality": data.about.get("low_quality", {}).get("origin", "unknown"),
        "synthetic": bool(data.about.get("synthetic", False)),
        "splits": {split: _counts(listed) for split, listed in entries.items()},
        "quarantined": len(data.quarantine),
        "matrix": _shares(f"{entry['shape'][2]}x{entry['shape'][3]}" for entry in every),
        "spacing_mm": _shares("x".join(f"{value:.2f}" for value in entry["spacing_mm"]) for entry in every),
        "histogram": {side: _histogram(store, index, data.task.intensity_range) for index, side in enumerate(("LQ", "HQ"))},
    }


def _counts(entries: list[dict[str, Any]]) -> dict[str, int]:
    patients = {entry["patient"] for entry in entries}
    return {"patients": len(patients), "cases": len(entries), "slices": sum(entry["shape"][1] for entry in entries)}


def _shares(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _histogram(store: Path, side: int, intensity_range: tuple[float, float]) -> list[float]:
    total = np.zeros(HISTOGRAM_BINS)
    for split in SPLITS:
        opened = open_split(store, split)
        step = max(1, len(opened) // _SLICES_PER_SPLIT)
        for index in range(0, len(opened), step):
            image = np.clip(opened.pair(index)[side], *intensity_range)
            total += np.histogram(image, HISTOGRAM_BINS, intensity_range)[0]
    return [round(float(share), 6) for share in total / max(total.sum(), 1.0)]
