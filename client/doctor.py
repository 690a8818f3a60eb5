"""What keeps a hospital from taking part, each point with what to do; `flower-client doctor` and every start of the node.

Nothing that is looked at is changed, at the hospital or at the coordinator.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from client import audit, ledger
from client.coordinator import Coordinator
from client.doctor_network import check_clock, check_dns, check_key, check_proxy, check_tls, check_versions
from client.finding import Finding, failed, passed, warning
from client.site import Site
from tat_core.data.dataset import open_data_set
from tat_core.data.prepared import undeclared_leaks

LITTLE_GB, TOO_LITTLE_GB = 10.0, 1.0


def look(site: Site, coordinator: Coordinator) -> list[Finding]:
    """All checks, in the order in which one would ask; a check that breaks is a finding too."""
    checks: dict[str, Callable[[], Finding]] = {
        "name": lambda: check_dns(coordinator),
        "proxy": lambda: check_proxy(coordinator),
        "TLS": lambda: check_tls(coordinator),
        "clock": lambda: check_clock(coordinator),
        "node key": lambda: check_key(coordinator),
        "disk": lambda: check_disk(site.state_dir),
        "device": lambda: check_device(site.device),
        **{f"data {task}": partial(check_data, task, folder) for task, folder in site.data.items()},
        "ledger": lambda: check_ledger(site),
        "versions": lambda: check_versions(coordinator),
    }
    return [_guarded(name, check) for name, check in checks.items()]


def exit_code(findings: Sequence[Finding]) -> int:
    """0: nothing; 1: something to look at; 2: the site cannot take part."""
    return max(("passed", "warning", "failed").index(finding.level) for finding in findings)


def check_disk(folder: Path) -> Finding:
    """Room where the site keeps its state."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    text = f"{free_gb:.1f} GB are free for state_dir"
    if free_gb < TOO_LITTLE_GB:
        return failed("disk", f"{text}; free some, or name another state_dir in site.yaml")
    return warning("disk", f"{text}; free some") if free_gb < LITTLE_GB else passed("disk", text)


def check_device(device: str) -> Finding:
    """Whether the site's device is there."""
    if device == "cpu":
        return passed("device", "cpu")
    import torch  # takes seconds

    try:
        torch.zeros(1, device=device)
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return failed("device", f"{device} cannot be used ({reason}); install its driver, or write device: cpu into site.yaml")
    return passed("device", f"{device}: {name}, {memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")


def check_data(task: str, folder: Path) -> Finding:
    """Whether a data set can be opened and has what training needs; its images are not read."""
    name = f"data {task}"
    try:
        data = open_data_set(folder)
    except (ValueError, OSError) as error:
        return failed(name, str(error))
    usable = [case for case in data.cases if case.lq and case.hq and case.name not in data.quarantine]
    count = {split: sum(case.split == split for case in usable) for split in ("train", "validation")}
    text = f"{count['train']} cases to train on, {count['validation']} to validate on, {len(data.quarantine)} in quarantine"
    if data.task.name != task:
        return failed(name, f"the folder holds {data.task.name}; correct data in site.yaml")
    if undeclared_leaks(data):
        return failed(name, f"a patient is in several splits; see `tat data check {folder}`")
    if not count["train"]:
        return failed(name, f"{text}; see `tat data check {folder}`")
    return passed(name, text) if count["validation"] else warning(name, f"{text}; give some patients to validation")


def check_ledger(site: Site) -> Finding:
    """Whether the privacy ledger can be read and the audit log is whole."""
    try:
        rounds = len(ledger.rounds(site))
        entries, _ = audit.verify(audit.audit_file(site))
    except (ValueError, OSError) as error:
        return failed("ledger", str(error))
    return passed("ledger", f"{rounds} rounds are charged, {entries} replies are in the audit log")


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # one check that breaks must not hide the others
        return failed(name, f"the check broke: {type(error).__name__}: {error}")
