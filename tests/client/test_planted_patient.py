"""A patient is planted in images, headers, file names and errors; then every byte that leaves the hospital is searched for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import message_to_proto, recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

from client import app, audit, work
from client.consent import CODES
from client.site import load_site
from client.state import pause_file
from tat_core.blobs import by_owner, pack
from tat_core.checkpoint import arrays_of, model_hash
from tat_core.code import code_hash
from tat_core.config import RunConfig, load_config
from tat_core.model.tat import build_model
from tat_core.sharing import for_tasks, give_own

NAME, UID, FOLDER = "PLANTED^PATIENT", "1.2.826.0.1.3680043.8.498.77777", "planted-path"
SECRETS = [text.encode(code) for text in (NAME, UID, FOLDER, "PLANTED", "planted") for code in ("utf-8", "utf-16-le")]
RUN = "0" * 32


@pytest.fixture
def folder(smoke_hospitals: list[Path], tmp_path: Path) -> Path:
    """A CT hospital, all of whose headers, file names, pseudonyms and paths name the patient."""
    site = tmp_path / FOLDER / "site"
    shutil.copytree(smoke_hospitals[0], site, ignore=shutil.ignore_patterns("prepared", "state"))
    for case in list((site / "CT").glob("[LH]Q/*")):
        for path in case.iterdir():
            image = pydicom.dcmread(path)
            image.PatientName, image.PatientID, image.StudyInstanceUID = NAME, NAME, UID
            image.save_as(path)
        case.rename(case.with_name(f"{NAME}-{case.name}"))
    splits = json.loads((site / "CT" / "splits.json").read_text())
    cases = {f"{NAME}-{name}": entry | {"patient": NAME} for name, entry in splits["cases"].items()}
    (site / "CT" / "splits.json").write_text(json.dumps({"format": 1, "cases": cases}))
    _change(site, scanner=NAME)
    return site


def _change(folder: Path, **values: object) -> None:
    content = yaml.safe_load((folder / "site.yaml").read_text()) | values
    (folder / "site.yaml").write_text(yaml.safe_dump(content))


def _ask(folder: Path, kind: Callable[..., Message], overrides: str = "", **changes: object) -> tuple[str, bytes]:
    """Send what a coordinator would, and return the code of the reply (empty if it is none) and all of its bytes."""
    config = load_config("smoke", overrides)
    model = for_tasks(give_own(arrays_of(build_model(config.model, 1)), config.tasks, ("adapter",)), ("CT",))
    words = {
        "run": RUN,
        "round": 1,
        "nonce": "n",
        "base": model_hash(model),
        "steps": config.train.local_steps,
        "code": code_hash(),
    }
    blobs = {
        owner: Array("uint8", (len(blob),), "packed", blob)
        for owner, blob in ((o, pack(some)) for o, some in by_owner(model).items())
    }
    content = RecordDict({"model": ArrayRecord(blobs), "config": ConfigRecord(words | changes)})  # type: ignore[arg-type]
    message = Message(content, dst_node_id=1, message_type="train")
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"site": str(folder / "site.yaml")},
        state=RecordDict(),
        run_config={"preset": "smoke", "overrides": overrides},
    )
    reply = kind(message, context)
    values = b"".join(array.data for record in reply.content.array_records.values() for array in record.values())
    sent = message_to_proto(reply).SerializeToString() + recorddict_to_proto(reply.content).SerializeToString() + values
    return str(reply.content.config_records["config"].get("error", "")), sent


def _failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(work, "train", fail)


def test_nothing_of_a_patient_is_in_any_byte_that_leaves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, key, 1)
    seen: dict[str, bytes] = {}

    def ask(expected: str, kind: Callable[..., Message] = app.train, overrides: str = "", **changes: object) -> None:
        got, sent = _ask(folder, kind, overrides, **changes)
        assert got == expected, (folder / "state" / "site.log").read_text()[-2000:]
        seen[expected] = sent
        assert [secret for secret in SECRETS if secret in sent] == [], expected

    for kind in (app.query, app.train, app.evaluate, app.baseline):
        ask("", kind)
    private = "privacy.enabled=true privacy.noise_multiplier=1.0"
    ask("", app.train, private)
    ask("", app.evaluate, private)
    first = seen[""]
    ask("", app.train, private)
    assert len(seen[""]) > len(first) > 0
    for kept in (folder / "state" / "runs" / RUN).rglob("*.safetensors"):
        kept.unlink()
    ask("ALREADY_ANSWERED", app.train, private)
    ask("BASE_MISMATCH", base="0" * 64)
    ask("CODE_MISMATCH", code="0" * 12)
    ask("BAD_STEPS", steps=1000)
    ask("BAD_INPUT", run=NAME)
    ask("NO_SHARED_TASK", overrides="tasks=[PET]")
    errors = (
        ("BAD_INPUT", ValueError(f"{NAME} {folder}")),
        ("OUT_OF_MEMORY", MemoryError(f"{NAME} {folder}")),
        ("SITE_IO", OSError(f"{NAME} {folder}")),
        ("SITE_ERROR", RuntimeError(f"{NAME} {UID} {folder}")),
    )
    for number, (code, error) in enumerate(errors, 10):
        with monkeypatch.context() as patch:
            _failing(patch, error)
            ask(code, round=number)
    with monkeypatch.context() as patch:
        patch.setattr(work, "stats_to_metrics", lambda _: {f"CT.{NAME}": 1.0})
        ask("NOT_ALLOWED_OUT", round=20)
    pause_file(load_site(folder / "site.yaml")).touch()
    ask("PAUSED")
    pause_file(load_site(folder / "site.yaml")).unlink()
    for code, key, value, overrides in (
        ("TOO_FEW_PATIENTS", "minimum_patients", 11, ""),
        ("TOO_MANY_ROUNDS", "max_rounds_per_day", 1, ""),
        ("PRIVACY_REQUIRED", "privacy", {"required": True, "epsilon": 8.0}, ""),
        ("EPSILON_TOO_HIGH", "privacy", {"required": True, "epsilon": 0.5}, "privacy.enabled=true"),
        ("BUDGET_SPENT", "privacy", {"required": True, "epsilon": 0.5}, private),
        ("METRICS_WITHHELD", "metrics", ["scores"], ""),
    ):
        before = (folder / "site.yaml").read_text()
        _change(folder, **{key: value})
        ask(code, overrides=overrides, round=30)
        (folder / "site.yaml").write_text(before)
    image = next((folder / "CT" / "LQ").glob("*/*"))
    image.write_bytes(image.read_bytes()[:500])
    ask("BAD_INPUT", round=40)
    (folder / "site.yaml").write_text(f"name: {NAME}\n")
    ask("SITE_CONFIGURATION")
    assert set(seen) == {"", *CODES}
    assert any(secret in (folder / "state" / "site.log").read_bytes() for secret in SECRETS), (
        "the reasons stay, in the site's log"
    )
    assert audit.verify(folder / "state" / "audit.jsonl")[0] > len(CODES)


def test_a_private_round_that_is_asked_for_again_is_one_release(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    site = replace(load_site(smoke_hospitals[0] / "site.yaml"), state_dir=tmp_path / "state")
    config = load_config("smoke", "privacy.enabled=true privacy.noise_multiplier=2.0")
    first, again = (_train(site, config, 1, nonce) for nonce in ("before", "after the coordinator came back"))
    other = _train(site, config, 2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)
    assert [(entry["round"], entry["settled"]) for entry in work.ledger.rounds(site)] == [(1, 1), (2, 1)]
    entries = [entry for entry in audit.read(audit.audit_file(site)) if "epsilon" in entry]
    assert [entry["epsilon"] for entry in entries] == sorted(entry["epsilon"] for entry in entries)
    assert entries[0]["epsilon"] == entries[1]["epsilon"] < entries[2]["epsilon"]
    assert entries[0]["sha256"] == model_hash(first)


def _train(site: work.Site, config: RunConfig, number: int, nonce: str = "n") -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    model = arrays_of(build_model(config.model, 1))
    words = {"run": RUN, "round": number, "nonce": nonce, "base": model_hash(model), "steps": config.train.local_steps}
    reply = work.handle(work.train_round, site, config, work.Packet(model, {}, words))
    assert reply.error is None
    assert reply.config["nonce"] == nonce
    return reply.arrays
