"""The `coordinator` section of `site.yaml`: whom a hospital connects to, whom it trusts, who it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Coordinator:
    """Where a hospital's node connects to.

    Attributes
    ----------
    superlink : str
        ``HOST:PORT``.
    root_certificates : Path or None
        PEM file of the authority that signed the coordinator's certificate; None trusts those of the operating system.
    key : Path or None
        The site's private key; None where the coordinator admits anybody.
    insecure : bool
        Without TLS: for trials on one machine only.
    accept_other_code : bool
        Take part although the coordinator runs other code than this site has installed.
    """

    superlink: str
    root_certificates: Path | None = None
    key: Path | None = None
    insecure: bool = False
    accept_other_code: bool = False

    def __post_init__(self) -> None:
        match = _ADDRESS.fullmatch(self.superlink)
        if match is None or not 0 < int(match["port"]) < 65536:
            raise ValueError(f"coordinator: expected HOST:PORT, got {self.superlink!r}; ask the coordinator for it")
        if self.insecure and (self.root_certificates or self.key):
            raise ValueError("coordinator: expected either certificates or insecure, got both; leave insecure out")

    @property
    def host(self) -> str:
        """Name or address, without the brackets of IPv6."""
        return self.superlink.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """TCP port."""
        return int(self.superlink.rpartition(":")[2])


def read_coordinator(site_file: Path, section: Any) -> Coordinator:
    """The section, checked; paths are relative to the site's file.

    Raises
    ------
    ValueError
        A key is unknown, missing or of the wrong type.
    """
    kinds = {"superlink": str, "root_certificates": str, "key": str, "insecure": bool, "accept_other_code": bool}
    if not isinstance(section, dict) or "superlink" not in section:
        raise ValueError(f"site file {site_file}, coordinator: expected superlink: HOST:PORT, got {section!r}; write it there")
    for key, value in section.items():
        if not isinstance(value, kinds.get(key, ())):
            raise ValueError(
                f"site file {site_file}, coordinator: expected {', '.join(kinds)}, got {key}: {value!r}; correct or remove it"
            )
    paths = {key: (site_file.parent / section[key]).resolve() for key in ("root_certificates", "key") if key in section}
    try:
        return Coordinator(**{**section, **paths})
    except ValueError as error:
        raise ValueError(f"site file {site_file}, {error}") from None
