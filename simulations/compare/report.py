"""What the comparison found: claims and whether they hold, tables and plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.table import Table

from simulations.compare.arms import ARMS, is_variation
from simulations.compare.stats import Interval, Values, difference, gap_closed, paired_interval
from simulations.report_figures import TASK_COLOURS
from tat_core.metrics import DATA_RANGE
from tat_core.tasks import TASKS

Results = Sequence[Mapping[str, Any]]
MEASURES = {"psnr": "PSNR, dB", "ssim": "SSIM", "rmse": "RMSE, in the task's unit"}


@dataclass(frozen=True)
class Verdict:
    """The claims: a figure each, what it must be, and whether all are."""

    figures: dict[str, float]
    targets: dict[str, str]
    holds: bool


def values_of(results: Results, arm: str, measure: str = "psnr", split: str = "test", of: str = "restored") -> Values:
    """Seed → site → value per slice, each site scored by the model that it would have: its own, or everyone's."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for result in results:
        if result["arm"] == arm:
            scores = result["scores"]
            sites = next(iter(scores.values()))
            by_site = {site: scores[site if site in scores else "all"][site][split] for site in sites}
            found[result["seed"]] = {s: np.array(v[f"{of}.{measure}"]) for s, v in by_site.items() if v[f"{of}.{measure}"]}
    return found


def tasks_of(results: Results) -> dict[str, str]:
    """Site → task."""
    return {site: facts["task"] for site, facts in next(iter(results[0]["scores"].values())).items()}


def compare(results: Results, a: str, b: str, sites: Callable[[str], bool] = lambda _: True) -> Interval:
    """PSNR of arm `a` minus that of arm `b`, in dB, over the chosen sites."""
    task_of = {site: task for site, task in tasks_of(results).items() if sites(site)}
    return paired_interval(difference(values_of(results, a), values_of(results, b)), task_of, np.random.default_rng(0))


def judge(results: Results) -> Verdict:
    """Check the claims that the arms at hand allow."""
    task_of = tasks_of(results)
    there = {result["arm"] for result in results}
    tasks, sites = sorted(set(task_of.values())), sorted(task_of)
    figures: dict[str, float] = {}
    targets: dict[str, str] = {}
    holds = True

    def claim(name: str, value: float, target: str, is_so: bool) -> None:
        nonlocal holds
        figures[name], targets[name] = round(value, 3), target
        holds = holds and is_so

    def of_task(task: str) -> Callable[[str], bool]:
        return lambda site: task_of[site] == task

    if {"ours", "fedavg"} <= there:
        found = compare(results, "ours", "fedavg")
        claim("ours - FedAvg, mean over tasks, lower end", found.low, "> 0", found.low > 0)
        for task in tasks:
            found = compare(results, "ours", "fedavg", of_task(task))
            claim(f"ours - FedAvg, {task}, upper end", found.high, ">= 0", found.high >= 0)
    if {"ours", "alone"} <= there:
        found = compare(results, "ours", "alone")
        claim("ours - alone, mean over hospitals, lower end", found.low, "> 0", found.low > 0)
        for site in sites:
            found = compare(results, "ours", "alone", lambda other, site=site: other == site)  # type: ignore[misc]
            claim(f"ours - alone, {site}, upper end", found.high, ">= 0", found.high >= 0)
    if {"ours", "within"} <= there:
        found = compare(results, "ours", "within")
        claim("ours - within task only, mean over tasks", found.mean, "> 0", found.mean > 0)
    if {"ours", "pooled"} <= there:
        for task in tasks:
            found = compare(results, "ours", "pooled", of_task(task))
            claim(f"ours - pooled, {task}", found.mean, ">= -0.1", found.mean >= -0.1)
    return Verdict(figures, targets, holds)


