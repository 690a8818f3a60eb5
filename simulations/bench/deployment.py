"""What a round costs beyond training, with three hospitals as processes of their own on loopback.

    python -m simulations.bench.deployment [--rounds 8] [--full-rounds 4] [--skip-full]

Side by side: `flower-client` with its warm trainer, and Flower's own SuperNode, which starts a new Python for each message. Both
run the same apps, so both profit from the model travelling as two arrays. The cost is a round's duration less what its slowest
site worked, for each of its messages; the median over the rounds after the first. The smoke model is scored every round; the full
one is not, as in its preset, and takes one small step, since training is not what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from simulations.deployed import deploy, flower_client, stock_node
from simulations.hospitals import build_hospitals
from simulations.processes import no_process_left

LIMITS_S = {"smoke": 2.5, "full": 12.0}
CHOSEN = (0, 2, 4)  # of the six sample hospitals: one a task
FULL = [
    *("train.patch_size=32", "train.batch_size=1", "train.local_steps=1"),
    *("federation.evaluate_every=1000", "federation.fine_tune_steps=0"),
]
NODES = {"flower-client": flower_client, "stock": stock_node}
_WORKED = re.compile(r"(train|evaluate): answered in ([\d.]+) s")


@dataclass(frozen=True)
class Cost:
    """What a deployment cost.

    Attributes
    ----------
    overhead_s : float
        A round less the work in it, median.
    round_s : float
        A round, median.
    superlink_mb, serverapp_mb : float
        Peak resident memory.
    """

    overhead_s: float
    round_s: float
    superlink_mb: float
    serverapp_mb: float


def measure(hospitals: list[Path], preset: str, overrides: list[str], node: str, folder: Path) -> Cost:
    """Run a deployment to its end and read what it wrote."""
    for hospital in hospitals:
        shutil.rmtree(hospital / "state", ignore_errors=True)
    with no_process_left():
        settings = [*overrides, "federation.num_sites=3", f"output_dir={folder / 'runs'}", "name=bench"]
        seen = deploy(hospitals, preset, settings, folder, node=NODES[node], timeout_s=1500)
    lines = (folder / "runs" / "bench" / "rounds.jsonl").read_text().splitlines()
    rounds_s = [json.loads(line)["seconds"] for line in lines]
    worked = [work_by_round(hospital / "state" / "site.log") for hospital in hospitals]
    overheads = [
        seconds - sum(max(site[number].get(kind, 0.0) for site in worked) for kind in ("train", "evaluate"))
        for number, seconds in enumerate(rounds_s)
    ]
    # The first round starts things up, and only the last of the full model's is scored.
    kept = slice(1, -1) if preset == "full" else slice(1, None)
    return Cost(
        statistics.median(overheads[kept]),
        statistics.median(rounds_s[kept]),
        seen.peak_bytes["superlink"] / 1e6,
        seen.peak_bytes["serverapp"] / 1e6,
    )


def work_by_round(log: Path) -> list[dict[str, float]]:
    """Seconds that a site worked, by kind of message, for each round."""
    rounds: list[dict[str, float]] = []
    for kind, seconds in _WORKED.findall(log.read_text()):
        if kind == "train":
            rounds.append({})
        rounds[-1][kind] = float(seconds)
    return rounds


def main() -> int:
    """Print a table and one JSON line; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--full-rounds", type=int, default=4)
    parser.add_argument("--skip-full", action="store_true")
    options = parser.parse_args()
    plans = {"smoke": [f"num_rounds={options.rounds}"]}
    if not options.skip_full:
        plans["full"] = [f"num_rounds={options.full_rounds}", *FULL]
    costs: dict[tuple[str, str], Cost] = {}
    with tempfile.TemporaryDirectory(prefix="bench-deployment-") as place:
        hospitals = [build_hospitals(Path(place) / "hospitals", "smoke")[number] for number in CHOSEN]
        for model, overrides in plans.items():
            for node in NODES:
                costs[model, node] = measure(hospitals, model, overrides, node, Path(place) / f"{model}-{node}")
                print(f"{model}, {node}: {costs[model, node]}, load {os.getloadavg()[0]:.1f}", flush=True)
    table = Table("model", "node", "overhead of a round", "limit", "round", "SuperLink", "ServerApp")
    for (model, node), cost in costs.items():
        limit = f"<= {LIMITS_S[model]} s" if node == "flower-client" else ""
        memory = [f"{size:,.0f} MB" for size in (cost.superlink_mb, cost.serverapp_mb)]
        table.add_row(model, node, f"{cost.overhead_s:.2f} s", limit, f"{cost.round_s:.2f} s", *memory)
    Console().print(table)
    figures = {f"{model}_{node}_{key}": round(value, 3) for (model, node), c in costs.items() for key, value in vars(c).items()}
    holds = all(costs[model, "flower-client"].overhead_s <= LIMITS_S[model] for model in plans)
    print(json.dumps({"figures": figures, "targets": {f"{m}_overhead_s": LIMITS_S[m] for m in plans}, "holds": holds}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
