from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from matplotlib import colormaps
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from simulations.report import results_table, write_report
from simulations.report_command import command
from simulations.report_panels import display_window, read_panel
from simulations.results import number
from tat_core.record import read_record
from tat_core.tasks import CT, MRI, PET, TASKS

SITES = {"ct-abdomen": "CT", "mri-t1": "MRI", "pet-trunk": "PET"}


def scores(psnr: float) -> dict[str, float]:
    return {"psnr": psnr, "ssim": psnr / 40, "rmse": 400 / psnr, "count": 6}


def round_line(number: int, num_rounds: int = 4) -> dict[str, Any]:
    validation = {"input": scores(27.0), "restored": scores(27.0 + number)}
    return {
        "round": number,
        "num_rounds": num_rounds,
        "seconds": 8.0 + number,
        "started_at": f"2026-11-23T19:0{number}:00+00:00",
        "model_sha256": "ab" * 32,
        "update_norm": 2.0 / number,
        "cosines": {"CT-MRI": 0.3, "CT-PET": -0.1, "MRI-PET": 0.0},
        "best_round": number,
        "sites": {
            site: {"tasks": [task], "seconds": 3.0, "bytes": 2_000_000, "status": "ok"}
            if (site, number) != ("mri-t1", 2)
            else {"tasks": [task], "status": "NO_REPLY"}
            for site, task in SITES.items()
        },
        "tasks": {
            task: {
                "loss": 0.02 / number,
                "input_loss": 0.03,
                "task_weight": 1.9,
                "aggregation_weight": 1 / 3,
                **({"validation": validation} if number % 2 == 0 else {}),
            }
            for task in TASKS
        },
    }


def summary() -> dict[str, Any]:
    arms = {"input": scores(27.0), "alone": scores(29.0), "together": scores(30.5)}
    return {
        "name": "demo <script>alert(1)</script>",
        "preset": "demo",
        "seed": 42,
        "created_at": "2026-11-23T19:12:04+00:00",
        "versions": {"fed-tat": "0.1.0", "torch": "2.13.0"},
        "config": {"num_rounds": 4},
        "model": {"file": "model.safetensors", "sha256": "9f" * 32, "parameters": 1234567},
        "tasks": {
            task.name: {
                "unit": task.unit,
                "evaluation_window": list(task.evaluation_window),
                "data_range": "per slice: target max − min after clipping",
                "arms": arms,
                "gain_db": 3.5,
                "required_gain_db": 1.0,
                "passed": task is not PET,
            }
            for task in TASKS.values()
        },
        "hospitals": {
            site: {"task": task, "scanner": 'A & B "mCT"', "synthetic": task == "PET", "arms": arms}
            for site, task in SITES.items()
        },
        "seconds": {"alone": 92.1, "together": 101.4, "evaluation": 22.0},
        "passed": False,
    }


def write_run(folder: Path, rounds: int = 4, finished: bool = True) -> Path:
    (folder / "panels").mkdir(parents=True)
    (folder / "config.yaml").write_text("preset: demo\nseed: 42\nnum_rounds: 4\n")
    (folder / "rounds.jsonl").write_text("".join(json.dumps(round_line(n + 1)) + "\n" for n in range(rounds)))
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary()))
        rng = np.random.default_rng(0)
        for site, task in SITES.items():
            low, high = TASKS[task].evaluation_window
            hq = np.linspace(low, high, 40 * 32, dtype=np.float32).reshape(40, 32)
            noise = rng.normal(0, 0.05 * (high - low), hq.shape).astype(np.float32)
            np.savez(folder / "panels" / f"{site}.npz", lq=hq + noise, alone=hq + noise / 2, together=hq + noise / 3, hq=hq)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; for tests that only read it."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo")
    write_report(folder)
    return folder


