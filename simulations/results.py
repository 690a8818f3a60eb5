"""The results of a finished run as rows of text, and as tables for the terminal; the report shows the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tat_core.metrics import DATA_RANGE
from tat_core.tasks import TASKS

ARMS = {"input": "Input", "alone": "Alone", "together": "Together", "fine_tuned": "Fine-tuned"}
# Key, label, digits after the point (None: three significant), and whether more is better.
METRICS = (("psnr", "PSNR", 2, True), ("ssim", "SSIM", 4, True), ("rmse", "RMSE", None, False))


@dataclass(frozen=True)
class Row:
    """One line of a results table, numbers already written out.

    Attributes
    ----------
    detail : str
        What the scores are of; may be empty.
    unit : str
        Of RMSE.
    cells : list of (str, bool)
        Metric by metric, arm by arm: the number, and whether it is the best of its metric.
    gain, over_alone, required : str
        PSNR together minus that of the input and what was asked of it; that of the hospital's last model (fine-tuned, or
        together if there is none) minus that of training alone; in dB.
    """

    name: str
    detail: str
    unit: str
    slices: str
    cells: list[tuple[str, bool]]
    gain: str
    over_alone: str
    required: str
    passed: bool | None


@dataclass(frozen=True)
class ResultTable:
    """A titled table; ``arms`` are those that have scores, ``judged`` tells whether rows can pass or fail."""

    title: str
    of: str
    arms: list[str]
    rows: list[Row]
    judged: bool


def result_tables(summary: Mapping[str, Any]) -> list[ResultTable]:
    """The two tables of a finished run: by task and by hospital."""
    tasks, hospitals = summary.get("tasks", {}), summary.get("hospitals", {})
    tables = [
        make_table("Test images, by task", "Task", tasks, judged=True),
        make_table("Test images, by hospital", "Hospital", hospitals, judged=False),
    ]
    return [table for table in tables if table.rows]


def make_table(title: str, of: str, entries: Mapping[str, Mapping[str, Any]], judged: bool) -> ResultTable:
    """A table with one row per entry (an entry's keys: ``arms``, and as they apply ``task``, ``synthetic``, ``unit``)."""
    arms = [arm for arm in ARMS if any(entry.get("arms", {}).get(arm) for entry in entries.values())]
    return ResultTable(title, of, arms, [_row(name, entry, arms) for name, entry in entries.items()], judged)


def windows(summary: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, str]:
    """How the scores of each task are to be read: its evaluation window and data range."""
    entries = {**{task: {} for task in tasks}, **summary.get("tasks", {})}
    return {task: _window(task, entry) for task, entry in entries.items()}


def results_table(summary: Mapping[str, Any]) -> Group:
    """Tables for the terminal: by task, by hospital, and the windows that the scores refer to."""
    parts = [_terminal_table(table) for table in result_tables(summary)]
    notes = [Text(f"{task}: window {window}", style="dim") for task, window in windows(summary, ()).items()]
    return Group(*parts, *notes)


def number(value: Any, digits: int | None, sign: bool = False) -> str:
    """A number for people; a dash for what is missing or not finite; three significant digits if ``digits`` is None."""
    if not _is_number(value):
        return "–"
    text = three_digits(value) if digits is None else format(value, f"{'+' if sign else ''}.{digits}f")
    return text.replace("-", "−")


def three_digits(value: float) -> str:
    """Three significant digits, zeros kept; whole from 100 on."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _row(name: str, entry: Mapping[str, Any], arms: list[str]) -> Row:
    scores = entry.get("arms", {})
    task = entry.get("task") or name
    unit = entry.get("unit") or (TASKS[task].unit if task in TASKS else "?")
    detail = [entry.get("task"), "synthetic" if entry.get("synthetic") else None]
    psnr = {arm: scores.get(arm, {}).get("psnr") for arm in ARMS}
    counts = [scores[arm]["count"] for arm in reversed(arms) if "count" in scores.get(arm, {})]
    return Row(
        name,
        " · ".join(str(part) for part in detail if part),
        unit,
        str(counts[0]) if counts else "–",
        [
            cell
            for key, _, digits, more in METRICS
            for cell in _cells([scores.get(arm, {}).get(key) for arm in arms], digits, more)
        ],
        number(_difference(psnr["together"], psnr["input"]), 2, sign=True),
        number(_difference(psnr["fine_tuned"] or psnr["together"], psnr["alone"]), 2, sign=True),
        number(entry.get("required_gain_db"), 2),
        # Without a requirement nothing was passed, whatever the gain.
        entry.get("passed") if entry.get("required_gain_db") is not None else None,
    )


def _cells(values: list[Any], digits: int | None, more: bool) -> list[tuple[str, bool]]:
    known = {value for value in values if _is_number(value)}
    best = None if len(known) < 2 else (max(known) if more else min(known))
    return [(number(value, digits), best is not None and value == best) for value in values]


def _window(task: str, entry: Mapping[str, Any]) -> str:
    low, high = entry.get("evaluation_window") or (TASKS[task].evaluation_window if task in TASKS else ("?", "?"))
    unit = entry.get("unit") or (TASKS[task].unit if task in TASKS else "?")
    ends = [str(end) if isinstance(end, str) else f"{end:g}".replace("-", "−") for end in (low, high)]
    return f"[{ends[0]}, {ends[1]}] {unit}, data range {entry.get('data_range', DATA_RANGE)}"


def _terminal_table(table: ResultTable) -> Table:
    # An arm a line: side by side, three metrics of three arms do not fit into 80 columns.
    shown = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for header in (table.of, "Images"):
        shown.add_column(header, no_wrap=True)
    for header in ("Slices", "PSNR dB", "SSIM", "RMSE"):
        shown.add_column(header, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for header in ("Gain dB", "vs alone"):
        shown.add_column(header, justify="right", no_wrap=True)
    for row in table.rows:
        verdict = "" if row.passed is None else "green" if row.passed else "red"
        mark = {"": "", "green": " ✓", "red": " ✗"}[verdict]
        for index, arm in enumerate(table.arms):
            first, last = index == 0, index == len(table.arms) - 1
            cells = [Text(text, style="bold green" if best else "") for text, best in row.cells[index :: len(table.arms)]]
            shown.add_row(
                Text(row.name if first else "", style="bold"),
                ARMS[arm].lower(),
                row.slices if first else "",
                *cells,
                row.unit,
                Text(row.gain + mark if last else "", style=f"bold {verdict}".strip()),
                row.over_alone if last else "",
                end_section=last,
            )
    return shown


def _difference(one: Any, other: Any) -> float | None:
    return one - other if _is_number(one) and _is_number(other) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
