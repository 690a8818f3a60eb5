"""What a consortium is: SuperLink behind its proxy, TLS, registered keys, and hospitals that reach no further than they may."""

from __future__ import annotations

from pathlib import Path

import pytest
from consortium import Consortium, hashes, post

from server.coordinator import proxy_executable
from server.strategy import run
from simulations.inprocess import LocalSites
from simulations.processes import no_process_left
from tat_core.config import load_config

FORBIDDEN = (
    "/",
    "/docs",
    "/health",
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/pull-messages",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "//v1/control/list-runs",
)


@pytest.mark.timeout(600)
@pytest.mark.skipif(proxy_executable() is None, reason="nginx is not installed")
def test_three_hospitals_behind_tls_end_in_the_bits_of_the_simulation(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    hospitals = [smoke_hospitals[i] for i in (0, 2, 4)]
    consortium = Consortium(tmp_path, hospitals)
    with no_process_left():
        consortium.start()
        consortium.wait_for(lambda: len(consortium.records()) > 0, 240, "the first round")
        seen_from_outside = {path: post(consortium, path) for path in FORBIDDEN}
        deployed = consortium.wait_for_end()
        codes = consortium.stop()
    config = load_config("smoke", ["federation.num_sites=3"])
    run(config, LocalSites(hospitals, config), tmp_path / "alone")
    assert deployed == hashes(tmp_path / "alone")
    assert seen_from_outside == dict.fromkeys(FORBIDDEN, 403)
    assert set(codes.values()) == {0}, consortium.logs()