class Page(HTMLParser):
    """Tags with attributes, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def page(folder: Path) -> Page:
    return read_page(write_report(folder).parent)


def read_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_what_hospitals_made_of_the_model_is_an_arm_of_its_own(run_dir: Path) -> None:
    facts = summary()
    for entry in (*facts["tasks"].values(), *facts["hospitals"].values()):
        entry["arms"] = entry["arms"] | {"fine_tuned": scores(31.25)}
    (run_dir / "summary.json").write_text(json.dumps(facts))
    for path in (run_dir / "panels").iterdir():
        with np.load(path) as arrays:
            np.savez(path, **arrays, fine_tuned=arrays["hq"])
    text = page(run_dir).text
    for expected in ("Fine-tuned", "31.25", "+3.50", "+2.25", "Together, fine-tuned", "what each hospital made of it"):
        assert expected in text
    (run_dir / "summary.json").write_text(json.dumps(summary()))
    assert "what each hospital made of it" not in page(run_dir).text


def pixels(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


def test_the_page_needs_nothing_from_outside(finished: Path) -> None:
    shown = read_page(finished)
    assert "script" not in {tag for tag, _ in shown.tags}
    assert "link" not in {tag for tag, _ in shown.tags}
    images = [attributes["src"] for tag, attributes in shown.tags if tag == "img"]
    assert len(images) == 3 + 3 * (4 + 3 + 1)
    assert all(str(source).startswith("data:image/") for source in images)
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import", html)
    assert list(finished.glob(".*")) == []


def test_the_page_shows_the_numbers_of_the_summary(finished: Path) -> None:
    text = read_page(finished).text
    for expected in (
        *("27.00", "29.00", "30.50", "+3.50", "+1.50", "1 234 567", "9f" * 32, "torch 2.13.0", "4 of 4"),
        *("[−160, 240] HU, data range per slice: target max − min after clipping", "[0, 20] SUV", "RMSE in HU"),
        *("synthetic", "window −160 to 240 HU", "inverted", "≥ 100 HU", "PET +3.50 dB ✗", "CT +3.50 dB ✓", "FAILED"),
        *("Research use only; not for diagnosis.", "3 of 4", "NO_REPLY"),
    ):
        assert expected in text, expected


def test_strings_are_escaped(finished: Path) -> None:
    shown = read_page(finished)
    assert "demo <script>alert(1)</script>" in shown.text
    assert 'A & B "mCT"' in shown.text


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_run_that_is_going_on_or_died_has_a_report(tmp_path: Path, rounds: int) -> None:
    folder = write_run(tmp_path / "live", rounds, finished=False)
    with open(folder / "rounds.jsonl", "a") as file:
        file.write('{"round": 9, "num_r')
    text = page(folder).text
    assert f"not finished: {rounds} of 4 rounds" in text
    assert "rounds.jsonl: 1 line(s) could not be read" in text
    assert ("Validation so far" in text) == (rounds >= 2)


def test_what_is_damaged_is_named_and_left_out(run_dir: Path) -> None:
    (run_dir / "panels" / "mri-t1.npz").write_bytes(b"PK\x03\x04 torn")
    np.savez(run_dir / "panels" / "ct-abdomen.npz", lq=np.zeros((4, 4)), hq=np.zeros((4, 5)))
    np.savez(run_dir / "panels" / "stranger.npz", lq=np.zeros((4, 4)), hq=np.zeros((4, 4)))
    (run_dir / "config.yaml").write_text("a: [")
    text = page(run_dir).text
    for expected in ("panels/mri-t1.npz", "panels/ct-abdomen.npz", "panels/stranger.npz", "config.yaml: could not be read"):
        assert expected in text
    (run_dir / "summary.json").write_text('{"name": ')
    assert "summary.json: could not be read" in page(run_dir).text


def test_numbers_that_are_missing_or_not_finite_are_dashes(run_dir: Path) -> None:
    broken = summary()
    broken["tasks"]["CT"]["arms"]["together"]["psnr"] = float("nan")
    del broken["tasks"]["MRI"]["arms"]["alone"]
    broken["tasks"]["PET"]["required_gain_db"] = None
    (run_dir / "summary.json").write_text(json.dumps(broken))
    line = round_line(5)
    line["tasks"]["CT"] |= {"loss": float("nan"), "task_weight": None}
    line["update_norm"] = float("inf")
    with open(run_dir / "rounds.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    assert "nan" not in page(run_dir).text.lower().split()
    assert (number(float("nan"), 2), number(None, 2), number(-0.5, 2, sign=True)) == ("–", "–", "−0.50")
    assert [number(value, None) for value in (12.0, 0.18, 123.4, 99.97, 8.776)] == ["12.0", "0.180", "123", "100", "8.78"]


def test_without_a_requirement_nothing_is_called_passed(run_dir: Path) -> None:
    undemanding = summary()
    for entry in undemanding["tasks"].values():
        entry |= {"required_gain_db": None, "passed": True}
    (run_dir / "summary.json").write_text(json.dumps(undemanding | {"passed": True}))
    text = page(run_dir).text
    assert "passed" not in text.lower()
    assert "CT +3.50 dB" in text
    assert "✓" not in text


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with rounds\.jsonl"):
        write_report(tmp_path)


def test_a_repeated_round_counts_once(run_dir: Path) -> None:
    with open(run_dir / "rounds.jsonl", "a") as file:
        file.write(json.dumps(round_line(4) | {"seconds": 99.0}) + "\n")
    record = read_record(run_dir)
    assert [line["round"] for line in record.rounds] == [1, 2, 3, 4]
    assert record.rounds[-1]["seconds"] == 99.0


def test_pictures_keep_orientation_grey_levels_and_every_pixel(tmp_path: Path) -> None:
    hq = np.full((20, 10), -1000.0, np.float32)
    hq[0, 0], hq[0, 9], hq[19, 0] = 240.0, 40.0, -160.0
    path = tmp_path / "ct.npz"
    np.savez(path, lq=hq + 50, hq=hq)
    panel = read_panel(path, CT)
    target = pixels(panel.images[-1].uri)
    repeat = target.width // 10
    assert (target.width, target.height) == (10 * repeat, 20 * repeat)
    assert target.height >= 500
    grey = np.asarray(target)[::repeat, ::repeat]
    assert np.array_equal(np.kron(grey, np.ones((repeat, repeat), np.uint8)), np.asarray(target))
    assert (grey[0, 0], grey[0, 9], grey[19, 0], grey[10, 5]) == (255, 128, 0, 0)
    assert [picture.title for picture in panel.images] == ["Input", "Target"]


def test_pet_is_inverted_and_errors_are_coloured_on_a_fixed_scale(tmp_path: Path) -> None:
    hq = np.zeros((512, 512), np.float32)
    hq[:256] = 8.0
    lq = hq.copy()
    lq[0, 0] += 1.0
    lq[0, 1] += 2.0
    path = tmp_path / "pet.npz"
    np.savez(path, lq=lq, hq=hq)
    panel = read_panel(path, PET)
    assert panel.inverted
    assert panel.window == "0 to 8 SUV"
    assert panel.error_top == "2 SUV"
    grey = np.asarray(pixels(panel.images[-1].uri))
    assert (grey[0, 0], grey[-1, -1]) == (0, 255)
    error = np.asarray(pixels(panel.errors[0].uri).convert("RGB"))
    colours = colormaps["inferno"](np.array([0, 128, 255]), bytes=True)[:, :3]
    assert [tuple(error[where]) for where in ((5, 5), (0, 0), (0, 1))] == [tuple(colour) for colour in colours]


def test_display_windows() -> None:
    ramp = np.linspace(0, 1000, 10001)
    assert display_window(ramp, CT) == (-160.0, 240.0)
    assert display_window(ramp, MRI) == (0.0, pytest.approx(995.0))
    assert display_window(ramp / 100, PET) == (0.0, 10.0)
    assert display_window(np.zeros(4), PET) == PET.evaluation_window


def test_the_terminal_tables_fit_into_80_columns() -> None:
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(results_table(summary()))
    text = buffer.getvalue()
    assert "…" not in text
    for expected in ("ct-abdomen", "+3.50 ✓", "+3.50 ✗", "+1.50", "together", "[−160, 240] HU", "a.u."):
        assert expected in text


def test_the_best_of_each_metric_is_marked(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    best = re.findall(r'<td class="best[^"]*">([^<]+)</td>', html)
    assert best == ["30.50", "0.7625", "13.1"] * 6


def test_tat_report(run_dir: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(run_dir)])
    assert result.exit_code == 0, result.output
    first = (run_dir / "report.html").read_bytes()
    assert write_report(run_dir).read_bytes() == first  # the same record gives the same page
