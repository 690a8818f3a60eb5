"""The round engine at full size: memory over the number of sites, and what guarding, spooling and averaging cost.

    python -m simulations.bench.engine [--quick]

Synthetic sites reply with updates of the full 41.7 M-parameter model; nothing is trained. Needs 11 GB of disk in TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from server.aggregate import read_spool, spool, task_means, total_stats
from server.collect import instruct
from server.guard import examine
from server.journal import ServerState
from server.sites import SiteInfo
from server.strategy import run, step
from tat_core.balance import BalanceState, balance, step_shares
from tat_core.config import BalanceConfig, RunConfig, load_config
from tat_core.packet import Packet

TASKS = ("CT", "MRI", "PET")
TARGETS = {
    "memory_64_over_4": 1.15,
    "memory_64_over_model": 6.0,
    "spool_over_write": 3.0,
    "mean_over_numpy": 3.0,
    "seconds_per_site_1000_over_100": 1.5,
    "seconds_between_tasks": 1.0,
}


class SyntheticSites:
    """Sites that reply at once with an update that is a multiple of the model they were sent."""

    def __init__(self, number: int) -> None:
        self._members = {f"site-{i:04d}": SiteInfo((TASKS[i % 3],), "11-50") for i in range(number)}

    def members(self, config: RunConfig) -> dict[str, SiteInfo]:  # noqa: ARG002 - they are always there
        """All of them."""
        return self._members

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:  # noqa: ARG002
        """One reply at a time, as the engine takes them."""
        for number, (name, instruction) in enumerate(instructions.items()):
            if kind == "train":
                yield name, synthetic_reply(instruction, self._members[name].tasks[0], 1e-3 * (1 + number % 7))


def synthetic_reply(instruction: Packet, task: str, factor: float) -> Packet:
    """A reply that the guard accepts."""
    arrays = {key: value * np.float32(factor) for key, value in instruction.arrays.items()}
    statistics_ = {"count": 4, "input_sum": 0.2, "change_sum": 0.1, "loss_sum": 0.1, "loss_square_sum": 0.01, "gradient_sum": 0.4}
    return Packet(arrays, {f"{task}.{name}": value for name, value in statistics_.items()}, dict(instruction.config))


def peak_memory(sites: int, config: RunConfig) -> float:
    """Bytes at the peak of a process of its own that runs one round with so many sites."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as folder:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_one_round, args=(sites, config, Path(folder) / "run", sender))
        child.start()
        peak = receiver.recv()
        child.join()
    return float(peak)


def _one_round(sites: int, config: RunConfig, folder: Path, sender: object) -> None:
    run(config, SyntheticSites(sites), folder)
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # type: ignore[attr-defined]


def seconds_per_site(sites: int) -> float:
    """Seconds of the engine for one site and round, over three rounds of the smoke model with so many sites."""
    config = load_config("smoke", ["num_rounds=3", "federation.evaluate_every=1000", "train.ema_decay=0.0"])
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as folder:
        return _seconds(lambda: run(config, SyntheticSites(sites), Path(folder) / "run")) / (3 * sites)


def compare_spooling(config: RunConfig, repeats: int) -> tuple[float, float]:
    """Seconds to guard and spool one reply, and to write its bytes bare (both fsynced), medians of interleaved runs."""
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as name:
        folder = Path(name)
        instruction = _instruction(config)
        reply = synthetic_reply(instruction, "CT", 1e-3)
        ours, bare = [], []
        for _ in range(repeats):
            ours.append(_seconds(lambda: _guard_and_spool(folder, reply, instruction)))
            bare.append(_seconds(lambda: _write_bare(folder / "bare", reply)))
    return statistics.median(ours), statistics.median(bare)


def compare_means(config: RunConfig, files: int, repeats: int) -> tuple[float, float]:
    """Seconds for the engine's mean over so many spooled files, and for a bare numpy mean over memory maps of the same files."""
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as name:
        folder = Path(name)
        instruction = _instruction(config)
        for i in range(files):
            spool(folder, f"site-{i:04d}", synthetic_reply(instruction, "CT", 1e-3 * (i + 1)), {"scale": 1.0}, "0")
        names = list(instruction.arrays)
        replies = read_spool(folder, "0")
        assert len(replies) == files
        ours, bare = [], []
        for _ in range(repeats):
            ours.append(_seconds(lambda: [means["CT"] for _, means in task_means(replies, names)]))
            bare.append(_seconds(lambda: _bare_mean(sorted(folder.glob("*.safetensors")), names)))
    return statistics.median(ours), statistics.median(bare)


