"""Bad days: hospitals on their own addresses behind links of 30 Mbit/s, one mishap a test, and what becomes of the model.

Every test ends with rows for docs/reliability.md, written at once:
``FED_TAT_WRITE_TABLE=1 python -m pytest -m slow tests/integration/test_network.py``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from consortium import Consortium, hashes, tat
from network import COORDINATOR_ADDRESS, Network, network, reason_to_skip

from server.strategy import run
from simulations.inprocess import LocalSites
from simulations.processes import no_process_left
from tat_core.config import RunConfig, load_config
from tat_core.files import write_file
from tat_core.packet import Packet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip())),
]

TABLE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = "| mishap | expected | seen | seconds |"
START = "<!-- written by tests/integration/test_network.py -->\n"
# A round that a hospital missed must not show in its next one, so that the same rounds can be computed again without Flower.
FRESH = "train.keep_optimiser=false"


class Day:
    """A consortium on its network, and the hospitals' folders that it was made of."""

    def __init__(self, consortium: Consortium, net: Network, hospitals: list[Path]) -> None:
        self.consortium, self.net, self.hospitals = consortium, net, hospitals
        self._started = time.monotonic()

    def wait_for_round(self, number: int) -> None:
        """Wait until a round is on record."""
        self.consortium.wait_for(lambda: len(self.consortium.records()) >= number, 240, f"round {number}")

    def wait_for_log(self, who: str, text: str) -> None:
        """Wait until a process has printed something."""
        self.consortium.wait_for(lambda: text in self.consortium.log_of(who), 240, f"{who} says {text!r}")

    def end(self, mishap: str, expected: str) -> None:
        """The run ends well, in the bits of a simulation in which the same hospitals answered in each round; a row says so."""
        deployed = self.consortium.wait_for_end(400)
        records = self.consortium.records()
        config = load_config("smoke", [*self.consortium.overrides])
        absent = {
            (record["round"], name)
            for record in records
            for name in (path.name for path in self.hospitals)
            if record["sites"].get(name, {}).get("status") != "ok"
        }
        run(config, Absentees(self.hospitals, config, absent), self.consortium.folder / "simulated")
        assert deployed == hashes(self.consortium.folder / "simulated"), self.consortium.logs()
        missed = ", ".join(f"{name} in round {number}" for number, name in sorted(absent))
        seen = f"{len(records)} of {config.num_rounds} rounds; missed: {missed or 'nobody'}; the bits of the simulation"
        self.row(mishap, expected, seen)

    def row(self, mishap: str, expected: str, seen: str) -> None:
        """A row of the table; every assertion before it has held."""
        if os.environ.get("FED_TAT_WRITE_TABLE"):
            write_row(mishap, expected, seen, f"{time.monotonic() - self._started:.0f}")


class Absentees(LocalSites):
    """The simulation, with hospitals that do not answer in some rounds."""

    def __init__(self, folders: list[Path], config: RunConfig, absent: set[tuple[int, str]]) -> None:
        super().__init__(folders, config)
        self._absent = absent

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
        there = {
            name: packet
            for name, packet in instructions.items()
            if kind != "train" or (packet.config["round"], name) not in self._absent
        }
        return super().ask(kind, there, timeout_s)


def write_row(*row: str) -> None:
    """Replace the mishap's row; the others stay."""
    text, _, before = TABLE.read_text().partition(START)
    rows = {line.split(" | ")[0]: line for line in before.splitlines() if line.startswith("| ")}
    rows[f"| {row[0]}"] = f"| {' | '.join(row)} |"
    rows.pop(HEAD.split(" | ")[0], None)
    TABLE.write_text(f"{text}{START}\n" + "\n".join([HEAD, "|---|---|---|---|", *(rows[key] for key in sorted(rows))]) + "\n")


