"""`tat simulate`: hospitals, each alone, then together under Flower, then scored and reported."""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from server.strategy import describe_round
from simulations.arms import ARMS, Job, in_parallel, keep_alone, row_name, score, total_scores
from simulations.flower import simulate
from simulations.hospitals import hospitals_in
from simulations.processes import no_process_left
from simulations.report import results_table, write_report
from tat_core.checkpoint import read_model, replacing
from tat_core.config import RunConfig, config_to_dict, load_config
from tat_core.metrics import DATA_RANGE
from tat_core.tasks import TASKS

WORKERS = 2


def command(
    settings: Annotated[
        list[str] | None, typer.Argument(help="preset=NAME and overrides, such as train.lr=1e-3", metavar="KEY=VALUE…")
    ] = None,
    sites: Annotated[
        Path | None,
        typer.Option(help="Folder of hospitals, each with a site.yaml; without any, sample hospitals are made in it."),
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Sample hospitals to make: demo (real sizes) or smoke (tiny).")] = None,
) -> None:
    """Train a model together with simulated hospitals, compare with each alone, and write a report."""
    preset, overrides = _split_preset(settings or [])
    if not any(item.startswith(("name=", "resume=")) for item in overrides):
        overrides.append(f"name={_free_name(load_config(preset, overrides))}")
    config = load_config(preset, overrides)
    profile = profile or ("smoke" if preset == "smoke" else "demo")
    console = Console()
    try:
        with no_process_left():
            summary = run(config, overrides, sites or Path("data") / f"hospitals-{profile}", profile, console)
    except KeyboardInterrupt:
        console.print("Stopped.")
        os._exit(130)  # at once: a library's thread that the interrupt left waiting would otherwise be waited for
    console.print(results_table(summary))
    console.print(f"Report: {_folder(config) / 'report.html'}")
    if not summary["passed"]:
        failed = [task for task, facts in summary["tasks"].items() if not facts["passed"]]
        console.print(f"[red]Not enough gain over the input: {', '.join(failed)}")
        raise typer.Exit(1)


def run(config: RunConfig, overrides: list[str], sites_dir: Path, profile: str, console: Console) -> dict[str, Any]:
    """Do everything that `tat simulate` does, and return what summary.json holds.

    Raises
    ------
    ValueError
        The run's folder is taken, or the federated run did not reach its last round.
    """
    folder = _folder(config)
    if folder.exists() and not config.resume:
        raise ValueError(
            f"simulate: expected a new run, got name={config.name}, whose folder exists; choose another name=… or remove {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    site_folders = hospitals_in(sites_dir, profile, workers=WORKERS)
    jobs = [Job(path / "site.yaml", config, folder) for path in site_folders]

    steps = len(jobs) * config.local_steps_in_all
    seconds = {}
    with _progress(console) as progress:
        started = time.perf_counter()
        bar = progress.add_task("each hospital alone", total=steps)
        in_parallel(keep_alone, jobs, WORKERS, lambda done: progress.update(bar, completed=done))
        progress.update(bar, completed=steps)
        seconds["alone"] = time.perf_counter() - started

        started = time.perf_counter()
        bar = progress.add_task("together: starting Flower", total=config.num_rounds)
        flower_overrides = [*overrides, f"output_dir={folder.parent.resolve()}", f"federation.num_sites={len(jobs)}"]
        simulate(
            config.preset,
            flower_overrides,
            sites_dir,
            len(jobs),
            folder / "flower.log",
            lambda: _show_rounds(progress, bar, folder),
            WORKERS,
        )
        last = _last_record(folder)
        if last is None or last["round"] != config.num_rounds:
            done = 0 if last is None else last["round"]
            raise ValueError(f"simulate: expected {config.num_rounds} rounds, got {done}; see {folder / 'flower.log'}")
        seconds["together"] = time.perf_counter() - started

        started = time.perf_counter()
        bar = progress.add_task("scoring the test images", total=None)
        results = in_parallel(score, jobs, WORKERS)
        progress.update(bar, total=1, completed=1)
        seconds["evaluation"] = time.perf_counter() - started

    summary = summarise(config, folder, results, {key: round(value, 1) for key, value in seconds.items()})
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1))
    write_report(folder)
    return summary


def summarise(config: RunConfig, folder: Path, results: list[dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """Every number that the terminal and the report show."""
    model = read_model(folder / "model.safetensors")
    tasks: dict[str, Any] = {}
    for name in (t for t in config.tasks if any(t in r["tasks"] for r in results)):
        arms = {arm: scores.mean() for arm, scores in total_scores(results, name).items()}
        gain, required = arms["together"]["psnr"] - arms["input"]["psnr"], config.evaluate.required_gain_db
        tasks[name] = {
            "unit": TASKS[name].unit,
            "evaluation_window": list(TASKS[name].evaluation_window),
            "data_range": DATA_RANGE,
            "arms": arms,
            "gain_db": gain,
            "required_gain_db": required,
            "passed": required is None or gain >= required,
        }
    hospitals = {
        row_name(result["site"], task, result["tasks"]): {
            "task": task,
            "scanner": result["scanner"],
            "synthetic": result["synthetic"],
            "arms": {arm: scores[arm].mean() for arm in ARMS if arm in scores},
        }
        for result in results
        for task, scores in result["tasks"].items()
    }
    return {
        "name": config.name,
        "preset": config.preset,
        "seed": config.seed,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("fed-tat", "flwr", "torch")}},
        "config": config_to_dict(config),
        "model": {
            "file": "model.safetensors",
            "sha256": model.sha256,
            "round": model.metadata["extra"]["round"],
            "parameters": sum(value.size for value in model.arrays.values()),
        },
        "tasks": tasks,
        "hospitals": hospitals,
        "seconds": seconds,
        "passed": all(facts["passed"] for facts in tasks.values()),
    }


def _split_preset(settings: list[str]) -> tuple[str, list[str]]:
    presets = [s.removeprefix("preset=") for s in settings if s.startswith("preset=")]
    if len(presets) > 1:
        raise ValueError(f"simulate: expected one preset=…, got {len(presets)}; give one")
    return (presets[0] if presets else "demo"), [s for s in settings if not s.startswith("preset=")]


def _free_name(config: RunConfig) -> str:
    """The preset's own name for the run, or with a number if that is taken: a second demo does not need a decision."""
    names = itertools.chain([config.name], (f"{config.name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not (Path(config.output_dir) / name).exists())


def _folder(config: RunConfig) -> Path:
    return Path(config.output_dir) / config.name


def _last_record(folder: Path) -> dict[str, Any] | None:
    path = folder / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else None


def _show_rounds(progress: Progress, bar: Any, folder: Path) -> None:
    record = _last_record(folder)
    if record is not None:
        progress.update(bar, completed=record["round"], description="together: " + describe_round(record))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
