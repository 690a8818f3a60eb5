"""The ServerApp of the coordinator."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.grid import FlowerSites
from server.strategy import run
from tat_core.config import load_config

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; what they leave is under ``<output_dir>/<name>``."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("fed_tat").setLevel(logging.INFO)
    config = load_config(str(context.run_config["preset"]), str(context.run_config["overrides"]))
    torch.set_num_threads(config.train.num_threads)
    run(config, FlowerSites(grid), Path(config.output_dir) / config.name)
