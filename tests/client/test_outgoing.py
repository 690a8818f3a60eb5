"""Only what is listed leaves, and with no more detail than the hospital allows."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.consent import SiteRefusalError
from client.outgoing import outgoing, refusal, rounded
from client.site import Site
from tat_core.loss import TaskStats
from tat_core.packet import Packet, metrics_to_stats

SITE = Site("north", {"CT": Path("CT")}, Path("state"))
ASKED = Packet({"w": np.zeros((2, 3), np.float32)}, {}, {"round": 3, "base": "f" * 64, "run": "0" * 32})
WORDS: dict[str, str | int] = {"site": "north", "round": 3, "base": "f" * 64}


def _reply(**parts: object) -> Packet:
    return Packet(**{"arrays": {"w": np.ones((2, 3), np.float32)}, "metrics": {}, "config": WORDS, **parts})  # type: ignore[arg-type]


def test_an_update_with_its_statistics_leaves() -> None:
    metrics = {f"CT.{name}": value for name, value in asdict(TaskStats(4, 0.4, 0.2, 0.1234567, 0.01)).items()}
    sent = outgoing(_reply(metrics=metrics), ASKED, SITE)
    assert sent.metrics["CT.loss_sum"] == pytest.approx(4 * 0.03086)
    assert np.array_equal(sent.arrays["w"], np.ones((2, 3)))


@pytest.mark.parametrize(
    "parts",
    [
        {"arrays": {"w": np.ones((2, 4), np.float32)}},
        {"arrays": {"w": np.ones((2, 3), np.float32), "image": np.ones(1, np.float32)}},
        {"arrays": {"DOE^JOHN": np.ones((2, 3), np.float32)}},
        {"metrics": {"CT.count": 4, "CT.patients": 3}},
        {"metrics": {"CT.count": 4, "CT.loss_sum": float("nan")}},
        {"metrics": {"CT.count": "DOE^JOHN"}},
        {"config": {**WORDS, "note": "DOE^JOHN"}},
        {"config": {**WORDS, "site": "DOE^JOHN"}},
        {"config": {**WORDS, "base": "DOE^JOHN"}},
        {"config": {**WORDS, "tasks": "DOE^JOHN"}},
        {"config": {**WORDS, "patients": "7"}},
        {"config": {**WORDS, "torch": "1.2.840.10008.5.1.4.1.1.2.20200101.123456.99"}},
        {"config": {**WORDS, "error": "DOE^JOHN"}},
    ],
)
def test_anything_else_stops_the_reply(parts: dict[str, object]) -> None:
    with pytest.raises(SiteRefusalError, match="NOT_ALLOWED_OUT"):
        outgoing(_reply(**parts), ASKED, SITE)


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=12) | st.integers(), max_size=3))
def test_no_word_leaves_that_is_not_known(words: dict[str, str | int]) -> None:
    try:
        sent = outgoing(_reply(config=words), ASKED, SITE)
    except SiteRefusalError:
        return
    assert set(sent.config) <= {"site", "round", "base", "tasks", "patients", "fed_tat", "torch"}


def test_a_metric_that_the_hospital_withholds_stays() -> None:
    scores = Site("north", SITE.data, SITE.state_dir, metrics=("scores",))
    with pytest.raises(SiteRefusalError, match="NOT_ALLOWED_OUT"):
        outgoing(_reply(metrics={"CT.count": 4, "CT.loss_sum": 0.1}), ASKED, scores)


def test_a_code_is_one_of_the_list() -> None:
    assert refusal("PAUSED", "north").config == {"site": "north", "error": "PAUSED"}
    with pytest.raises(AssertionError):
        refusal("DOE^JOHN")


@given(st.integers(1, 1000), st.lists(st.floats(0, 1), min_size=5, max_size=5), st.integers(1, 8))
def test_rounding_keeps_what_the_guard_and_the_balancer_need(count: int, means: list[float], digits: int) -> None:
    names = [entry.name for entry in fields(TaskStats)][1:]
    exact: dict[str, int | float] = {"CT.count": count} | {f"CT.{n}": m * count for n, m in zip(names, means, strict=True)}
    stats = metrics_to_stats(rounded(exact, digits))["CT"]
    assert stats.count == count
    for name, mean in zip(names, means, strict=True):
        assert 0 <= getattr(stats, name) <= count
        assert getattr(stats, name) / count == pytest.approx(mean, rel=0.51 * 10 ** (1 - digits), abs=1e-300)
    assert rounded(rounded(exact, digits), digits).keys() == exact.keys()


@given(st.integers(0, 1000), st.floats(1, 100))
def test_scored_slices_are_counted_by_powers_of_two_and_the_mean_stays(count: int, psnr: float) -> None:
    sent = rounded({"CT.input.count": count, "CT.input.psnr_sum": psnr * count}, 4)
    shown = sent["CT.input.count"]
    assert shown == 0 if count == 0 else (shown <= count < 2 * shown and shown & (shown - 1) == 0)  # type: ignore[operator]
    if count:
        assert sent["CT.input.psnr_sum"] / shown == pytest.approx(psnr, rel=5.1e-4)
