"""The coordinator's folder: its authority, its certificates, the hospitals that it approved. Only public keys are here.

```
coordinator.yaml                      where to listen, which run (`server/coordinator.py`)
authority/ca.pem, ca.key              signs; hospitals get ca.pem; ca.key may be kept elsewhere between two uses
certificates/coordinator.pem          what hospitals see, with its key; replaced by `tat provision rotate`
certificates/loopback.pem             between proxy and SuperLink, on this machine, with its key
sites/NAME.json                       a hospital: public key, when approved, when revoked
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from server.authority import expiry_warning, issue, make_authority, names_of, read_pair, read_request
from tat_core.files import write_file
from tat_core.node_key import fingerprint

AUTHORITY = Path("authority/ca.pem")
AUTHORITY_KEY = Path("authority/ca.key")
COORDINATOR = Path("certificates/coordinator.pem")
LOOPBACK = Path("certificates/loopback.pem")
AUTHORITY_DAYS = 3650
COORDINATOR_DAYS = 90
SITE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
LOOPBACK_NAMES = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class ApprovedSite:
    """A hospital that the coordinator approved.

    Attributes
    ----------
    name : str
    public_key : str
        OpenSSH.
    approved_at : str
        ISO 8601, UTC.
    revoked_at : str or None
    """

    name: str
    public_key: str
    approved_at: str
    revoked_at: str | None = None

    @property
    def fingerprint(self) -> str:
        """What the hospital and the coordinator compare."""
        return fingerprint(load_ssh_public_key(self.public_key.encode()))  # type: ignore[arg-type]


def found(folder: Path, names: Sequence[str], now: datetime) -> None:
    """Make the authority and the coordinator's certificates in a folder.

    Raises
    ------
    ValueError
        The folder has an authority already, or a name is neither a host's nor an address.
    """
    if (folder / AUTHORITY).exists():
        raise ValueError(
            f"provision init: expected a new folder, got {folder}, which has an authority; renew with `tat provision rotate`"
        )
    authority = make_authority(f"fed-tat authority of {names[0]}", now, AUTHORITY_DAYS)
    coordinator = issue(authority, names, now, COORDINATOR_DAYS)
    loopback = issue(authority, LOOPBACK_NAMES, now, AUTHORITY_DAYS)
    for name, mode in (("sites", 0o755), ("certificates", 0o700), ("authority", 0o755)):
        (folder / name).mkdir(mode, parents=True, exist_ok=True)
    write_file(folder / LOOPBACK, loopback.key_pem() + loopback.certificate_pem(), mode=0o600)
    write_file(folder / COORDINATOR, coordinator.key_pem() + coordinator.certificate_pem(), mode=0o600)
    write_file(folder / AUTHORITY_KEY, authority.key_pem(), mode=0o600)
    write_file(folder / AUTHORITY, authority.certificate_pem())


def rotate(folder: Path, names: Sequence[str], now: datetime, days: float) -> x509.Certificate:
    """Give the coordinator a new key and certificate, by the same authority: hospitals need to do nothing.

    Parameters
    ----------
    folder : Path
    names : sequence of str
        New names; none keeps those of the certificate before.
    now : datetime
    days : float
    """
    before = read_certificate(folder, COORDINATOR)
    key = folder / AUTHORITY_KEY
    if not key.is_file():
        raise ValueError(f"provision rotate: expected the authority's key at {key}, got none; put it back for this command")
    authority = read_pair(key.read_bytes(), (folder / AUTHORITY).read_bytes())
    pair = issue(authority, list(names) or names_of(before), now, days)
    write_file(folder / COORDINATOR, pair.key_pem() + pair.certificate_pem(), mode=0o600)  # one file: never half of a pair
    return pair.certificate


def describe_request(request: bytes) -> tuple[str, str]:
    """Name and fingerprint in a hospital's request, for the person who compares them."""
    site = ApprovedSite(*read_request(request), approved_at="")
    return site.name, site.fingerprint


def approve(folder: Path, request: bytes, expected_fingerprint: str, now: datetime) -> ApprovedSite:
    """Let the hospital of a request take part.

    Raises
    ------
    ValueError
        The request is damaged, its key is not the expected one, or its name or its key is another hospital's.
    """
    name, public_key = read_request(request)
    if not SITE_NAME.fullmatch(name):  # it becomes the name of a file
        raise ValueError(f"provision approve: expected a hospital's name of letters, digits, - and _, got {name!r}; refuse it")
    site = ApprovedSite(name, public_key, now.isoformat(timespec="seconds"))
    if site.fingerprint != expected_fingerprint:
        raise ValueError(
            f"provision approve: expected the fingerprint {expected_fingerprint}, got {site.fingerprint}; "
            "the request was not made by that hospital: ask it again, by telephone"
        )
    for other in read_sites(folder):
        if other.name == name and other.public_key != public_key and other.revoked_at is None:
            raise ValueError(
                f"provision approve: expected a new name, got {name}, which has another key; "
                f"`tat provision revoke {name}` first if its key was lost"
            )
        if other.name != name and other.public_key == public_key:
            raise ValueError(f"provision approve: expected a key of its own for {name}, got that of {other.name}; enroll afresh")
    write_site(folder, site)
    return site


def revoke(folder: Path, name: str, now: datetime) -> ApprovedSite:
    """Take a hospital's right to connect."""
    for site in read_sites(folder):
        if site.name == name:
            site = replace(site, revoked_at=now.isoformat(timespec="seconds"))
            write_site(folder, site)
            return site
    known = ", ".join(site.name for site in read_sites(folder)) or "none"
    raise ValueError(f"provision revoke: expected an approved hospital ({known}), got {name!r}; correct it")


def read_sites(folder: Path) -> list[ApprovedSite]:
    """Every hospital ever approved, by name."""
    return [ApprovedSite(**json.loads(path.read_text())) for path in sorted((folder / "sites").glob("*.json"))]


def active_keys(folder: Path) -> dict[str, str]:
    """The public keys of the hospitals that may connect, by name."""
    return {site.name: site.public_key for site in read_sites(folder) if site.revoked_at is None}


def write_site(folder: Path, site: ApprovedSite) -> None:
    """Write a hospital's file."""
    write_file(folder / "sites" / f"{site.name}.json", json.dumps(asdict(site), indent=2).encode() + b"\n")


def expiries(folder: Path, now: datetime) -> list[tuple[str, datetime, str | None]]:
    """Every certificate in the folder, when it ends, and what is to be said of that."""
    ends = [(place.stem, read_certificate(folder, place).not_valid_after_utc) for place in (AUTHORITY, COORDINATOR, LOOPBACK)]
    return [(name, end, expiry_warning(end, now)) for name, end in ends]


def read_certificate(folder: Path, place: Path) -> x509.Certificate:
    """A certificate in the folder.

    Raises
    ------
    ValueError
        The folder is not a coordinator's.
    """
    path = folder / place
    if not path.is_file():
        raise ValueError(f"coordinator: expected a folder made by `tat provision init`, got {folder} without {path.name}; run it")
    return x509.load_pem_x509_certificate(path.read_bytes())


def utc_now() -> datetime:
    """The time, to the second, as certificates hold it."""
    return datetime.now(UTC).replace(microsecond=0)
