"""The ServerApp of the coordinator."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import pull_objects

from server.grid import FlowerSites
from server.strategy import run
from tat_core.config import load_config
from tat_core.flower_waits import wait_less

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; what they leave is under ``<output_dir>/<name>``."""
    _log_to_stdout()
    wait_less(pull_objects)
    config = load_config(str(context.run_config["preset"]), str(context.run_config["overrides"]))
    torch.set_num_threads(config.train.num_threads)
    run(config, FlowerSites(grid, config), Path(config.output_dir) / config.name)


def _log_to_stdout() -> None:
    """Flower sends what is printed here to whoever follows the run's log."""
    log = logging.getLogger("fed_tat")
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
