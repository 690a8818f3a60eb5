"""The doctor's checks of the way to the coordinator."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import httpx
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.coordinator import Coordinator
from client.enroll import read_key
from client.finding import Finding, failed, passed, warning
from tat_core.code import CODE_HEADER, code_hash

TIMEOUT_S = 10.0
EXPIRES_SOON = timedelta(days=30)
# Flower's limits; the Date header is cut to whole seconds.
FAST_S, SLOW_S, NOTICEABLE_S = 4.0, 290.0, 2.0

_CERTIFICATE_FAULTS = {
    9: "is not valid yet; set this machine's clock, or wait",
    10: "has expired; the coordinator must renew it",
    18: "is signed by itself; name the consortium's CA file in site.yaml, coordinator.root_certificates",
    19: "comes from an unknown authority; name the consortium's CA file in site.yaml, coordinator.root_certificates",
    20: "comes from another authority than the CA file that you have; ask the coordinator for the consortium's CA file",
    62: "is for another name; correct coordinator.superlink, or have the coordinator's certificate name this one",
    64: "is for another address; correct coordinator.superlink, or have the coordinator's certificate name this one",
}


def check_dns(coordinator: Coordinator) -> Finding:
    """Whether the coordinator's name has an address."""
    try:
        found = socket.getaddrinfo(coordinator.host, coordinator.port, type=socket.SOCK_STREAM)
    except OSError as error:
        if _proxy(coordinator):
            return warning("name", f"{coordinator.host} is not known here ({error}); the proxy has to know it")
        return failed("name", f"{coordinator.host} is not known ({error}); correct coordinator.superlink, or ask your IT")
    return passed("name", f"{coordinator.host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}")


def check_proxy(coordinator: Coordinator) -> Finding:
    """Whether the environment sends the node through a proxy."""
    proxy = _proxy(coordinator)
    if proxy is None:
        return passed("proxy", "none")
    return warning("proxy", f"{proxy[0]}:{proxy[1]} is between; if it refuses, add {coordinator.host} to NO_PROXY")


def check_tls(coordinator: Coordinator) -> Finding:
    """Whether the coordinator answers and its certificate is good, and for how long."""
    try:
        connection = _connect(coordinator)
    except ssl.SSLCertVerificationError as error:
        fault = _CERTIFICATE_FAULTS.get(error.verify_code, f"is refused: {error.verify_message}")
        return failed("TLS", f"the certificate of {coordinator.superlink} {fault}")
    except ssl.SSLError as error:
        return failed("TLS", f"{coordinator.superlink} does not speak TLS ({error.reason}); correct the port")
    except OSError as error:
        return failed("TLS", f"{coordinator.superlink} does not answer ({error}); have the firewall let this machine out to it")
    with connection.sock as sock:
        if not isinstance(sock, ssl.SSLSocket):
            return warning("TLS", f"{coordinator.superlink} answers, without encryption: for trials on one machine only")
        certificate = sock.getpeercert()
    assert certificate
    expires = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)
    left = expires - datetime.now(UTC)
    text = f"the certificate of {coordinator.superlink} is good until {expires:%Y-%m-%d}"
    return passed("TLS", text) if left > EXPIRES_SOON else warning("TLS", f"{text}, {left.days} days; tell the coordinator")


def check_clock(coordinator: Coordinator) -> Finding:
    """This machine's clock against the coordinator's: Flower locks a node out whose clock is some seconds fast."""
    try:
        date = _greeting(coordinator)["Date"]
    except (OSError, http.client.HTTPException) as error:
        return failed("clock", f"cannot be compared, the coordinator does not answer ({error}); see above")
    if date is None:
        return warning("clock", "cannot be compared, the coordinator does not tell the time")
    fast_s = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds() - 0.5
    text = f"{abs(fast_s):.0f} s {'ahead of' if fast_s > 0 else 'behind'} the coordinator's"
    if fast_s > FAST_S or fast_s < -SLOW_S:
        return failed("clock", f"{text}: it locks the node out; set it, and let NTP keep it (`timedatectl set-ntp true`)")
    return warning("clock", f"{text}; let NTP keep it") if abs(fast_s) > NOTICEABLE_S else passed("clock", text)


