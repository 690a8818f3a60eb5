"""Curves for the report, as SVG data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito: told apart by colour-blind readers too; the markers tell them apart in a grey print.
TASK_COLOURS = {"CT": "#0072B2", "MRI": "#D55E00", "PET": "#009E73"}
_OTHER_COLOURS = ("#CC79A7", "#56B4E9", "#E69F00", "#555555")
_MARKERS = {"CT": "o", "MRI": "s", "PET": "^"}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#8a939e",
    "axes.labelcolor": "#3b444f",
    "xtick.color": "#3b444f",
    "ytick.color": "#3b444f",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "svg.hashsalt": "fed-tat",
}

Round = dict[str, Any]
Getter = Callable[[Round], Any]


def validation_figure(rounds: Sequence[Round], tasks: Sequence[str]) -> str | None:
    """Validation PSNR of each task over the rounds, the input's level dashed; None if nothing was validated."""
    best = next((line.get("best_round") for line in reversed(rounds)), None)
    scored = [task for task in tasks if _points(rounds, _validation(task, "restored"))]
    if not scored:
        return None

    def draw(axes: Sequence[Axes]) -> None:
        for ax, task in zip(axes, scored, strict=True):
            _line(ax, rounds, _validation(task, "restored"), task, "restored")
            level = _points(rounds, _validation(task, "input"))
            if level:
                ax.axhline(level[-1][1], color="#555f6b", linestyle="--", linewidth=1.2, label="input")
            if best:
                ax.axvline(best, color="#8a939e", linestyle=":", linewidth=1.2, label="round released")
            ax.set_title(task)
            ax.set_ylabel("PSNR [dB]")
            ax.legend(loc="best", fontsize=8)

    return _figure(len(scored), draw)


def training_figure(rounds: Sequence[Round], tasks: Sequence[str]) -> str | None:
    """Loss, task weight and aggregation weight per task; None if no round recorded any."""
    parts = [
        ("loss", "Training loss", "mean absolute error, of [0, 1]"),
        ("task_weight", "Task weight", "from the balancer"),
        ("aggregation_weight", "Aggregation weight", "share of the combined update"),
    ]
    parts = [part for part in parts if any(_points(rounds, _task(task, part[0])) for task in tasks)]
    if not parts:
        return None

    def draw(axes: Sequence[Axes]) -> None:
        for ax, (key, title, label) in zip(axes, parts, strict=True):
            for task in tasks:
                _line(ax, rounds, _task(task, key), task, task)
                if key == "loss":
                    _line(ax, rounds, _task(task, "input_loss"), task, None, dashed=True)
            if key == "loss":
                ax.set_yscale("log")
                ax.plot([], [], color="#555f6b", linestyle="--", linewidth=1.1, label="input")
            else:
                _from_zero(ax)
            ax.set_title(title)
            ax.set_ylabel(label)
            ax.legend(loc="best", fontsize=8)

    return _figure(len(parts), draw)


def update_figure(rounds: Sequence[Round]) -> str | None:
    """Norm of the combined update, cosines between the tasks' updates and seconds per round; None if nothing was recorded."""
    pairs = sorted({pair for line in rounds for pair in line.get("cosines") or {}})
    parts: list[tuple[str, str, list[tuple[str, Getter]]]] = [
        ("Length of the update", "L2 norm", [("combined update", lambda line: line.get("update_norm"))]),
        ("Agreement of the tasks", "cosine of their updates", [(pair.replace("-", " · "), _cosine(pair)) for pair in pairs]),
        ("Time of a round", "seconds", [("round", lambda line: line.get("seconds"))]),
    ]
    parts = [part for part in parts if any(_points(rounds, get) for _, get in part[2])]
    if not parts:
        return None

    def draw(axes: Sequence[Axes]) -> None:
        for ax, (title, label, lines) in zip(axes, parts, strict=True):
            for index, (name, get) in enumerate(lines):
                colour = _OTHER_COLOURS[index % len(_OTHER_COLOURS)] if len(lines) > 1 else "#3b444f"
                points = _points(rounds, get)
                ax.plot(*zip(*points, strict=True), color=colour, marker="osD^"[index % 4], label=name)
            if len(lines) > 1:
                ax.axhline(0, color="#8a939e", linewidth=1)
                ax.legend(loc="best", fontsize=8)
            elif "cosine" not in label:
                _from_zero(ax)
            ax.set_title(title)
            ax.set_ylabel(label)

    return _figure(len(parts), draw)


def _validation(task: str, arm: str) -> Getter:
    return lambda line: (((line.get("tasks") or {}).get(task) or {}).get("validation") or {}).get(arm, {}).get("psnr")


def _task(task: str, key: str) -> Getter:
    return lambda line: ((line.get("tasks") or {}).get(task) or {}).get(key)


def _cosine(pair: str) -> Getter:
    return lambda line: (line.get("cosines") or {}).get(pair)


def _points(rounds: Iterable[Round], get: Getter) -> list[tuple[int, float]]:
    values = ((int(line["round"]), get(line)) for line in rounds)
    return [(number, float(value)) for number, value in values if isinstance(value, int | float) and math.isfinite(value)]


def _line(ax: Axes, rounds: Sequence[Round], get: Getter, task: str, label: str | None, dashed: bool = False) -> None:
    points = _points(rounds, get)
    if not points:
        return
    colour = TASK_COLOURS.get(task, _OTHER_COLOURS[0])
    if dashed:
        ax.plot(*zip(*points, strict=True), color=colour, linestyle="--", linewidth=1.1)
    else:
        ax.plot(*zip(*points, strict=True), color=colour, marker=_MARKERS.get(task, "D"), label=label)


def _from_zero(ax: Axes) -> None:
    ax.set_ylim(0, 1.08 * ax.dataLim.y1 if ax.dataLim.y1 > 0 else 1)


def _figure(columns: int, draw: Callable[[Sequence[Axes]], None]) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        # Always room for three, so that one lone plot is not stretched over the page.
        axes = list(figure.subplots(1, 3, squeeze=False)[0])
        for ax in axes[columns:]:
            ax.remove()
        draw(axes[:columns])
        for ax in axes[:columns]:
            ax.set_xlabel("round")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        figure.clear()
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