@pytest.fixture
def begin(smoke_hospitals: list[Path], tmp_path: Path) -> Iterator[Callable[..., Day]]:
    """Make a consortium of three hospitals; more may be on the network."""
    with contextlib.ExitStack() as stack:

        def make(*overrides: str, also: tuple[str, ...] = ()) -> Day:
            hospitals = [smoke_hospitals[number] for number in (0, 2, 4)]
            net = stack.enter_context(network([*(path.name for path in hospitals), *also]))
            stack.enter_context(no_process_left())
            consortium = Consortium(tmp_path, hospitals, [FRESH, *overrides], COORDINATOR_ADDRESS, net.inside)
            return Day(consortium, net, hospitals)

        yield make


def test_the_run_killed(begin: Callable[..., Day]) -> None:
    day = begin("num_rounds=4")
    day.consortium.start()
    day.wait_for_round(2)
    (victim, *_) = day.consortium.find("coordinator", "flwr-serverapp")
    victim.kill()
    day.end("ServerApp killed after round 2", "the run is submitted again and goes on; nothing is lost")
    assert "the run ended after round" in day.consortium.log_of("coordinator")


def test_the_superlink_killed(begin: Callable[..., Day]) -> None:
    day = begin("num_rounds=4")
    day.consortium.start()
    day.wait_for_round(2)
    (victim, *_) = day.consortium.find("coordinator", "flower-superlink")
    victim.kill()
    day.end("SuperLink killed after round 2", "it starts again on its database, the run goes on; nothing is lost")
    assert "superlink ended with code -9" in day.consortium.log_of("coordinator")


def test_a_hospitals_message_process_killed(begin: Callable[..., Day]) -> None:
    """Flower's process of one message, and with it the trainer's work for it."""
    day = begin("num_rounds=3")
    day.consortium.start()
    day.wait_for_log("mri-pd", "Receiving: train message")

    def children() -> list[psutil.Process]:
        processes = day.consortium.find("mri-pd", "client.node clientapps")
        return [process for process in processes if process.ppid() in {other.pid for other in processes}]

    day.consortium.wait_for(lambda: bool(children()), 60, "a message's process")
    for victim in children():
        victim.kill()
    day.end("ClientApp killed in round 1", "the message is taken up again; nothing is lost")


def test_a_hospitals_node_killed(begin: Callable[..., Day]) -> None:
    day = begin("num_rounds=4")
    day.consortium.start()
    day.wait_for_round(1)
    (victim, *_) = day.consortium.find("mri-pd", "supernode")
    victim.kill()
    day.end("SuperNode killed after round 1", "it starts again within two minutes; at most its rounds in between are missed")


def test_a_link_down_for_90_seconds(begin: Callable[..., Day]) -> None:
    day = begin("num_rounds=4")
    day.consortium.start()
    day.wait_for_round(1)
    day.net.set_link("mri-pd", "down")
    time.sleep(90)
    day.net.set_link("mri-pd", "up")
    day.end("a hospital's link down for 90 s after round 1", "at most that hospital's rounds in between are missed")


def test_a_hospitals_disk_full(begin: Callable[..., Day]) -> None:
    day = begin("num_rounds=2")
    state = day.consortium.sites["mri-pd"].parent / "state"
    key = (state / "node.key").read_bytes()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(state)], check=True)
    try:
        (state / "node.key").write_bytes(key)
        (state / "node.key").chmod(0o600)
        day.consortium.start()
        day.wait_for_log("mri-pd", "Receiving: query message")
        with contextlib.suppress(OSError), open(state / "ballast", "wb") as ballast:
            while True:
                ballast.write(bytes(2**16))
        day.end("a hospital's disk full", "that hospital is left out; the others go on")
    finally:
        day.consortium.stop()
        subprocess.run(["umount", "-l", str(state)], check=True)


def test_expired_certificate(begin: Callable[..., Day]) -> None:
    day = begin()
    tat("provision", "rotate", "--folder", day.consortium.coordinator, "--days", "0")
    day.consortium.start()
    day.wait_for_log("mri-pd", "certificate")
    warned = day.consortium.log_of("coordinator")
    assert "EXPIRED" in warned
    tat("provision", "rotate", "--folder", day.consortium.coordinator)
    day.end("the coordinator's certificate expired", "nobody connects until `tat provision rotate`; then all do by themselves")