def check_versions(coordinator: Coordinator) -> Finding:
    """What is installed, and whether the coordinator runs the same code, which its proxy says in a header."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("fed-tat", "flwr", "torch"))
    text = f"{packages}, code {code_hash()[:12]}"
    try:
        theirs = _greeting(coordinator)[CODE_HEADER]
    except (OSError, http.client.HTTPException) as error:
        return warning("versions", f"{text}; cannot be compared, the coordinator does not answer ({error}); see above")
    if theirs is None:
        return passed("versions", f"{text}; the coordinator does not say what it runs")
    if theirs == code_hash():
        return passed("versions", f"{text}, as the coordinator")
    text = f"{text}, but the coordinator runs {theirs[:12]}"
    if coordinator.accept_other_code:
        return warning("versions", f"{text}; site.yaml accepts that")
    return failed("versions", f"{text}: this site refuses its rounds; install the consortium's release")


def check_key(coordinator: Coordinator) -> Finding:
    """Whether the coordinator has registered the site's key.

    The node is not activated: a heartbeat interval of 0 is refused, but only after the key was looked up.
    """
    if coordinator.key is None:
        return warning("node key", "none; a coordinator that admits registered sites only will refuse (`tat site enroll`)")
    try:
        private = read_key(coordinator.key)
    except ValueError as error:
        return failed("node key", str(error))
    public = private.public_key()
    certificates = str(coordinator.root_certificates) if coordinator.root_certificates else None
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, public),
    ]
    with FleetHttpClient.from_server_address(coordinator.superlink, False, certificates, interceptors=interceptors) as client:
        try:
            client.ActivateNode(ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0))
        except httpx.HTTPStatusError as error:
            answer = FlowerError.from_json(error.response.text)
            code, status = answer and answer.code, error.response.status_code
        except httpx.TransportError as error:
            return failed("node key", f"cannot be looked up, the coordinator does not answer ({error}); see above")
        else:
            code, status = None, httpx.codes.OK
    if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return passed("node key", "is registered at the coordinator")
    if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return failed("node key", "is not registered; send the coordinator the request that `tat site enroll` wrote")
    if status == httpx.codes.UNAUTHORIZED:
        return failed("node key", "is refused (401); if the clock is right, ask the coordinator whether it was revoked")
    return warning("node key", f"cannot be looked up: the coordinator answers {status}")


def _proxy(coordinator: Coordinator) -> tuple[str, int] | None:
    """Host and port of the proxy that the environment names for the coordinator, as httpx reads it."""
    proxies = getproxies_environment()
    address = proxies.get("http" if coordinator.insecure else "https") or proxies.get("all")
    if not address or proxy_bypass(coordinator.host):
        return None
    parts = urlsplit(address if "//" in address else f"//{address}")
    return (parts.hostname, parts.port or 80) if parts.hostname else None


def _greeting(coordinator: Coordinator) -> Message:
    """The headers with which the coordinator answers whatever it is asked."""
    connection = _connect(coordinator)
    with contextlib.closing(connection):
        connection.request("HEAD", "/")
        return connection.getresponse().headers


def _connect(coordinator: Coordinator) -> http.client.HTTPConnection:
    """A connection as the node makes it: TLS with the consortium's authority, through the proxy if there is one."""
    proxy = _proxy(coordinator)
    host, port = proxy or (coordinator.host, coordinator.port)
    connection: http.client.HTTPConnection
    if coordinator.insecure:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    else:
        context = ssl.create_default_context(cafile=coordinator.root_certificates)
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    if proxy:
        connection.set_tunnel(coordinator.host, coordinator.port)
    connection.connect()
    return connection
