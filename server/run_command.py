"""`tat run`: look at runs from their record on disk, whether they are going on, finished or dead."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.harm import COMPARISON, is_better_alone
from tat_core.record import RunRecord, is_run, last_sign_of_life, read_record, state_of

app = typer.Typer(no_args_is_help=True, help="Look at runs from their record.")

RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]
RunName = Annotated[str, typer.Argument(help="A run's name, or its folder.", metavar="RUN")]
_STYLES = {"finished": "green", "running": "cyan", "silent": "red"}


@app.command("list")
def list_runs(runs: RunsFolder = Path("runs")) -> None:
    """All runs: state, rounds done, gain over the input."""
    folders = sorted(path for path in runs.iterdir() if path.is_dir() and is_run(path)) if runs.is_dir() else []
    if not folders:
        raise ValueError(f"run list: expected runs in {runs}, got none; give their folder by --runs")
    now = datetime.now(UTC)
    table = _table("Run", "State", "Rounds", "Gain dB", "Best round", "Last written")
    for record in map(read_record, folders):
        state = state_of(record, now)
        best = next((line for line in record.rounds if line["round"] == _best_round(record)), {})
        table.add_row(
            Text(record.folder.name, style="bold"),
            Text(state, style=_STYLES[state]),
            f"{len(record.rounds)}/{record.num_rounds or '?'}",
            _number(best.get("mean_gain_db"), "+.2f"),
            str(best.get("round", "–")),
            _ago(now - last_sign_of_life(record)),
        )
    _print(table)


@app.command()
def status(run: RunName, runs: RunsFolder = Path("runs")) -> None:
    """Where a run stands: tasks, hospitals, time left. Exit code 1 if it is silent without having finished."""
    record, now = _find(run, runs), datetime.now(UTC)
    state = state_of(record, now)
    _print(Text.assemble((record.folder.name, "bold"), ": ", (state, _STYLES[state]), f", {_progress(record, state, now)}"))
    if record.rounds:
        _print(_task_table(record), "", _site_table(record))
    if (record.folder / COMPARISON).is_file():
        _print("", _harm_table(json.loads((record.folder / COMPARISON).read_text())["sites"]))
    for note in record.notes:
        _print(Text(note, style="yellow"))
    if state == "silent":
        raise typer.Exit(1)


@app.command()
def readmit(run: RunName, site: Annotated[str, typer.Argument(help="The site's name.")], runs: RunsFolder = Path("runs")) -> None:
    """Let a site back that was left out after refused replies; it takes part again from the next round."""
    record = _find(run, runs)
    known = sorted({name for line in record.rounds for name in line.get("sites", {})})
    if site not in known:
        raise ValueError(f"run readmit: expected one of the run's sites ({', '.join(known)}), got {site!r}; choose one of them")
    requests = record.folder / "readmit"
    requests.mkdir(exist_ok=True)
    (requests / site).touch()
    _print(Text(f"{site} takes part again from the next round"))


@app.command()
def show(
    run: RunName,
    runs: RunsFolder = Path("runs"),
    number: Annotated[int | None, typer.Option("--round", help="One round in full, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All rounds, as one JSON list.")] = False,
) -> None:
    """The rounds of a run, one line each."""
    record = _find(run, runs)
    if number is not None:
        found = [line for line in record.rounds if line["round"] == number]
        if not found:
            raise ValueError(
                f"run show: expected a round that is on record (1 to {len(record.rounds)}), got {number}; choose another"
            )
        typer.echo(json.dumps(found[0], indent=2, ensure_ascii=False))
    elif as_json:
        typer.echo(json.dumps(record.rounds, ensure_ascii=False))
    else:
        _print(_round_table(record))


@app.command()
def tensorboard(
    run: RunName,
    runs: RunsFolder = Path("runs"),
    output: Annotated[Path, typer.Option("-o", help="New folder.")] = Path("tensorboard"),
) -> None:
    """Write a run's curves for TensorBoard (needs `pip install 'fed-tat[tensorboard]'`)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("run tensorboard: expected TensorBoard, got none; pip install 'fed-tat[tensorboard]'") from None
    record = _find(run, runs)
    folder = output / record.folder.name
    if folder.exists():
        raise ValueError(f"run tensorboard: expected a new folder, got {folder}, which exists; choose another with -o")
    with SummaryWriter(str(folder)) as writer:
        for line in record.rounds:
            for name, value in curves_of(line).items():
                writer.add_scalar(name, value, line["round"])
    _print(Text(f"tensorboard --logdir {output}"))


