"""Find what is wrong with a data set before training does, and say what to do. Changes no image.

Cases that cannot be trained on go to quarantine.json; training goes on without them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tat_core.data.check_case import CaseFacts, Finding, check_case
from tat_core.data.dataset import SPLITS, Case, DataSet, open_data_set, write_json
from tat_core.data.parallel import run_each
from tat_core.data.prepared import MAX_BAD_FRACTION, count_bad, leak_is_declared, leaks

FEW_PATIENTS = 5
# dates, long numbers, two capitalised words, and DICOM's way of writing names
_IDENTIFYING = re.compile(r"(19|20)\d{2}[-_.]?[01]\d[-_.]?[0-3]\d|\d{7,}|\^|[A-Z][a-z]{2,}[ _,]+[A-Z][a-z]{2,}")


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes
    ----------
    findings : tuple[Finding, ...]
        Errors first. Those of a case name it, so the report stays at the site.
    num_cases : int
    quarantine : dict[str, str]
        Case to reason, as written to quarantine.json.
    """

    findings: tuple[Finding, ...]
    num_cases: int
    quarantine: dict[str, str]

    @property
    def exit_code(self) -> int:
        """0 clean, 1 warnings, 2 errors."""
        return max((2 if finding.level == "error" else 1 for finding in self.findings), default=0)


def check(folder: Path, workers: int = 1, write_quarantine: bool = True) -> Report:
    """Check one data set.

    Parameters
    ----------
    folder : pathlib.Path
        Folder with dataset.json, splits.json, LQ and HQ.
    workers : int
        Processes; each holds one case.
    write_quarantine : bool
        Write quarantine.json afresh, so that repaired cases come back.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        If dataset.json or splits.json cannot be read.
    """
    data = open_data_set(folder)
    findings: list[Finding] = []
    facts: dict[str, CaseFacts] = {}
    jobs = [(case, data.task) for case in data.cases if case.lq is not None and case.hq is not None]
    for (case, _), outcome in run_each(check_case, jobs, workers, "Checking cases"):
        if isinstance(outcome, ValueError):
            findings.append(_unreadable(case, outcome))
        else:
            facts[case.name] = outcome
            findings += outcome.findings
    findings += _pairing(data)
    findings += _patients(data)
    findings += _duplicates(data, facts)
    findings += _names(data)
    bad = {finding.case: f"{finding.what}; {finding.do}" for finding in findings if finding.level == "error" and finding.case}
    num_bad, num_used = count_bad(data, bad)
    if num_bad > MAX_BAD_FRACTION * num_used:
        findings.append(
            Finding(
                "error",
                "",
                "mostly-bad",
                f"{num_bad} of {num_used} cases cannot be used",
                f"training is refused above {MAX_BAD_FRACTION:.0%}, because then something is wrong with the export as a whole",
                "repair the cases listed here, or take them out of splits.json",
            )
        )
    if write_quarantine and (bad or (folder / "quarantine.json").exists()):
        write_json(folder / "quarantine.json", {"format": 1, "cases": bad})
    ordered = sorted(findings, key=lambda finding: (finding.level != "error", finding.case, finding.code))
    return Report(tuple(ordered), len(data.cases), bad)


def _unreadable(case: Case, error: ValueError) -> Finding:
    what, _, advice = str(error).partition(";")
    return Finding("error", case.name, "unreadable", what, "a case that cannot be read cannot be trained on", advice.strip())


def _pairing(data: DataSet) -> Iterator[Finding]:
    for case in data.cases:
        if case.lq is None and case.hq is None:
            what, do = "listed in splits.json, but there are no images", "add the images or remove the entry"
        elif case.lq is None or case.hq is None:
            what, do = f"no {'LQ' if case.lq is None else 'HQ'} image", "add it under the same name, or remove the case"
        else:
            if not case.split:
                why = "what splits.json does not name is not used"
                yield Finding("warning", case.name, "unused", "in no split", why, "add it to splits.json if it shall be used")
            continue
        yield Finding("error" if case.split else "warning", case.name, "unpaired", what, "training needs both sides", do)
    for split in SPLITS:
        if not any(case.split == split for case in data.cases):
            why = "without it nothing can be learnt" if split == "train" else f"no result can be given for {split}"
            level = "error" if split == "train" else "warning"
            yield Finding(level, "", "empty-split", f"no case in {split}", why, "assign patients to it in splits.json")


def _patients(data: DataSet) -> Iterator[Finding]:
    for case in data.cases:
        if case.split and not case.patient:
            why = "leakage between the splits cannot be excluded, and privacy is counted per patient"
            yield Finding("error", case.name, "no-patient", "no patient in splits.json", why, "give each case its patient")
    level = "warning" if leak_is_declared(data) else "error"
    why = "a network remembers patients: scores on a patient it was trained on are too good"
    for splits in leaks(data):
        what = f"one patient is in {' and '.join(splits)}"
        yield Finding(level, "", "leak", what, why, "move all cases of a patient to one split")
    train = len({case.patient for case in data.cases if case.split == "train"})
    if train < FEW_PATIENTS:
        why = "a network trained on few patients learns these patients, and hides them less well"
        yield Finding(
            "warning",
            "",
            "few-patients",
            f"{train} patient{'s' * (train != 1)} in train",
            why,
            f"add patients; {FEW_PATIENTS} at the very least",
        )


def _duplicates(data: DataSet, facts: dict[str, CaseFacts]) -> Iterator[Finding]:
    """The same slice content in two cases, whatever they are called."""
    owners: dict[str, str] = {}
    split_of = {case.name: case.split for case in data.cases}
    seen: set[tuple[str, str]] = set()
    for name in sorted(facts, key=lambda name: (not split_of[name], name)):  # an unused case never costs a used one
        for digest in facts[name].slice_hashes:
            first = owners.setdefault(digest, name)
            if first == name or (first, name) in seen:
                continue
            seen.add((first, name))
            yield _duplicate(name, split_of[first], split_of[name])


def _duplicate(name: str, first_split: str, split: str) -> Finding:
    what = "shares slices of equal content with another case"
    if first_split and not split:
        why = "it must not come into another split than the case that is used"
        return Finding("error", name, "duplicate", f"in no split, and {what} that is used", why, "remove the unused one")
    if first_split != split:
        why = "scores on images that were trained on are too good"
        return Finding("error", name, "duplicate", f"{what} of another split", why, "remove one of the two")
    return Finding("warning", name, "duplicate", what, "doubled images count twice", "remove one of the two")


def _names(data: DataSet) -> Iterator[Finding]:
    why = "names appear in logs and reports at the site"
    for case in data.cases:
        if _IDENTIFYING.search(case.name) or _IDENTIFYING.search(case.patient):
            what = "the name of the case or patient looks like a date, a number or a person's name"
            yield Finding("warning", case.name, "identifying-name", what, why, "rename it to a pseudonym")


def summary(findings: Sequence[Finding]) -> dict[str, int]:
    """How many findings of each code; says nothing about a patient."""
    counts: dict[str, int] = defaultdict(int)
    for finding in findings:
        counts[finding.code] += 1
    return dict(sorted(counts.items()))
