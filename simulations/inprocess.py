"""The hospitals in this very process: the engine and the sites' code without Flower and Ray, for tests and experiments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from client.alone import baseline_round, fine_tune_round
from client.site import Site, load_site
from client.work import describe, evaluate_round, handle, train_round
from server.sites import SiteInfo, read_introduction
from tat_core.config import RunConfig
from tat_core.packet import Packet

ACTIONS = {
    "train": train_round,
    "train.baseline": baseline_round,
    "train.fine_tune": fine_tune_round,
    "evaluate": evaluate_round,
}


class LocalSites:
    """Hospitals that answer at once, one after the other, in the order in which they are asked.

    Parameters
    ----------
    folders : sequence of Path
        Site folders, each with its ``site.yaml``.
    config : RunConfig
    device : str, optional
        Where all of them train, instead of what their files say.
    """

    def __init__(self, folders: Sequence[Path], config: RunConfig, device: str | None = None) -> None:
        sites = [load_site(folder / "site.yaml") for folder in folders]
        if device is not None:
            sites = [replace(site, device=device) for site in sites]
        self._sites: dict[str, Site] = {site.name: site for site in sites}
        self._config = config

    def members(self, config: RunConfig) -> dict[str, SiteInfo]:
        """The sites and their tasks."""
        replies = [handle(describe, site, config, Packet()) for _, site in sorted(self._sites.items())]
        return dict(read_introduction(reply, config) for reply in replies)

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:  # noqa: ARG002 - nobody is slow here
        """Let each named site do its work."""
        for name, instruction in instructions.items():
            yield name, handle(ACTIONS[kind], self._sites[name], self._config, instruction)