def curves_of(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of one round's record that make curves, by TensorBoard's names."""
    curves = {f"round/{key}": line[key] for key in ("seconds", "update_norm", "mean_gain_db") if line.get(key) is not None}
    curves |= {f"cosine/{pair}": value for pair, value in line.get("cosines", {}).items()}
    for task, facts in line.get("tasks", {}).items():
        curves |= {f"{key}/{task}": facts[key] for key in ("loss", "task_weight", "aggregation_weight") if key in facts}
        for arm, scores in facts.get("validation", {}).items():
            curves |= {f"validation {metric}/{task} {arm}": scores[metric] for metric in ("psnr", "ssim", "rmse")}
    return {name: float(value) for name, value in curves.items()}


def _find(run: str, runs: Path) -> RunRecord:
    return read_record(Path(run) if is_run(Path(run)) else runs / run)


def _progress(record: RunRecord, state: str, now: datetime) -> str:
    text = f"round {len(record.rounds)} of {record.num_rounds or '?'}"
    seconds = [float(line.get("seconds") or 0) for line in record.rounds]
    if state == "running" and seconds:
        left = timedelta(seconds=(record.num_rounds - len(seconds)) * sum(seconds) / len(seconds))
        text += f", about {_duration(left)} left"
    return f"{text}; last written {_ago(now - last_sign_of_life(record))}"


def _task_table(record: RunRecord) -> Table:
    table = _table("Task", "Loss", "Task weight", "Share", "Scored in", "Input dB", "Restored dB", "Gain dB")
    for task in record.tasks:
        latest: dict[str, Any] = next(
            (line["tasks"][task] for line in reversed(record.rounds) if task in line.get("tasks", {})), {}
        )
        scored = next((line for line in reversed(record.rounds) if _psnr(line, task, "restored") is not None), None)
        before, after = (_psnr(scored, task, arm) if scored else None for arm in ("input", "restored"))
        table.add_row(
            task,
            _number(latest.get("loss"), ".4g"),
            _number(latest.get("task_weight"), ".3f"),
            _number(latest.get("aggregation_weight"), ".3f"),
            f"round {scored['round']}" if scored else "–",
            _number(before, ".2f"),
            _number(after, ".2f"),
            _number(None if before is None or after is None else after - before, "+.2f"),
        )
    return table


def _site_table(record: RunRecord) -> Table:
    table = _table("Hospital", "Tasks", "Last round", "Answered", "Seconds", "MB", "Gain dB")
    scored: dict[str, float] = next((line["site_gain_db"] for line in reversed(record.rounds) if line.get("site_gain_db")), {})
    for site in record.sites:
        lines = [line["sites"][site] for line in record.rounds if site in line.get("sites", {})]
        if not lines:
            continue
        answered = sum(line.get("status") == "ok" for line in lines)
        last = str(lines[-1].get("status"))
        table.add_row(
            site,
            "+".join(lines[-1].get("tasks") or []),
            Text(last, style="" if last == "ok" else "red"),
            f"{answered}/{len(lines)}",
            _number(lines[-1].get("seconds"), ".1f"),
            _number(lines[-1].get("bytes", 0) / 1e6, ".1f"),
            _number(scored.get(site), "+.2f"),
        )
    return table


def _harm_table(sites: dict[str, dict[str, float]]) -> Table:
    titles = {"together": "Together dB", "fine_tuned": "Fine-tuned dB", "alone": "Alone dB"}
    shown = [name for name in titles if any(f"{name}_gain_db" in gains for gains in sites.values())]
    table = _table("Hospital", *(titles[name] for name in shown))
    for site, gains in sorted(sites.items()):
        style = "red" if is_better_alone(gains) else ""
        table.add_row(Text(site, style=style), *(_number(gains.get(f"{name}_gain_db"), "+.2f") for name in shown))
    return table


def _round_table(record: RunRecord) -> Table:
    table = _table(
        "Round", "Seconds", *(f"{task} dB" for task in record.tasks), "Mean gain", "Worst", "Update", "Hospitals", "Left out"
    )
    for line in record.rounds:
        sites = line.get("sites", {})
        left_out = [f"{site}: {facts.get('status')}" for site, facts in sorted(sites.items()) if facts.get("status") != "ok"]
        table.add_row(
            f"{line['round']}{'*' if line['round'] == _best_round(record) else ''}",
            _number(line.get("seconds"), ".1f"),
            *(_number(_psnr(line, task, "restored"), ".2f") for task in record.tasks),
            _number(line.get("mean_gain_db"), "+.2f"),
            _number(min((line.get("site_gain_db") or {}).values(), default=None), "+.2f"),
            _number(line.get("update_norm"), "#.3g"),
            f"{len(sites) - len(left_out)}/{len(sites)}",
            Text(", ".join(left_out) or "–", style="red" if left_out else ""),
        )
    table.caption = "* the round whose model is released; Worst: the smallest gain of a hospital"
    return table


def _psnr(line: dict[str, Any], task: str, arm: str) -> float | None:
    validation = (line.get("tasks", {}).get(task) or {}).get("validation") or {}
    return (validation.get(arm) or {}).get("psnr")


def _best_round(record: RunRecord) -> int | None:
    return record.rounds[-1].get("best_round") if record.rounds else None


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _ago(age: timedelta) -> str:
    return f"{_duration(age)} ago"


def _duration(span: timedelta) -> str:
    seconds = max(0, round(span.total_seconds()))
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in others:
        text = name in ("State", "Tasks", "Last round", "Left out", "Last written", "Scored in")
        table.add_column(name, justify="left" if text else "right")
    return table


def _print(*parts: Any) -> None:
    Console().print(*parts, sep="\n")
