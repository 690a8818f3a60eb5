"""SUV from what the scanner stored: each way of storing it, and each missing element by name."""

from __future__ import annotations

import pytest
from dicom_samples import pet_header

from tat_core.data.suv import suv_factor


def test_decay_to_the_start_of_the_series() -> None:
    factor, note = suv_factor(pet_header())
    assert factor == pytest.approx(70_000 / 175e6)  # half of the dose is left
    assert note == ""


def test_decay_to_the_injection() -> None:
    assert suv_factor(pet_header(DecayCorrection="ADMIN"))[0] == pytest.approx(70_000 / 350e6)


def test_full_date_of_injection_and_midnight() -> None:
    dated = pet_header(RadiopharmaceuticalStartDateTime="20200101100000.000000+0100", RadiopharmaceuticalStartTime="000000")
    assert suv_factor(dated)[0] == pytest.approx(70_000 / 175e6)
    night = pet_header(RadiopharmaceuticalStartTime="231013.8", SeriesTime="010000", AcquisitionTime="010000")
    assert suv_factor(night)[0] == pytest.approx(70_000 / 175e6)


def test_post_processed_series_counts_to_the_acquisition() -> None:
    factor, note = suv_factor(pet_header(SeriesTime="180000"))
    assert factor == pytest.approx(70_000 / 175e6)
    assert "acquisition" in note


def test_the_scan_starts_with_its_earliest_bed() -> None:
    first = pet_header(SeriesTime="180000")
    last = pet_header(SeriesTime="180000", AcquisitionTime="120946.2")
    for beds in ([first, last], [last, first]):
        assert suv_factor(last, beds)[0] == pytest.approx(70_000 / 175e6)
    between = pet_header(SeriesTime="120000", AcquisitionTime="120946.2")  # later than the first bed, not than this one
    assert suv_factor(between, [between, first])[0] == pytest.approx(70_000 / 175e6)
    unchanged = pet_header(AcquisitionTime="120946.2")  # the series time is the start, even if its bed is not there
    assert suv_factor(unchanged, [unchanged]) == (pytest.approx(70_000 / 175e6), "")


def test_date_and_time_of_the_acquisition_in_one_element() -> None:
    single = {"AcquisitionDate": None, "AcquisitionTime": None, "AcquisitionDateTime": "20200101114946.200000+0100"}
    later = pet_header(SeriesTime="180000", AcquisitionTime="120946.2")
    assert suv_factor(later, [later, pet_header(**single)])[0] == pytest.approx(70_000 / 175e6)


def test_counts_and_suv() -> None:
    counts = pet_header(Units="CNTS")
    counts.private_block(0x7053, "Philips PET Private Group", create=True).add_new(0x00, "DS", "0.00042")
    assert suv_factor(counts)[0] == pytest.approx(0.00042)
    assert suv_factor(pet_header(Units="GML"))[0] == 1.0
    with pytest.raises(ValueError, match=r"7053,1000"):
        suv_factor(pet_header(Units="CNTS"))
    with pytest.raises(ValueError, match="SUVType LBM"):
        suv_factor(pet_header(Units="GML", SUVType="LBM"))


@pytest.mark.parametrize(
    ("elements", "named"),
    [
        ({"Units": None}, "Units"),
        ({"PatientWeight": None}, "PatientWeight"),
        ({"PatientWeight": 0}, "PatientWeight"),
        ({"RadionuclideTotalDose": None}, "RadionuclideTotalDose"),
        ({"RadionuclideHalfLife": None}, "RadionuclideHalfLife"),
        ({"RadiopharmaceuticalStartTime": None}, "RadiopharmaceuticalStartTime"),
        ({"RadiopharmaceuticalInformationSequence": None}, "RadiopharmaceuticalInformationSequence"),
        ({"DecayCorrection": None}, "DecayCorrection"),
        ({"DecayCorrection": "NONE"}, "DecayCorrection"),
        ({"SeriesTime": None, "AcquisitionTime": None}, "SeriesTime"),
    ],
)
def test_what_is_missing_is_named(elements, named: str) -> None:
    with pytest.raises(ValueError, match=rf"suv_factor: expected .*{named}"):
        suv_factor(pet_header(**elements))
