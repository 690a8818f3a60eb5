"""`report.html` from a run's record alone: one file, without script or network, for a radiologist and for a printer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from simulations.report_figures import training_figure, update_figure, validation_figure
from simulations.report_panels import Panel, read_panel
from simulations.results import ARMS, METRICS, ResultTable, make_table, number, result_tables, results_table, windows
from tat_core.checkpoint import replacing
from tat_core.record import RunRecord, last_sign_of_life, read_record
from tat_core.tasks import TASKS

__all__ = ["results_table", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run's folder, whatever of its record there is.

    Parameters
    ----------
    run_dir : pathlib.Path
        Holds any of ``rounds.jsonl``, ``summary.json``, ``config.yaml`` and ``panels/<site>.npz``.

    Returns
    -------
    pathlib.Path
        The file that was written.

    Raises
    ------
    ValueError
        If the folder holds no record of a run.
    """
    record = read_record(run_dir)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report_template.html.j2").render(**_context(record))
    path = run_dir / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _context(record: RunRecord) -> dict[str, Any]:
    summary = record.summary or {}
    notes = list(record.notes)
    tables = _tables(record)
    return {
        "name": record.name,
        "finished": record.summary is not None,
        "passed": summary.get("passed") if any(row.passed is not None for table in tables for row in table.rows) else None,
        "rounds_done": len(record.rounds),
        "num_rounds": record.num_rounds,
        "last_seen": f"{last_sign_of_life(record):%Y-%m-%d %H:%M} UTC",
        "facts": _facts(record),
        "arms": ARMS,
        "metrics": METRICS,
        "tables": tables,
        "fine_tuned": any("fine_tuned" in table.arms for table in tables),
        "windows": windows(summary, record.tasks),
        "figures": _figures(record),
        "hospitals": _hospitals(record, notes),
        "sites": _site_rows(record),
        "config": json.dumps(record.config, indent=2, ensure_ascii=False, default=str),
        "notes": notes,
    }


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    summary = record.summary or {}
    model = summary.get("model", {})
    last = record.rounds[-1] if record.rounds else {}
    started = summary.get("created_at") or (record.rounds[0].get("started_at") if record.rounds else None)
    seconds = summary.get("seconds") or {"rounds": sum(float(line.get("seconds") or 0) for line in record.rounds)}
    facts = [
        ("Run", record.name),
        ("Preset", summary.get("preset", record.config.get("preset"))),
        ("Seed", summary.get("seed", record.config.get("seed"))),
        ("Date", str(started).replace("T", " ")[:19] if started else None),
        ("Rounds", f"{len(record.rounds)} of {record.num_rounds or '?'}" if record.rounds else None),
        ("Time", ", ".join(f"{part} {value:.0f} s" for part, value in seconds.items() if isinstance(value, int | float))),
        ("Parameters", f"{model['parameters']:,}".replace(",", " ") if "parameters" in model else None),
        ("Model sha256", model.get("sha256") or last.get("model_sha256")),
        ("Versions", ", ".join(f"{package} {version}" for package, version in summary.get("versions", {}).items())),
    ]
    return [(key, str(value)) for key, value in facts if value not in (None, "")]


def _tables(record: RunRecord) -> list[ResultTable]:
    if record.summary is not None:
        return result_tables(record.summary)
    entries = {task: entry for task in record.tasks if (entry := _latest_validation(record.rounds, task))}
    return [make_table("Validation so far", "Task", entries, judged=False)] if entries else []


def _latest_validation(rounds: Iterable[Mapping[str, Any]], task: str) -> dict[str, Any] | None:
    found = [(line.get("tasks", {}).get(task) or {}).get("validation") for line in rounds]
    latest = next((entry for entry in reversed(found) if entry), None)
    return latest and {"arms": {"input": latest.get("input") or {}, "together": latest.get("restored") or {}}}


def _figures(record: RunRecord) -> list[tuple[str, str]]:
    figures = [
        ("Validation during training", validation_figure(record.rounds, record.tasks)),
        ("Loss and weights of each task", training_figure(record.rounds, record.tasks)),
        ("What the coordinator saw of the updates", update_figure(record.rounds)),
    ]
    return [(caption, uri) for caption, uri in figures if uri]


def _hospitals(record: RunRecord, notes: list[str]) -> list[dict[str, Any]]:
    described = (record.summary or {}).get("hospitals", {})
    hospitals = []
    for path in sorted((record.folder / "panels").glob("*.npz")):
        site = path.stem
        entry = described.get(site, {})
        task = entry.get("task") or _task_of(record, site)
        if task not in TASKS:
            notes.append(f"panels/{path.name}: the record does not say which task it shows, so it was left out")
            continue
        try:
            panel: Panel = read_panel(path, TASKS[task])
        except ValueError as error:
            notes.append(f"panels/{path.name}: {error}")
            continue
        hospitals.append(
            {
                "site": site,
                "task": TASKS[task],
                "scanner": entry.get("scanner"),
                "synthetic": entry.get("synthetic"),
                "panel": panel,
            }
        )
    return hospitals


def _task_of(record: RunRecord, site: str) -> str | None:
    tasks = next((line["sites"][site].get("tasks") for line in reversed(record.rounds) if site in line.get("sites", {})), None)
    return tasks[0] if tasks else None


def _site_rows(record: RunRecord) -> list[dict[str, str]]:
    rows = []
    for site in record.sites:
        lines = [line["sites"][site] for line in record.rounds if site in line.get("sites", {})]
        if not lines:
            continue
        answered = [line for line in lines if line.get("status") == "ok"]
        seconds = [float(line["seconds"]) for line in answered if line.get("seconds") is not None]
        failures = sorted({str(line.get("status")) for line in lines if line.get("status") != "ok"})
        rows.append(
            {
                "site": site,
                "tasks": ", ".join(lines[-1].get("tasks") or []),
                "answered": f"{len(answered)} of {len(record.rounds)}",
                "seconds": number(sum(seconds) / len(seconds), 1) if seconds else "–",
                "megabytes": number(sum(float(line.get("bytes") or 0) for line in lines) / 1e6, 1),
                "failures": ", ".join(failures) or "none",
            }
        )
    return rows
