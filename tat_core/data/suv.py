"""From what a PET scanner stored to the standardised uptake value by body weight (SUVbw)."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np

_PHILIPS_SUV_FACTOR = (0x7053, 0x1000)


def suv_factor(dataset: Any) -> tuple[float, str]:
    """What rescaled voxel values must be multiplied with to give SUVbw in g/ml.

    Follows the vendor-neutral recipe of the QIBA FDG-PET profile: activity concentration × weight / injected activity, decayed to
    the moment to which the scanner corrected.

    Parameters
    ----------
    dataset : pydicom.Dataset
        One image of the series.

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
        return _factor(dataset)
    except ValueError as error:
        if str(error).startswith("suv_factor:"):
            raise
        raise ValueError("suv_factor: expected elements that parse, got damaged ones; retrieve the series again") from None
    except (NotImplementedError, TypeError, AttributeError, KeyError, IndexError, OverflowError):
        raise ValueError("suv_factor: expected elements that parse, got damaged ones; retrieve the series again") from None


def _factor(dataset: Any) -> tuple[float, str]:
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
    start, note = _scan_start(dataset)
    injected = _injection(tracer, start)
    waited_s = (start - injected).total_seconds()
    if not 0 <= waited_s < 24 * 3600:
        raise ValueError(
            "suv_factor: expected an injection less than a day before the scan, got other times; correct the injection time"
        )
    return weight_g / (dose_bq * 0.5 ** (waited_s / half_life_s)), note


def _scan_start(dataset: Any) -> tuple[datetime, str]:
    """The moment to which decay was corrected: the series time, unless post-processing made it later than the acquisition."""
    series = _moment(dataset.get("SeriesDate"), dataset.get("SeriesTime"))
    acquisition = _moment(dataset.get("AcquisitionDate"), dataset.get("AcquisitionTime"))
    if series is None and acquisition is None:
        raise ValueError("suv_factor: expected SeriesDate and SeriesTime, got none; the time of the scan is needed for SUV")
    if series is None or (acquisition is not None and series > acquisition):
        assert acquisition is not None
        return acquisition, "decay was counted to the acquisition time, because the series time is missing or later"
    return series, ""


def _injection(tracer: Any, scan_start: datetime) -> datetime:
    stated = str(tracer.get("RadiopharmaceuticalStartDateTime", "") or "")
    if len(stated) >= 14:
        moment = _moment(stated[:8], stated[8:].split("+")[0].split("-")[0])
        if moment is not None:
            return moment
    moment = _moment(scan_start.strftime("%Y%m%d"), tracer.get("RadiopharmaceuticalStartTime"))
    if moment is None:
        raise ValueError("suv_factor: expected RadiopharmaceuticalStartTime, got none; the time of injection is needed for SUV")
    return moment - timedelta(days=1) if moment > scan_start else moment  # injected before midnight


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
