"""The doctor against coordinators with every fault, over real sockets and certificates: what it sees, and what it says to do."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.servicer.fleet.fleet_handlers import activate_node
from typer.testing import CliRunner

from client import doctor, launcher
from client.coordinator import Coordinator
from client.doctor import check_data, check_device, check_disk, check_ledger, exit_code, look
from client.doctor_network import check_clock, check_dns, check_key, check_proxy, check_tls, check_versions
from client.enroll import read_or_make_key
from client.finding import Finding, failed, passed, warning
from client.ledger import ledger_file
from client.site import load_site
from server.authority import Pair, issue, make_authority
from server.consortium import utc_now
from tat_core.code import CODE_HEADER, code_hash

NOW = utc_now()
AUTHORITY = make_authority("ours", NOW - timedelta(days=200), 3650)
OTHERS = make_authority("another's", NOW, 3650)


@dataclass
class _Behaviour:
    """What a coordinator does."""

    fast_s: float = 0.0
    code: str | None = None
    registered: bytes | None = None
    status: int | None = None


class _Answers(BaseHTTPRequestHandler):
    behaviour = _Behaviour()

    def do_HEAD(self) -> None:
        self._reply(403, b"")

    def do_POST(self) -> None:
        """Flower's own handler answers, over a state that has one registered node at most and lets none be activated."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        state = SimpleNamespace(get_node_id_by_public_key=lambda key: 7 if key == self.behaviour.registered else None)
        if self.behaviour.status:
            return self._reply(self.behaviour.status, b"")
        with pytest.raises(FlowerError) as refused:
            activate_node(ActivateNodeRequest.FromString(body), state)  # type: ignore[arg-type]
        return self._reply(400, json.dumps(refused.value.to_json("refused")).encode())

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(NOW.timestamp() + self.behaviour.fast_s, usegmt=True)

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if self.behaviour.code:
            self.send_header(CODE_HEADER, self.behaviour.code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Refused handshakes are what is tested."""


@contextmanager
def _coordinator(folder: Path, pair: Pair | None, behaviour: _Behaviour | None = None) -> Iterator[Coordinator]:
    """A server with this certificate (None: without TLS), as a hospital that trusts `AUTHORITY` would name it."""
    server = _Quiet(("127.0.0.1", 0), type("Answers", (_Answers,), {"behaviour": behaviour or _Behaviour()}))
    if pair:
        (folder / "server.pem").write_bytes(pair.key_pem() + pair.certificate_pem())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    (folder / "ca.pem").write_bytes(AUTHORITY.certificate_pem())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield Coordinator(f"127.0.0.1:{server.server_port}", root_certificates=folder / "ca.pem")
    finally:
        server.shutdown()
        server.server_close()


def _certificate(authority: Pair = AUTHORITY, name: str = "127.0.0.1", days: float = 90, ago: float = 0) -> Pair:
    return issue(authority, [name], NOW - timedelta(days=ago), days)


def _nobody() -> Coordinator:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Coordinator(f"127.0.0.1:{free.getsockname()[1]}", insecure=True)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def _says(finding: Finding, level: str, *words: str) -> None:
    assert finding.level == level, finding
    assert [word for word in words if word not in finding.text] == [], finding


@pytest.mark.parametrize(
    ("pair", "level", "words"),
    [
        (_certificate(), "passed", "is good until"),
        (_certificate(days=9.5), "warning", "9 days; tell the coordinator"),
        (_certificate(days=90, ago=100), "failed", "has expired; the coordinator must renew it"),
        (_certificate(ago=-100), "failed", "is not valid yet; set this machine's clock"),
        (_certificate(OTHERS), "failed", "comes from another authority than the CA file"),
        (_certificate(name="127.0.0.2"), "failed", "is for another address; correct coordinator.superlink"),
        (None, "failed", "does not speak TLS"),
    ],
)
def test_tls(tmp_path: Path, pair: Pair | None, level: str, words: str) -> None:
    with _coordinator(tmp_path, pair) as coordinator:
        _says(check_tls(coordinator), level, words)


def test_tls_where_nobody_listens_or_nothing_is_encrypted(tmp_path: Path) -> None:
    _says(check_tls(_nobody()), "failed", "does not answer", "have the firewall let this machine out")
    with _coordinator(tmp_path, None) as coordinator:
        _says(check_tls(Coordinator(coordinator.superlink, insecure=True)), "warning", "without encryption")


@pytest.mark.parametrize(
    ("coordinators_fast_s", "level", "words"),
    [(0, "passed", "the coordinator's"), (-10, "failed", "ahead of"), (-600, "failed", "set-ntp"), (600, "failed", "behind")],
)
def test_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coordinators_fast_s: float, level: str, words: str) -> None:
    behaviour = _Behaviour(fast_s=coordinators_fast_s + (utc_now() - NOW).total_seconds())
    with _coordinator(tmp_path, _certificate(), behaviour) as coordinator:
        _says(check_clock(coordinator), level, words)


def test_clock_when_nobody_answers() -> None:
    _says(check_clock(_nobody()), "failed", "cannot be compared")


@pytest.mark.parametrize(
    ("theirs", "accepts", "level", "words"),
    [
        (code_hash(), False, "passed", "as the coordinator"),
        (None, False, "passed", "does not say"),
        ("f" * 64, False, "failed", "install the consortium's release"),
        ("f" * 64, True, "warning", "site.yaml accepts that"),
    ],
)
def test_versions(tmp_path: Path, theirs: str | None, accepts: bool, level: str, words: str) -> None:
    with _coordinator(tmp_path, _certificate(), _Behaviour(code=theirs)) as coordinator:
        _says(check_versions(replace(coordinator, accept_other_code=accepts)), level, words, "flwr ", code_hash()[:12])


def test_the_key_by_flowers_own_handler(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    public = public_key_to_bytes(read_or_make_key(path).public_key())
    for behaviour, level, words in (
        (_Behaviour(registered=public), "passed", "is registered"),
        (_Behaviour(), "failed", "is not registered; send the coordinator the request"),
        (_Behaviour(status=401), "failed", "is refused (401)"),
        (_Behaviour(status=502), "warning", "the coordinator answers 502"),
    ):
        with _coordinator(tmp_path, _certificate(), behaviour) as coordinator:
            _says(check_key(replace(coordinator, key=path)), level, words)
    _says(check_key(replace(coordinator, key=path)), "failed", "the coordinator does not answer")


def test_keys_that_cannot_be_used(tmp_path: Path) -> None:
    there = Coordinator("127.0.0.1:1")
    _says(check_key(there), "warning", "tat site enroll")
    path = tmp_path / "node.key"
    read_or_make_key(path)
    path.chmod(0o644)
    _says(check_key(replace(there, key=path)), "failed", "chmod 600")
    pem = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem)
    path.chmod(0o600)
    _says(check_key(replace(there, key=path)), "failed", "move that file away and run `tat site enroll`")


def test_name() -> None:
    _says(check_dns(Coordinator("localhost:1")), "passed", "127.0.0.1")
    _says(check_dns(Coordinator("no-such-host.invalid:1")), "failed", "correct coordinator.superlink, or ask your IT")


def test_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Coordinator("coordinator.invalid:8443")
    _says(check_proxy(there), "passed", "none")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@127.0.0.1:1")
    finding = check_proxy(there)
    _says(finding, "warning", "127.0.0.1:1 is between", "NO_PROXY")
    assert "secret" not in finding.text
    _says(check_dns(there), "warning", "the proxy has to know it")
    _says(check_tls(there), "failed", "does not answer")
    monkeypatch.setenv("NO_PROXY", "coordinator.invalid")
    _says(check_proxy(there), "passed", "none")


@pytest.mark.parametrize(("free_gb", "level"), [(100, "passed"), (5, "warning"), (0.5, "failed")])
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gb: float, level: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gb * 1e9))
    _says(check_disk(tmp_path / "not" / "yet"), level, f"{free_gb:.1f} GB are free")


def test_device() -> None:
    _says(check_device("cpu"), "passed", "cpu")
    _says(check_device("cuda:99"), "failed", "write device: cpu into site.yaml")


def test_data(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    (folder,) = load_site(smoke_hospitals[0] / "site.yaml").data.values()
    _says(check_data("CT", folder), "passed", "to train on", "to validate on")
    _says(check_data("MRI", folder), "failed", "the folder holds CT; correct data in site.yaml")
    _says(check_data("CT", tmp_path), "failed", "expected")


def test_ledger(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    site = replace(load_site(smoke_hospitals[0] / "site.yaml"), state_dir=tmp_path)
    _says(check_ledger(site), "passed", "0 rounds are charged")
    ledger_file(site).write_bytes(b"no ledger, at all" * 100)
    _says(check_ledger(site), "failed")


def test_a_check_that_breaks_hides_no_other(smoke_hospitals: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> Finding:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "check_disk", broken)
    found = {finding.check: finding for finding in look(load_site(smoke_hospitals[0] / "site.yaml"), _nobody())}
    _says(found["disk"], "failed", "the check broke: ZeroDivisionError")
    assert found["data CT"].level == "passed"


def test_the_worst_finding_decides_the_exit_code() -> None:
    good, fair, bad = passed("a", ""), warning("b", ""), failed("c", "")
    assert [exit_code(found) for found in ([good, good], [good, fair], [bad, fair, good])] == [0, 1, 2]


@pytest.fixture
def site_file(smoke_hospitals: list[Path], tmp_path: Path) -> Path:
    content = yaml.safe_load((smoke_hospitals[0] / "site.yaml").read_text())
    data = {task: str(path) for task, path in load_site(smoke_hospitals[0] / "site.yaml").data.items()}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(content | {"data": data, "state_dir": "state"}))
    return tmp_path / "site.yaml"


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command(site_file: Path, as_json: bool) -> None:
    behaviour = _Behaviour(registered=public_key_to_bytes(read_or_make_key(site_file.parent / "state" / "node.key").public_key()))
    behaviour.fast_s = (utc_now() - NOW).total_seconds()
    run: Callable[..., object] = CliRunner().invoke
    with _coordinator(site_file.parent, _certificate(), behaviour) as there:
        arguments = [f"--site={site_file}", f"--superlink={there.superlink}", f"--root-certificates={there.root_certificates}"]
        good = run(launcher.app, ["doctor", *arguments, *(["--json"] if as_json else [])])
    bad = run(launcher.app, ["doctor", *arguments, *(["--json"] if as_json else [])])
    checks = ["name", "proxy", "TLS", "clock", "node key", "disk", "device", "data CT", "ledger", "versions"]
    if as_json:
        found = json.loads(good.stdout)  # type: ignore[attr-defined]
        assert list(found) == checks
        assert {check for check, entry in found.items() if entry["level"] != "passed"} <= {"disk"}
    else:
        lines = good.stdout.splitlines()  # type: ignore[attr-defined]
        assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == checks
    assert good.exit_code in {0, 1}  # type: ignore[attr-defined]  # little disk is a warning
    assert bad.exit_code == 2  # type: ignore[attr-defined]


def test_it_is_quick_since_it_looks_before_every_start() -> None:
    heavy = "import sys, client.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0, "the doctor imports torch"