def gain(results: Results, arm: str, sites: Iterable[str], split: str = "test") -> float:
    """Mean gain in PSNR over the input, in dB, over seeds, sites and slices; NaN if none of them has slices in the split."""
    restored, given = values_of(results, arm, split=split), values_of(results, arm, split=split, of="input")
    gains = [(restored[seed][site] - given[seed][site]).mean() for seed in restored for site in sites if site in restored[seed]]
    return float(np.mean(gains)) if gains else float("nan")


def choose_table(results: Results) -> Table:
    """Validation gains by arm and site, for choosing settings without a look at the test slices."""
    sites = sorted(tasks_of(results))
    table = Table("arm", *sites, "mean", title="gain over the input on validation slices, dB")
    for arm in _order(results):
        gains = [gain(results, arm, [site], "validation") for site in sites]
        table.add_row(ARMS[arm].title, *(f"{value:+.2f}" for value in gains), f"{np.nanmean(gains):+.2f}")
    return table


def write_report(folder: Path, results: Results, verdict: Verdict, facts: Mapping[str, Any]) -> None:
    """Write compare.json (every value per slice), compare.md and compare-*.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {"facts": dict(facts), "figures": verdict.figures, "targets": verdict.targets, "holds": verdict.holds}
    (folder / "compare.json").write_text(json.dumps({**raw, "results": _rounded(list(results))}) + "\n")
    seeds = sorted({result["seed"] for result in results})
    plot_gains(results, folder / "compare-gains.svg")
    plot_curves(results, folder / "compare-curves.svg")
    windows = ", ".join(f"{t.name} {t.evaluation_window[0]:g} … {t.evaluation_window[1]:g} {t.unit}" for t in TASKS.values())
    sections = [
        "# Is training together better than alone?",
        f"`python -m simulations.compare --steps {facts['steps']}`: so many optimiser steps a hospital, {facts['local_steps']} a "
        f"round, seeds {', '.join(map(str, seeds))}; equal steps and equal samples in every arm. Differences are paired by slice "
        "and seed, in brackets the 95 % bootstrap interval over slices and seeds. The script writes this page; what it means is "
        "in [compare-notes.md](compare-notes.md).",
        f"PSNR in {windows}; data range {DATA_RANGE}.",
        "![gain by hospital](compare-gains.svg)\n\n![loss over the steps](compare-curves.svg)",
        "## Claims\n\n" + _claims(verdict),
        "## Gain over the input by hospital, dB\n\n" + _by_site(results),
        "## Ours minus each other arm, dB\n\n" + _differences(results),
        "## Scores by task\n\n" + _by_task(results),
        "## Trained at × tested on: gain over the input, dB\n\n" + _cross(results),
    ]
    (folder / "compare.md").write_text("\n\n".join(sections) + "\n")


def _order(results: Results) -> list[str]:
    there = {result["arm"] for result in results}
    return [arm for arm in ARMS if arm in there]


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _claims(verdict: Verdict) -> str:
    rows = [
        (name, f"{value:+.3f}", verdict.targets[name], _is_met(value, verdict.targets[name]))
        for name, value in verdict.figures.items()
    ]
    return _markdown(("claim, dB", "value", "must be", ""), rows)


def _is_met(value: float, target: str) -> str:
    sign, bound = target.split()
    return "holds" if (value > float(bound) if sign == ">" else value >= float(bound)) else "**does not hold**"


def _by_site(results: Results) -> str:
    sites = sorted(tasks_of(results))
    rows = []
    for arm in _order(results):
        gains = [gain(results, arm, [site]) for site in sites]
        seeds = str(len(values_of(results, arm)))
        rows.append([ARMS[arm].title, seeds, *(f"{value:+.2f}" for value in gains), f"{np.mean(gains):+.2f}"])
    return _markdown(("arm", "seeds", *sites, "mean"), rows)


def _differences(results: Results) -> str:
    task_of = tasks_of(results)
    tasks, sites = sorted(set(task_of.values())), sorted(task_of)
    rows = []
    for arm in (arm for arm in _order(results) if arm != "ours" and "ours" in _order(results)):
        by_task = [compare(results, "ours", arm, lambda s, t=task: task_of[s] == t) for task in tasks]  # type: ignore[misc]
        rows.append([ARMS[arm].title, str(compare(results, "ours", arm)), *map(str, by_task)])
    text = _markdown(("ours minus", "mean over tasks", *tasks), rows)
    if not {"ours", "alone"} <= set(_order(results)):
        return text
    alone = [(site, str(compare(results, "ours", "alone", lambda s, o=site: s == o))) for site in sites]  # type: ignore[misc]
    text += "\n\nOurs minus alone at each hospital:\n\n" + _markdown(("hospital", "dB"), alone)
    if "pooled" in _order(results):
        rows = []
        for task in tasks:
            here = [site for site in sites if task_of[site] == task]
            closed = gap_closed(*(gain(results, arm, here) for arm in ("ours", "alone", "pooled")))
            rows.append([task, "P − L below 0.1 dB: not defined" if closed is None else f"{closed:.2f}"])
        text += "\n\nGap closed, (F − L)/(P − L):\n\n" + _markdown(("task", ""), rows)
    return text


def _by_task(results: Results) -> str:
    task_of = tasks_of(results)
    rows = []
    for task in sorted(set(task_of.values())):
        here = [site for site in task_of if task_of[site] == task]
        for arm, of in [(_order(results)[0], "input"), *((arm, "restored") for arm in _order(results))]:
            means = []
            for measure in MEASURES:
                values = values_of(results, arm, measure, of=of)
                means.append(float(np.mean([values[seed][site].mean() for seed in values for site in here])))
            title = "the input" if of == "input" else ARMS[arm].title
            rows.append([task, title, f"{means[0]:.2f}", f"{means[1]:.4f}", f"{means[2]:.4g}"])
    return _markdown(("task", "arm", *MEASURES.values()), rows)


def _cross(results: Results) -> str:
    sites = sorted(tasks_of(results))
    rows = []
    for arm, origins in (("alone", sites), ("ours", ["all"])):
        for origin in origins if arm in _order(results) else ():
            gains = []
            for site in sites:
                slices = [r["scores"][origin][site]["test"] for r in results if r["arm"] == arm]
                gains.append(np.mean([np.mean(s["restored.psnr"]) - np.mean(s["input.psnr"]) for s in slices]))
            rows.append([origin if arm == "alone" else ARMS[arm].title, *(f"{value:+.2f}" for value in gains)])
    return _markdown(("trained at", *sites), rows)


def plot_gains(results: Results, path: Path) -> None:
    """Gain over the input of the main arms at each hospital."""
    arms = [arm for arm in _order(results) if not is_variation(arm)]
    sites = sorted(tasks_of(results))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        axes.bar(np.arange(len(sites)) + number * width, [gain(results, arm, [s]) for s in sites], width, label=ARMS[arm].title)
    axes.set_xticks(np.arange(len(sites)) + 0.4 - width / 2, sites)
    axes.set(ylabel="gain over the input, dB", title="Test images of each hospital")
    axes.axhline(0, color="black", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path)
    plt.close(figure)


def plot_curves(results: Results, path: Path) -> None:
    """Training loss, as a share of the input's error, over the steps: have the arms stopped improving quickly?"""
    arms = [arm for arm in ("pooled", "ours", "fedavg") if arm in _order(results)]
    figure, axes = plt.subplots(1, max(1, len(arms)), figsize=(9, 3), layout="constrained", sharey=True, squeeze=False)
    for ax, arm in zip(axes[0], arms, strict=False):
        curves = [result["curve"] for result in results if result["arm"] == arm]
        for task in curves[0][0]:
            points = np.mean([[point[task] for point in curve] for curve in curves], 0)
            ax.plot(np.linspace(0, 1, len(points) + 1)[1:], points, color=TASK_COLOURS[task], label=task)
        ax.set(title=ARMS[arm].title, xlabel="share of the steps", ylim=(0, 1.05))
    axes[0][0].set_ylabel("loss / error of the input")
    axes[0][0].legend()
    figure.savefig(path)
    plt.close(figure)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
