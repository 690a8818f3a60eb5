"""The consortium's own certificate authority, in memory: keys, certificates, requests and how long they last."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

WARN_DAYS = (30, 7, 1)
_CLOCKS_APART = timedelta(minutes=5)  # a certificate must be valid at once at a site whose clock is slow


@dataclass(frozen=True)
class Pair:
    """A private key and the certificate of its public key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def key_pem(self) -> bytes:
        """The private key, not encrypted: protect the file."""
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

    def certificate_pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def read_pair(key_pem: bytes, certificate_pem: bytes) -> Pair:
    """Undo `Pair.key_pem` and `Pair.certificate_pem`."""
    key = serialization.load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "we make no others"
    return Pair(key, x509.load_pem_x509_certificate(certificate_pem))


def make_authority(name: str, now: datetime, days: int) -> Pair:
    """A new authority, which signs certificates and nothing else."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    unsigned = (
        _builder(subject, subject, key.public_key(), now, now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Pair(key, unsigned.sign(key, hashes.SHA384()))


def issue(authority: Pair, names: Sequence[str], now: datetime, days: float) -> Pair:
    """A new key and a server's certificate for it.

    Parameters
    ----------
    authority : Pair
    names : sequence of str
        Host names and IP addresses under which the server is reached; the first is the certificate's subject.
    now : datetime
    days : float
        How long it is valid, but never longer than the authority.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    issuer = authority.certificate
    until = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    unsigned = (
        _builder(subject, issuer.subject, key.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([general_name(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    return Pair(key, unsigned.sign(authority.key, hashes.SHA384()))


def general_name(name: str) -> x509.GeneralName:
    """A host name or an address, as a certificate holds it.

    Raises
    ------
    ValueError
        It is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        labels = name.split(".")
        if not all(label.replace("-", "").isalnum() and label.isascii() for label in labels):
            raise ValueError(f"certificate: expected a host name or an IP address, got {name!r}; correct it") from None
        return x509.DNSName(name)


def names_of(certificate: x509.Certificate) -> list[str]:
    """The host names and addresses in a certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def read_request(pem: bytes) -> tuple[str, str]:
    """The name and the OpenSSH public key in a hospital's request, whose signature proves that it holds the private key.

    Raises
    ------
    ValueError
        It is no request, is damaged, or not one of `tat site enroll`.
    """
    try:
        request = x509.load_pem_x509_csr(pem)
        is_signed = request.is_signature_valid
    except Exception:  # whatever a damaged or hostile file makes the parser say
        request, is_signed = None, False
    public = request.public_key() if request is not None else None
    names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME) if request is not None else []
    if not is_signed or not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp384r1" or len(names) != 1:
        raise ValueError(
            "provision approve: expected a request made by `tat site enroll`, got another or a damaged file; ask for it again"
        )
    key = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return str(names[0].value), key.decode()


def expiry_warning(not_after: datetime, now: datetime) -> str | None:
    """What to say of a certificate that ends soon: at 30, 7 and 1 days, and when it is over."""
    left = not_after - now
    if left <= timedelta(0):
        return f"EXPIRED on {not_after:%Y-%m-%d}"
    if left > timedelta(days=WARN_DAYS[0]):
        return None
    stage = min(days for days in WARN_DAYS if left <= timedelta(days=days))
    return f"expires on {not_after:%Y-%m-%d %H:%M} UTC, within {stage} day{'s' if stage > 1 else ''}"


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=min(start - _CLOCKS_APART, end),
        not_valid_after=end,
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
