"""The configuration that the engine's tests share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tat_core.config import RunConfig, load_config


@pytest.fixture
def config() -> RunConfig:
    """The smallest run: three rounds of the smoke model."""
    return replace(load_config("smoke", ["train.ema_decay=0.9", "federation.patience_s=0"]), num_rounds=3)
