"""`tat site enroll`: a hospital makes its key, which stays, and a request, which goes to the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.site import load_site
from tat_core.files import write_file
from tat_core.node_key import fingerprint


def enroll(
    site: Annotated[Path, typer.Argument(help="The hospital's site.yaml.")],
    output: Annotated[Path, typer.Option("-o", help="Folder for the request.")] = Path(),
) -> None:
    """Make this hospital's key and the request that the coordinator approves. The key never leaves this machine.

    Run again, it writes the request once more, from the same key.
    """
    hospital = load_site(site)
    path = hospital.state_dir / "node.key"
    key = read_or_make_key(path)
    request = output / f"{hospital.name}.csr"
    write_file(request, make_request(key, hospital.name))
    typer.echo(f"key          {path} (stays here)")
    typer.echo(f"request      {request} (send it to the coordinator, by any way)")
    typer.echo(f"fingerprint  {fingerprint(key.public_key())} (tell the coordinator by another way, such as the telephone)")


def read_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key in a file, or a new one written to it: OpenSSH, NIST P-384, readable by its owner alone."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, pem, mode=0o600)
        return key
    return read_key(path)


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The site's key, as Flower reads it.

    Raises
    ------
    ValueError
        The file holds something else, or others may read it.
    """
    if path.stat().st_mode & 0o077:
        raise ValueError(f"node key: expected {path.name} to be readable by its owner alone, got others; chmod 600 it")
    try:
        found = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError):  # the latter is said of one with a password
        found = None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError(
            f"node key: expected an EC key without a password in {path}, got something else; "
            "move that file away and run `tat site enroll`"
        )
    return found


def make_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """A certificate signing request (PEM) for the hospital's name; its signature proves the possession of the key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM)