def test_who_may_not_connect(begin: Callable[..., Day], smoke_hospitals: list[Path], tmp_path: Path) -> None:
    """A key that nobody approved, another authority, a clock 10 s fast, a key used twice: all in one run, which is unharmed."""
    stranger, misled, fast = (smoke_hospitals[number] for number in (1, 3, 5))
    day = begin("num_rounds=3", also=(stranger.name, misled.name, fast.name, "double"))
    consortium = day.consortium
    consortium.start()
    day.wait_for_log("coordinator", "hospitals may connect")
    consortium.enroll(consortium.new_site(stranger))
    consortium.admit(misled)
    consortium.admit(fast)
    tat("provision", "init", "--folder", tmp_path / "elsewhere", "--name", COORDINATOR_ADDRESS)
    consortium.start_site(stranger.name)
    consortium.start_site(misled.name, authority=tmp_path / "elsewhere" / "authority" / "ca.pem")
    consortium.start_site(fast.name, prefix=["faketime", "-f", "+10s"])
    double = consortium.new_site(day.hospitals[1], name="double")
    double.parent.joinpath("state").mkdir()
    key = consortium.sites[day.hospitals[1].name].parent / "state" / "node.key"
    write_file(double.parent / "state" / "node.key", key.read_bytes(), mode=0o600)
    consortium.start_site("double")
    day.end("a hospital's key used by a second node as well", "the first is served, the run is not disturbed")
    proxy = (consortium.coordinator / "proxy" / "access.log").read_text()
    kept_out = {name: day.net.address(name) for name in (stranger.name, misled.name, fast.name)}
    answers = {name: {line.split()[5] for line in proxy.splitlines() if line.split()[1] == ip} for name, ip in kept_out.items()}
    assert "200" not in set().union(*answers.values()), answers
    for who, said in (
        (stranger.name, "node key: is not registered"),
        (misled.name, "TLS: the certificate"),
        (fast.name, "clock: "),
    ):
        assert f"FAILED  {said}" in consortium.log_of(who), consortium.log_of(who)[-3000:]
    for name, mishap, expected in (
        (stranger.name, "a key that nobody approved", "refused"),
        (misled.name, "the wrong authority's certificate at a hospital", "the hospital does not connect"),
        (fast.name, "a hospital's clock 10 s fast", "refused"),
    ):
        day.row(mishap, expected, f"HTTP {', '.join(sorted(answers[name])) or '-: no request'}; the run not disturbed")


def test_nothing_but_fleet_paths_from_outside(begin: Callable[..., Day]) -> None:
    day = begin("num_rounds=1")
    day.consortium.start_coordinator()
    day.wait_for_log("coordinator", "hospitals may connect")
    url = f"https://{day.consortium.address}/v1/control/list-runs"
    authority = day.consortium.coordinator / "authority" / "ca.pem"
    curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", str(authority), "-X", "POST", url]
    done = subprocess.run([*day.net.inside("mri-pd"), *curl], capture_output=True, text=True, check=False)
    assert done.stdout == "403"
    direct = f"https://{COORDINATOR_ADDRESS}:{day.consortium.superlink_port}/"
    reached = subprocess.run([*day.net.inside("mri-pd"), "curl", "-sk", direct], capture_output=True, check=False)
    assert reached.returncode == 7, "the SuperLink's own port must be closed from outside"
    day.row("the Control API from a hospital's network", "403; SuperLink's own port closed", "403; connection refused")
    assert day.consortium.stop() == {"coordinator": 0}


def test_two_of_three_hospitals_gone_for_two_rounds(begin: Callable[..., Day]) -> None:
    day = begin("num_rounds=6", "federation.quorum_per_task=0")
    day.consortium.start()
    day.wait_for_round(1)
    gone = ("ct-abdomen", "pet-brain")
    for name in gone:
        day.consortium.processes[name].send_signal(signal.SIGTERM)
    day.wait_for_round(len(day.consortium.records()) + 2)
    for name in gone:
        day.consortium.start_site(name)
    day.end("two of three hospitals gone for two rounds", "the rounds go on without them; they come back by themselves")
