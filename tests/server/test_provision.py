"""Founding a consortium and letting hospitals in: checked by OpenSSL, OpenSSH and Python's own TLS."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from client.enroll import make_request, read_or_make_key
from server import consortium
from server.authority import expiry_warning, issue, make_authority, names_of, read_request
from server.consortium import AUTHORITY, COORDINATOR, LOOPBACK
from tat_core.node_key import fingerprint

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    consortium.found(tmp_path, ["localhost", "127.0.0.1"], NOW)
    return tmp_path


def request_of(name: str) -> tuple[bytes, str]:
    key = ec.generate_private_key(ec.SECP384R1())
    return make_request(key, name), fingerprint(key.public_key())


def handshake(folder: Path, certificate: Path, name: str) -> None:
    """A TLS handshake as a hospital makes it: Python's strictest checks, the authority's file alone."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(folder / certificate)
    hospital = ssl.create_default_context(cafile=folder / AUTHORITY)
    hospital.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server_side.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with hospital.wrap_socket(ours, server_hostname=name):
            pass
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
@pytest.mark.parametrize("certificate", [COORDINATOR, LOOPBACK])
def test_hospitals_trust_the_coordinator_by_the_authority_alone(folder: Path, certificate: Path, name: str) -> None:
    handshake(folder, certificate, name)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|doesn't match|not valid for"):
        handshake(folder, certificate, "elsewhere.example.org")


def test_openssl_verifies_what_we_issued(folder: Path) -> None:
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", folder / AUTHORITY, folder / COORDINATOR]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_no_secret_is_readable_by_others(folder: Path) -> None:
    key = folder / "state" / "node.key"
    old = os.umask(0)
    try:
        read_or_make_key(key)
        consortium.rotate(folder, [], NOW, 90)
    finally:
        os.umask(old)
    secrets = [path for path in folder.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]
    assert {path.relative_to(folder).as_posix() for path in secrets} == {
        "authority/ca.key",
        "certificates/coordinator.pem",
        "certificates/loopback.pem",
        "state/node.key",
    }
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}


def test_rotation_keeps_names_and_trust(folder: Path) -> None:
    before = (folder / COORDINATOR).read_bytes()
    consortium.rotate(folder, [], NOW, 30)
    assert (folder / COORDINATOR).read_bytes() != before
    assert names_of(consortium.read_certificate(folder, COORDINATOR)) == ["localhost", "127.0.0.1"]
    handshake(folder, COORDINATOR, "localhost")
    consortium.rotate(folder, ["new.example.org"], NOW, 30)
    handshake(folder, COORDINATOR, "new.example.org")


def test_an_expired_certificate_and_another_authority_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    consortium.rotate(folder, [], NOW - timedelta(days=2), 1)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(folder, COORDINATOR, "localhost")
    other = tmp_path_factory.mktemp("other")
    consortium.found(other, ["localhost"], NOW)
    shutil.copy(other / COORDINATOR, folder / COORDINATOR)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|unable to get local issuer|signature failure"):
        handshake(folder, COORDINATOR, "localhost")


def test_no_certificate_outlives_its_authority() -> None:
    authority = make_authority("a", NOW, 10)
    assert issue(authority, ["x"], NOW, 90).certificate.not_valid_after_utc == NOW + timedelta(days=10)


def test_openssh_reads_the_hospitals_key_and_agrees_on_its_fingerprint(tmp_path: Path) -> None:
    key = read_or_make_key(tmp_path / "node.key")
    printed = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "node.key"], capture_output=True, text=True, check=True).stdout
    assert printed.split()[:2] == ["384", fingerprint(key.public_key())]
    again = read_or_make_key(tmp_path / "node.key")
    assert again.private_numbers() == key.private_numbers()
    (tmp_path / "node.key").chmod(0o644)
    with pytest.raises(ValueError, match="owner alone"):
        read_or_make_key(tmp_path / "node.key")


def test_approve_revoke_and_approve_again(folder: Path) -> None:
    first, its_print = request_of("north")
    consortium.approve(folder, first, its_print, NOW)
    assert list(consortium.active_keys(folder)) == ["north"]
    second, second_print = request_of("north")
    with pytest.raises(ValueError, match="another key"):
        consortium.approve(folder, second, second_print, NOW)
    consortium.revoke(folder, "north", NOW)
    assert consortium.active_keys(folder) == {}
    consortium.approve(folder, second, second_print, NOW)
    assert [site.fingerprint for site in consortium.read_sites(folder)] == [second_print]
    with pytest.raises(ValueError, match="expected an approved hospital"):
        consortium.revoke(folder, "south", NOW)


def test_what_is_not_approved(folder: Path) -> None:
    request, _ = request_of("north")
    with pytest.raises(ValueError, match="fingerprint"):
        consortium.approve(folder, request, request_of("north")[1], NOW)
    key = ec.generate_private_key(ec.SECP384R1())
    consortium.approve(folder, make_request(key, "south"), fingerprint(key.public_key()), NOW)
    with pytest.raises(ValueError, match="a key of its own"):
        consortium.approve(folder, make_request(key, "west"), fingerprint(key.public_key()), NOW)
    for name in ("../../etc/passwd", "a b", "", "x" * 65):
        other = ec.generate_private_key(ec.SECP384R1())
        try:
            pem = make_request(other, name)
        except ValueError:
            continue  # cannot even be written down
        with pytest.raises(ValueError, match="provision approve: expected"):
            consortium.approve(folder, pem, fingerprint(other.public_key()), NOW)
    assert sorted(path.name for path in (folder / "sites").iterdir()) == ["south.json"]


def test_a_request_that_was_tampered_with_is_refused() -> None:
    request, _ = request_of("north")
    lines = request.decode().splitlines()
    lines[1] = lines[1][:30] + ("A" if lines[1][30] != "A" else "B") + lines[1][31:]
    for bad in ("\n".join(lines).encode(), b"", b"-----BEGIN CERTIFICATE REQUEST-----\n", request[:200]):
        with pytest.raises(ValueError, match="made by `tat site enroll`"):
            read_request(bad)
    weaker = make_request(ec.generate_private_key(ec.SECP256R1()), "north")
    with pytest.raises(ValueError, match="made by `tat site enroll`"):
        read_request(weaker)


@given(st.timedeltas(timedelta(days=-400), timedelta(days=400)))
def test_warnings_come_at_30_7_and_1_days(left: timedelta) -> None:
    warning = expiry_warning(NOW + left, NOW)
    stages = [days for days in (1, 7, 30) if left <= timedelta(days=days)]
    if left <= timedelta(0):
        assert warning is not None
        assert "EXPIRED" in warning
    elif stages:
        assert warning is not None
        assert f"within {stages[0]} day" in warning
    else:
        assert warning is None
