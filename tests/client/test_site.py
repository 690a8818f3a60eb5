"""site.yaml: what a hospital may write, and how it is told what is wrong."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

import deploy
from client.coordinator import Coordinator
from client.site import PrivacyLimits, Site, load_site

GOOD = "name: north\nscanner: A, 120 kV\ndevice: cpu\ndata: {CT: CT}\nstate_dir: state\nsynthetic: false\n"


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    site = load_site(_write(tmp_path, GOOD))
    assert (site.name, site.device, site.synthetic) == ("north", "cpu", False)
    assert site.data == {"CT": tmp_path / "CT"}
    assert site.state_dir == tmp_path / "state"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("name: north", "name: ../etc"), "line 1, name: expected 1 to 64 letters"),
        (GOOD.replace("name: north\n", ""), "name: expected it to be given"),
        (GOOD.replace("{CT: CT}", "{XR: CT}"), "line 4, data.XR: expected a known key, got another; did you mean data.MRI"),
        (GOOD.replace("{CT: CT}", "{}"), "data: expected"),
        (GOOD.replace("{CT: CT}", "{CT: 3}"), "line 4, data.CT: expected a folder, got 3"),
        (GOOD + "colour: red\n", "line 7, colour: expected a known key"),
        (GOOD.replace("false", "'no'"), "synthetic: expected true or false"),
        (GOOD.replace("cpu", "3"), "line 3, device: expected cpu, cuda or cuda:N, got 3"),
        ("name: [", "syntax error"),
        ("- a\n- b\n", "expected a mapping"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_site(_write(tmp_path, text))


def test_the_example_can_be_read_and_shows_every_key() -> None:
    path = Path(deploy.__file__).parent / "site.example.yaml"
    site = load_site(path)
    assert (site.minimum_patients, site.privacy) == (11, PrivacyLimits(True, 8.0, 1e-5))
    assert site.coordinator == Coordinator(
        "coordinator.example.org:443", path.with_name("ca.pem"), path.parent / "state" / "node.key"
    )
    text = path.read_text()
    for kind in (Site, PrivacyLimits, Coordinator):
        assert [entry.name for entry in fields(kind) if f"{entry.name}:" not in text] == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_site(tmp_path / "site.yaml")
