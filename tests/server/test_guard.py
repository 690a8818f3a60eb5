"""Every way in which a reply can be unfit is named and kept out of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rule_sites import good_reply, good_scores

from server.guard import examine, examine_scores
from tat_core.packet import Packet

MODEL = {"embed.weight": np.zeros((2, 3), np.float32), "output.weight": np.zeros(4, np.float32)}
INSTRUCTION = Packet(MODEL, {}, {"round": 2, "base": "abc", "nonce": "n2"})


def _fault(reply: Packet) -> str | None:
    return examine(reply, INSTRUCTION, tasks=("CT",), max_samples=8, longest=10.0)[0]


def _with_array(value: np.ndarray) -> Callable[[Packet], Packet]:
    return lambda reply: replace(reply, arrays={**reply.arrays, "embed.weight": value})


def _with(**metrics: Any) -> Callable[[Packet], Packet]:
    renamed = {key.replace("_", ".", 1): value for key, value in metrics.items()}
    return lambda reply: replace(reply, metrics={**reply.metrics, **renamed})


def test_a_good_reply_passes() -> None:
    assert _fault(good_reply("a-ct", INSTRUCTION)) is None


@pytest.mark.parametrize(
    ("code", "spoil"),
    [
        ("OUT_OF_MEMORY", lambda r: Packet(config={"error": "OUT_OF_MEMORY"})),
        ("STALE", lambda r: replace(r, config={**r.config, "round": 1})),
        ("STALE", lambda r: replace(r, config={**r.config, "base": "other"})),
        ("STALE", lambda r: replace(r, config={**r.config, "nonce": "n1"})),
        ("STALE", lambda r: replace(r, config={})),
        ("UNKNOWN_ERROR", lambda r: Packet(config={"error": "no such file: /data/DOE^JOHN.dcm"})),
        ("WRONG_NAMES", lambda r: replace(r, arrays={**r.arrays, "extra": np.zeros(1, np.float32)})),
        ("WRONG_NAMES", lambda r: replace(r, arrays={})),
        ("WRONG_SHAPE", _with_array(np.zeros((1, 3), np.float32))),
        ("WRONG_TYPE", _with_array(np.zeros((2, 3), np.float64))),
        ("NOT_FINITE", _with_array(np.full((2, 3), np.nan, np.float32))),
        ("NOT_FINITE", _with_array(np.full((2, 3), np.inf, np.float32))),
        ("NOT_FINITE", _with_array(np.full((2, 3), 3e38, np.float32))),
        ("ABSURD_LENGTH", _with_array(np.full((2, 3), 100.0, np.float32))),
        ("BAD_COUNT", _with(CT_count=-4)),
        ("BAD_COUNT", _with(CT_count=0)),
        ("BAD_COUNT", _with(CT_count=9)),
        ("BAD_COUNT", _with(CT_count=2.5)),
        ("BAD_STATISTICS", _with(CT_loss_sum=float("nan"))),
        ("BAD_STATISTICS", _with(CT_loss_sum=-1.0)),
        ("BAD_STATISTICS", _with(CT_input_sum=1e12)),
        ("BAD_STATISTICS", _with(CT_input_sum="many")),
        ("BAD_STATISTICS", lambda r: replace(r, metrics={"CT.loss_sum": 1.0})),
        ("WRONG_TASKS", lambda r: replace(r, metrics={})),
        ("WRONG_TASKS", lambda r: replace(r, metrics={k.replace("CT", "PET"): v for k, v in r.metrics.items()})),
    ],
)
def test_an_unfit_reply_is_named(code: str, spoil: Callable[[Packet], Packet]) -> None:
    assert _fault(spoil(good_reply("a-ct", INSTRUCTION))) == code


def test_good_scores_pass() -> None:
    assert examine_scores(good_scores("a-ct", INSTRUCTION), INSTRUCTION, tasks=("CT",), max_slices=2) is None
    assert examine_scores(Packet({}, {}, INSTRUCTION.config), INSTRUCTION, tasks=("CT",), max_slices=2) is None


@pytest.mark.parametrize(
    ("code", "metric", "value"),
    [
        ("BAD_COUNT", "count", 0),
        ("BAD_COUNT", "count", 3),
        ("BAD_COUNT", "count", 1.5),
        ("BAD_SCORES", "psnr_sum", float("nan")),
        ("BAD_SCORES", "psnr_sum", 1e12),
        ("BAD_SCORES", "ssim_sum", -3.0),
        ("BAD_SCORES", "rmse_sum", "low"),
    ],
)
def test_unfit_scores_are_named(code: str, metric: str, value: Any) -> None:
    reply = good_scores("a-ct", INSTRUCTION)
    spoilt = replace(reply, metrics={**reply.metrics, f"CT.restored.{metric}": value})
    assert examine_scores(spoilt, INSTRUCTION, tasks=("CT",), max_slices=2) == code


def test_stale_scores_and_failures_are_named() -> None:
    reply = good_scores("a-ct", INSTRUCTION)
    stale = replace(reply, config={**reply.config, "nonce": "n1"})
    assert examine_scores(stale, INSTRUCTION, tasks=("CT",), max_slices=2) == "STALE"
    assert examine_scores(Packet(config={"error": "SITE_IO"}), INSTRUCTION, tasks=("CT",), max_slices=2) == "SITE_IO"
