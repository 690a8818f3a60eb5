"""From what a PET scanner stored to the standardised uptake value by body weight (SUVbw)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np

_PHILIPS_SUV_FACTOR = (0x7053, 0x1000)


def suv_factor(dataset: Any, series: Sequence[Any] = ()) -> tuple[float, str]:
    """What rescaled voxel values must be multiplied with to give SUVbw in g/ml.

    Follows the vendor-neutral recipe of the QIBA FDG-PET profile: activity concentration × weight / injected activity, decayed to
    the moment to which the scanner corrected.

    Parameters
    ----------
    dataset : pydicom.Dataset
        One image of the series.
    series : sequence of pydicom.Dataset
        All of its images: decay is corrected to the start of the scan, which is the first bed's. None for a single image.

    Returns
    -------
    factor : float
    note : str
        What was assumed, or empty.

    Raises
    ------
    ValueError
        If an element that is needed is missing; names the element.
    """
    try:
        return _factor(dataset, series)
    except ValueError as error:
        if str(error).startswith("suv_factor:"):
            raise
        raise ValueError("suv_factor: expected elements that parse, got damaged ones; retrieve the series again") from None
    except (NotImplementedError, TypeError, AttributeError, KeyError, IndexError, OverflowError):
        raise ValueError("suv_factor: expected elements that parse, got damaged ones; retrieve the series again") from None


def _factor(dataset: Any, images: Sequence[Any]) -> tuple[float, str]:
    units = str(dataset.get("Units", "") or "").upper()
    if units == "GML":
        kind = str(dataset.get("SUVType", "") or "BW").upper()
        if kind != "BW":
            raise ValueError(f"suv_factor: expected SUV by body weight, got SUVType {kind}; export the series in BQML")
        return 1.0, ""
    if units == "CNTS":
        element = dataset.get(_PHILIPS_SUV_FACTOR)
        factor = _positive(getattr(element, "value", None), "the vendor's SUV factor (7053,1000)")
        return factor, "counts were scaled by the vendor's SUV factor"
    if units != "BQML":
        raise ValueError(f"suv_factor: expected Units BQML, CNTS or GML, got {units or 'none'}; export the series in BQML")
    weight_g = 1000.0 * _positive(dataset.get("PatientWeight"), "PatientWeight")
    tracer = (dataset.get("RadiopharmaceuticalInformationSequence") or [None])[0]
    if tracer is None:
        raise ValueError("suv_factor: expected RadiopharmaceuticalInformationSequence, got none; the dose is needed for SUV")
    dose_bq = _positive(tracer.get("RadionuclideTotalDose"), "RadionuclideTotalDose")
    correction = str(dataset.get("DecayCorrection", "") or "").upper()
    if correction == "ADMIN":
        return weight_g / dose_bq, ""
    if correction != "START":
        raise ValueError(
            f"suv_factor: expected DecayCorrection START or ADMIN, got {correction or 'none'}; decay cannot be undone"
        )
    half_life_s = _positive(tracer.get("RadionuclideHalfLife"), "RadionuclideHalfLife")
    start, note = _scan_start(dataset, images)
    injected = _injection(tracer, start)
    waited_s = (start - injected).total_seconds()
    if not 0 <= waited_s < 24 * 3600:
        raise ValueError(
            "suv_factor: expected an injection less than a day before the scan, got other times; correct the injection time"
        )
    return weight_g / (dose_bq * 0.5 ** (waited_s / half_life_s)), note


def _scan_start(dataset: Any, images: Sequence[Any]) -> tuple[datetime, str]:
    """The moment to which decay was corrected: the series time, unless post-processing made it later than the acquisition.

    The acquisition is that of the first bed; which slices those are depends on the direction of the scan.
    """
    series = _moment(dataset.get("SeriesDate"), dataset.get("SeriesTime"))
    acquisition = min((moment for image in (dataset, *images) if (moment := _acquired(image)) is not None), default=None)
    if series is None and acquisition is None:
        raise ValueError("suv_factor: expected SeriesDate and SeriesTime, got none; the time of the scan is needed for SUV")
    if series is None or (acquisition is not None and series > acquisition):
        assert acquisition is not None
        return acquisition, "decay was counted to the earliest acquisition time, because the series time is missing or later"
    return series, ""


def _acquired(dataset: Any) -> datetime | None:
    moment = _moment(dataset.get("AcquisitionDate"), dataset.get("AcquisitionTime"))
    return _stamp(dataset.get("AcquisitionDateTime")) if moment is None else moment


def _injection(tracer: Any, scan_start: datetime) -> datetime:
    stated = _stamp(tracer.get("RadiopharmaceuticalStartDateTime"))
    if stated is not None:
        return stated
    moment = _moment(scan_start.strftime("%Y%m%d"), tracer.get("RadiopharmaceuticalStartTime"))
    if moment is None:
        raise ValueError("suv_factor: expected RadiopharmaceuticalStartTime, got none; the time of injection is needed for SUV")
    return moment - timedelta(days=1) if moment > scan_start else moment  # injected before midnight


def _stamp(value: Any) -> datetime | None:
    """Date and time in one element, without its offset from UTC: the other elements are in local time."""
    text = str(value or "")
    return _moment(text[:8], text[8:].split("+")[0].split("-")[0]) if len(text) >= 14 else None


def _moment(date: Any, time: Any) -> datetime | None:
    date_text, time_text = str(date or "").strip().replace(".", ""), str(time or "").strip()
    if not date_text or not time_text:
        return None
    whole, _, fraction = time_text.replace(":", "").partition(".")
    try:
        moment = datetime.strptime(date_text + whole.ljust(6, "0")[:6], "%Y%m%d%H%M%S")
        return moment + timedelta(seconds=float("0." + fraction) if fraction.isdigit() else 0.0)
    except ValueError:
        return None


def _positive(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number) or number <= 0:
        raise ValueError(f"suv_factor: expected {name} above zero, got none; SUV cannot be computed without it")
    return number
