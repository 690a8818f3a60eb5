"""How a hospital's public key is shown to people, who compare it before they trust it."""

from __future__ import annotations

import base64

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import ssh


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """The fingerprint of a public key, as `ssh-keygen -l` prints it."""
    digest = ssh.ssh_key_fingerprint(key, hashes.SHA256())
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