def compare_combining(config: RunConfig, repeats: int) -> tuple[float, float]:
    """Seconds to balance three tasks and combine their updates conflict-averse, and for a bare mean of the same three files."""
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as name:
        folder = Path(name)
        instruction = _instruction(config)
        for number, task in enumerate(TASKS):
            reply = synthetic_reply(instruction, task, 1e-3 * (number + 1))
            spool(folder, f"site-{number:04d}", reply, {"scale": 1.0}, "0")
        state = ServerState("0" * 32, 0, dict(instruction.arrays), BalanceState())
        replies, balancing = read_spool(folder, "0"), BalanceConfig(kind="published")
        federation = replace(config.federation, combination="conflict_averse")

        def between_tasks() -> None:
            stats = total_stats(replies)
            after, weights = balance(state.balance, stats, balancing)
            step(state, replies, step_shares(after, weights, stats, balancing), federation)

        ours, bare = [], []
        for _ in range(repeats):
            ours.append(_seconds(between_tasks))
            bare.append(_seconds(lambda: _bare_mean(sorted(folder.glob("*.safetensors")), list(instruction.arrays))))
    return statistics.median(ours), statistics.median(bare)


def _instruction(config: RunConfig) -> Packet:
    from tat_core.checkpoint import arrays_of
    from tat_core.model.tat import build_model

    arrays = arrays_of(build_model(config.model, 0))
    about = {"run": "0" * 32, "round": 1, "nonce": "0"}
    return instruct(arrays, about, {"site": SiteInfo(("CT",), "11-50")}, {})["site"]


def _guard_and_spool(folder: Path, reply: Packet, instruction: Packet) -> None:
    fault, _ = examine(reply, instruction, tasks=("CT",), max_samples=1000, longest=1e9)
    assert fault is None, fault
    spool(folder, "site", reply, {"scale": 1.0}, "0")


def _write_bare(path: Path, reply: Packet) -> None:
    with open(path, "wb") as file:
        for value in reply.arrays.values():
            file.write(value.data)
        file.flush()
        os.fsync(file.fileno())


def _bare_mean(paths: list[Path], names: list[str]) -> list[np.ndarray]:
    maps = [_memory_maps(path) for path in paths]
    return [np.mean([arrays[name] for arrays in maps], axis=0) for name in names]


def _memory_maps(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    whole = np.memmap(path, np.uint8, "r", 8 + size)
    return {
        name: whole[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smoke model and one repeat: does the script run?")
    quick = parser.parse_args().quick
    config = load_config("smoke" if quick else "paper", ["num_rounds=1", "federation.task_groups=[]", "name=bench"])
    config = replace(config, train=replace(config.train, ema_decay=0.0))
    repeats = 1 if quick else 3
    instruction = _instruction(config)
    model_bytes = sum(value.nbytes for value in instruction.arrays.values())
    peaks = {sites: peak_memory(sites, config) for sites in (4, 64)}
    spooled, written = compare_spooling(config, repeats)
    mean, bare = compare_means(config, 16, repeats)
    combined, averaged = compare_combining(config, repeats)
    few, many = seconds_per_site(100), seconds_per_site(100 if quick else 1000)
    figures = {
        "seconds_per_site_1000_over_100": many / few,
        "memory_64_over_4": peaks[64] / peaks[4],
        "memory_64_over_model": peaks[64] / model_bytes,
        "spool_over_write": spooled / written,
        "mean_over_numpy": mean / bare,
        "seconds_between_tasks": combined - averaged,
    }
    table = Table("figure", "ours", "beside", "ratio or difference", "target")
    rows = {
        "memory_64_over_4": (f"{peaks[64] / 1e6:.0f} MB, 64 sites", f"{peaks[4] / 1e6:.0f} MB, 4 sites"),
        "memory_64_over_model": (f"{peaks[64] / 1e6:.0f} MB, 64 sites", f"{model_bytes / 1e6:.0f} MB, model"),
        "spool_over_write": (f"{spooled:.2f} s guard and spool", f"{written:.2f} s bare write"),
        "mean_over_numpy": (f"{mean:.2f} s mean of 16", f"{bare:.2f} s numpy"),
        "seconds_between_tasks": (f"{combined:.2f} s balance, combine", f"{averaged:.2f} s bare mean of 3"),
        "seconds_per_site_1000_over_100": (f"{many * 1e3:.1f} ms a site, 1000", f"{few * 1e3:.1f} ms a site, 100"),
    }
    for name, (ours, beside) in rows.items():
        table.add_row(name, ours, beside, f"{figures[name]:.2f}", f"≤ {TARGETS[name]:g}")
    Console().print(table)
    holds = all(figures[name] <= target for name, target in TARGETS.items())
    print(json.dumps({"figures": figures, "targets": TARGETS, "holds": holds}))


if __name__ == "__main__":
    main()
