"""What a hospital allows, as pure functions of its `site.yaml` and the run; reading the file is `client.site`'s.

A site that will not do what it was asked says so by a code. The reason is for the site's own log.
"""

from __future__ import annotations

from collections.abc import Mapping

from client.site import Site
from tat_core.config import RunConfig

CODES = {
    "PAUSED": "The hospital has paused its part (`tat site pause`).",
    "NO_SHARED_TASK": "The run trains none of the tasks that the site offers.",
    "TOO_FEW_PATIENTS": "No data set of the run's tasks has `minimum_patients` training patients.",
    "TOO_MANY_ROUNDS": "The site has trained `max_rounds_per_day` rounds within 24 hours.",
    "PRIVACY_REQUIRED": "The site demands differential privacy, and the run trains without.",
    "EPSILON_TOO_HIGH": "The run's `privacy.epsilon` is above the site's.",
    "BUDGET_SPENT": "The round would take the data set's ε beyond `privacy.epsilon`.",
    "ALREADY_ANSWERED": "The round was answered before, and its reply is no longer kept: it will not be released a second time.",
    "METRICS_WITHHELD": "The site does not let these metrics leave.",
    "NOT_ALLOWED_OUT": "The reply held something that is not on the list of what may leave: a fault of ours.",
    "BAD_STEPS": "More local steps are asked for than the run has.",
    "BASE_MISMATCH": "The model that arrived does not have the hash that the coordinator states.",
    "CODE_MISMATCH": "The coordinator runs other code than the site has installed.",
    "BAD_INPUT": "The images or the instruction cannot be used; `tat site check` says more.",
    "OUT_OF_MEMORY": "The site ran out of memory.",
    "SITE_IO": "The site could not read or write a file, its audit log included.",
    "SITE_CONFIGURATION": "`site.yaml` or the run's configuration could not be read.",
    "SITE_ERROR": "Anything else; the site's log has the traceback.",
}

PATIENT_RANGES = ("1-10", "11-50", "51-200", "201-1000", ">1000")


class SiteRefusalError(Exception):
    """The site will not do what was asked. Only the code leaves the site; the reason goes to its own log."""

    def __init__(self, code: str, reason: str) -> None:
        assert code in CODES, code
        super().__init__(f"{code}: {reason}")
        self.code = code


def agreed_tasks(site: Site, config: RunConfig, patients: Mapping[str, int]) -> tuple[str, ...]:
    """The run's tasks that the site takes part in.

    Parameters
    ----------
    site, config
    patients : mapping of task name to int
        Training patients of the site's data sets.

    Raises
    ------
    SiteRefusalError
        There is none, or the run trains without the privacy that the site demands.
    """
    ceiling, budget = site.privacy.epsilon, config.privacy
    if site.privacy.required and not budget.enabled:
        raise SiteRefusalError("PRIVACY_REQUIRED", "site.yaml says privacy.required, the run says privacy.enabled=false")
    if budget.enabled and budget.noise_multiplier is None and ceiling is not None and budget.epsilon > ceiling:
        raise SiteRefusalError("EPSILON_TOO_HIGH", f"the run asks for ε {budget.epsilon:g}, site.yaml allows {ceiling:g}")
    shared = [task for task in config.tasks if task in site.data]
    if not shared:
        raise SiteRefusalError("NO_SHARED_TASK", f"the run trains {', '.join(config.tasks)}, the site has {', '.join(site.data)}")
    enough = tuple(task for task in shared if patients[task] >= site.minimum_patients)
    if not enough:
        have = ", ".join(f"{task} {patients[task]}" for task in shared)
        raise SiteRefusalError("TOO_FEW_PATIENTS", f"training patients: {have}; site.yaml asks for {site.minimum_patients}")
    return enough


def check_metrics(site: Site, kind: str) -> None:
    """Refuse to compute what may not leave.

    Parameters
    ----------
    site
    kind : str
        ``losses`` (of training) or ``scores`` (of validation).

    Raises
    ------
    SiteRefusalError
        The site does not let them leave.
    """
    if kind not in site.metrics:
        raise SiteRefusalError("METRICS_WITHHELD", f"site.yaml lets {', '.join(site.metrics) or 'no metrics'} leave, not {kind}")


def patient_bucket(num_patients: int) -> str:
    """How many patients a site says it has: one of `PATIENT_RANGES`, never the number."""
    return next((text for text in PATIENT_RANGES[:-1] if num_patients <= int(text.split("-")[1])), PATIENT_RANGES[-1])
