"""Sites behind Flower's own link state: lost, restarted under another number, renamed, twice, or sending what cannot be read.

The test plays the nodes; the book-keeping of messages, leases and replies is Flower's.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from server import grid as grid_module
from server.grid import FlowerSites
from tat_core.blobs import pack
from tat_core.config import RunConfig
from tat_core.packet import Packet, echo

UPDATE = pack({"w": np.full(3, 2.0, np.float32)})
LEASE_S = 1.5  # Flower calls a node offline after two heartbeats


@dataclass
class Node:
    """A node that answers who it is, and replies to its instructions unless told otherwise."""

    state: object
    site: str
    tasks: str = "CT"
    answer: Callable[[Message], RecordDict | Error | None] | None = None
    alive: bool = True  # otherwise it has yet to start
    seen: list[str] = field(default_factory=list)
    node_id: int = 0

    def __post_init__(self) -> None:
        self.node_id = self.state.create_node("", "", secrets.token_bytes(32), LEASE_S / 2)
        if self.alive:
            self.start()

    def start(self) -> None:
        """Get online, under the number that it has."""
        self.alive = self.state.activate_node(self.node_id, LEASE_S / 2)

    def live(self) -> None:
        """Send a heartbeat and work off what has come."""
        self.state.acknowledge_node_heartbeat(self.node_id, LEASE_S / 2)
        for message in self.state.get_message_ins(self.node_id, limit=None):
            kind = message.metadata.message_type
            self.seen.append(kind)
            content = self.introduction() if kind == "query" else (self.answer or self.reply)(message)
            if content is not None:
                reply = Message(content, reply_to=message)
                reply.metadata.__dict__["_message_id"] = secrets.token_hex(8)
                assert self.state.store_message_res(reply) is not None

    def introduction(self) -> RecordDict:
        return RecordDict({"config": ConfigRecord({"site": self.site, "tasks": self.tasks, "patients": "1-10", "torch": "2"})})

    def reply(self, message: Message) -> RecordDict:
        sent = Packet(config=dict(message.content.config_records["config"]))
        return RecordDict(
            {
                "update": ArrayRecord({"shared": Array("uint8", (len(UPDATE),), "packed", UPDATE)}),
                "config": ConfigRecord({"site": self.site, **echo(sent)}),
            }
        )


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> InMemoryGrid:
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    run_id = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
    for name, value in (("run_id", run_id), ("task_id", 1), ("node_id", SUPERLINK_NODE_ID)):
        monkeypatch.setattr(TaskIdentity, f"_{name}", value)
    monkeypatch.setattr(grid_module, "LOOK_SECONDS", 0.1)
    grid = InMemoryGrid(factory)
    grid.set_run(state.get_run_info(run_ids=[run_id])[0])
    return grid


@contextmanager
def living(*nodes: Node) -> Iterator[None]:
    """Let the nodes live beside the test."""
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.02):
            for node in nodes:
                if node.alive:
                    node.live()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def waiting(config: RunConfig) -> RunConfig:
    times = {"num_sites": 2, "wait_timeout_s": 2.0, "rejoin_timeout_s": 4.0}
    return replace(config, federation=replace(config.federation, **times))


INSTRUCTION = Packet({"w": np.ones(3, np.float32)}, {}, {"run": "r", "round": 1, "base": "b", "nonce": "n", "steps": 1})


def _ask(sites: FlowerSites, *names: str, timeout_s: float = 10.0) -> dict[str, Packet]:
    replies = [news for news in sites.ask("train", dict.fromkeys(names, INSTRUCTION), timeout_s) if news is not None]
    assert len({name for name, _ in replies}) == len(replies)
    return dict(replies)


def test_sites_are_asked_who_they_are_and_reply(link: InMemoryGrid, waiting: RunConfig) -> None:
    nodes = Node(link.state, "north"), Node(link.state, "south", tasks="PET,MRI")
    sites = FlowerSites(link, waiting)
    with living(*nodes):
        members = sites.members(waiting)
        assert {name: info.tasks for name, info in members.items()} == {"north": ("CT",), "south": ("MRI", "PET")}
        assert members["north"].says == {"torch": "2"}
        replies = _ask(sites, "north", "south")
        assert sites.members(waiting) == members
    assert all(reply.error is None and reply.config["nonce"] == "n" for reply in replies.values())
    assert replies["north"].arrays["w"].tolist() == [2.0] * 3
    assert [node.seen for node in nodes] == [["query", "train"]] * 2


def test_a_site_that_restarts_under_another_number_is_asked_again_in_the_same_round(
    link: InMemoryGrid, waiting: RunConfig
) -> None:
    before = Node(link.state, "north", answer=lambda _: setattr(before, "alive", False))
    after = Node(link.state, "north", alive=False)
    south = Node(link.state, "south")
    sites = FlowerSites(link, waiting)
    with living(before, after, south):
        sites.members(waiting)
        threading.Timer(0.2, after.start).start()
        replies = _ask(sites, "north", "south")
        assert set(sites.members(waiting)) == {"north", "south"}
    assert replies["north"].error is None
    assert after.seen == ["query", "train"]
    assert south.seen == ["query", "train"]


def test_a_site_that_was_cut_off_is_asked_again_when_it_is_back(link: InMemoryGrid, waiting: RunConfig) -> None:
    """Its number is the same, but Flower has thrown its message away: what it trained meanwhile reaches nobody."""
    attempts = itertools.count()

    def train(message: Message) -> RecordDict | None:
        if next(attempts):
            return north.reply(message)
        north.alive = False
        threading.Timer(2 * LEASE_S, north.start).start()
        return None

    north, south = Node(link.state, "north", answer=train), Node(link.state, "south")
    sites = FlowerSites(link, waiting)
    with living(north, south):
        sites.members(waiting)
        replies = _ask(sites, "north", "south")
    assert set(replies) == {"north", "south"}
    assert north.seen.count("train") == 2


def test_a_site_that_does_not_come_back_holds_the_round_up_for_so_long_only(link: InMemoryGrid, waiting: RunConfig) -> None:
    north = Node(link.state, "north", answer=lambda _: setattr(north, "alive", False))
    south = Node(link.state, "south")
    sites = FlowerSites(link, waiting)
    with living(north, south):
        sites.members(waiting)
        started = time.monotonic()
        assert set(_ask(sites, "north", "south", timeout_s=60.0)) == {"south"}
        assert time.monotonic() - started < 30
        assert set(sites.members(waiting)) == {"south"}


@pytest.mark.parametrize(("crashes", "error"), [(1, None), (9, f"NODE_ERROR_{ErrorCode.CLIENT_APP_CRASHED}")])
def test_a_site_whose_process_crashed_is_asked_once_more(
    link: InMemoryGrid, waiting: RunConfig, crashes: int, error: str | None
) -> None:
    attempts = itertools.count()

    def train(message: Message) -> RecordDict | Error:
        return Error(ErrorCode.CLIENT_APP_CRASHED, "") if next(attempts) < crashes else north.reply(message)

    north, south = Node(link.state, "north", answer=train), Node(link.state, "south")
    sites = FlowerSites(link, waiting)
    with living(north, south):
        sites.members(waiting)
        replies = _ask(sites, "north", "south")
    assert replies["north"].error == error
    assert replies["south"].error is None
    assert north.seen.count("train") == 2


def test_one_of_two_nodes_with_the_same_name_takes_part(
    link: InMemoryGrid, waiting: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = Node(link.state, "north"), Node(link.state, "north")
    sites = FlowerSites(link, waiting)
    with living(*nodes):
        assert set(sites.members(waiting)) == {"north"}
        assert set(_ask(sites, "north")) == {"north"}
        sites.members(waiting)
        assert set(_ask(sites, "north")) == {"north"}
    assert "there is a node for north already" in caplog.text
    assert sorted(node.seen for node in nodes) == [["query"], ["query", "train", "train"]]


def test_a_site_that_was_renamed_is_met_anew(link: InMemoryGrid, waiting: RunConfig) -> None:
    north, south = Node(link.state, "north"), Node(link.state, "south")
    sites = FlowerSites(link, waiting)
    with living(north, south):
        sites.members(waiting)
        north.site = "north-2"
        assert _ask(sites, "north", "south")["north"].error == "RENAMED"
        assert set(sites.members(waiting)) == {"north-2", "south"}


def test_a_site_that_failed_is_asked_anew_what_it_offers(link: InMemoryGrid, waiting: RunConfig) -> None:
    failing = RecordDict({"config": ConfigRecord({"site": "north", "error": "BAD_INPUT"})})
    north, south = Node(link.state, "north", answer=lambda _: failing), Node(link.state, "south")
    sites = FlowerSites(link, waiting)
    with living(north, south):
        sites.members(waiting)
        north.tasks = "CT,MRI"
        assert _ask(sites, "north")["north"].error == "BAD_INPUT"
        assert sites.members(waiting)["north"].tasks == ("CT", "MRI")


@pytest.mark.parametrize("stype", ["numpy.ndarray", "torch.Tensor"])
def test_arrays_that_cannot_be_read_are_a_code(link: InMemoryGrid, waiting: RunConfig, stype: str) -> None:
    broken = Array(dtype="float32", shape=(3,), stype=stype, data=b"not an array")
    content = RecordDict({"update": ArrayRecord({"w": broken}), "config": ConfigRecord({"site": "north"})})
    north = Node(link.state, "north", answer=lambda _: content)
    sites = FlowerSites(link, replace(waiting, federation=replace(waiting.federation, num_sites=1)))
    with living(north):
        sites.members(waiting)
        assert _ask(sites, "north")["north"].error == "UNREADABLE"


def test_a_late_reply_comes_with_the_next_round(link: InMemoryGrid, waiting: RunConfig) -> None:
    kept: list[Message] = []

    def slow(message: Message) -> RecordDict | None:
        kept.append(message)
        return None

    north, south = Node(link.state, "north", answer=slow), Node(link.state, "south")
    sites = FlowerSites(link, waiting)
    with living(north, south):
        sites.members(waiting)
        for news in sites.ask("train", dict.fromkeys(("north", "south"), INSTRUCTION), 10.0):
            if news is not None:
                break  # the round closes without north
        late = Message(north.reply(kept[0]), reply_to=kept[0])
        late.metadata.__dict__["_message_id"] = "late"
        assert link.state.store_message_res(late) is not None
        north.answer = None
        following = replace(INSTRUCTION, config={**INSTRUCTION.config, "nonce": "n2"})
        news = [n for n in sites.ask("train", dict.fromkeys(("north", "south"), following), 10.0) if n is not None]
    assert sorted((name, reply.config["nonce"]) for name, reply in news) == [("north", "n"), ("north", "n2"), ("south", "n2")]
