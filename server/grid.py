"""The hospitals as Flower's grid reaches them: encode, push, pull replies as they arrive, decode; ask again who was lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from server.sites import SiteInfo, read_introduction
from tat_core.blobs import by_owner, pack, unpack
from tat_core.code import code_hash
from tat_core.config import RunConfig
from tat_core.packet import Packet

log = logging.getLogger("fed_tat.server")

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.1, 1.0
LOOK_SECONDS = 10.0  # between two looks for sites that were lost
QUERY_SECONDS = 60.0  # for a node's answer to who it is, while others train
ASK_ANEW_SECONDS = 300.0  # until a node that did not say properly who it is may hold a round up again
# The SuperLink throws a message away when its node misses two heartbeats: what the site then replies reaches nobody.
UNANSWERABLE = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}


class FlowerSites:
    """The sites behind a Flower grid.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        A simulated or a deployed one.
    config : RunConfig
    """

    def __init__(self, grid: Grid, config: RunConfig) -> None:
        self._grid = grid
        self._config = config
        self._known: dict[str, tuple[int, SiteInfo]] = {}  # site → node
        self._doubtful: set[str] = set()  # sites to be asked anew who they are
        self._strangers: dict[int, float] = {}  # node → when it was asked in vain who it is
        self._late: dict[str, str] = {}  # message → site, of the round before, that nobody has answered yet

    def members(self, config: RunConfig) -> dict[str, SiteInfo]:
        """The sites that are there now.

        Before the first round, the expected number is waited for; later, those of the round before are for a while, and when
        nobody is left, for as long as the run's patience lasts. New nodes are asked who they are, and so is a site that failed:
        its file may have changed. One that does not answer properly is asked again next time.

        Raises
        ------
        ValueError
            No site takes part.
        """
        federation = config.federation
        first = not self._known
        patience_s = federation.wait_timeout_s if first else federation.patience_s
        deadline = time.monotonic() + patience_s
        wait_s = federation.wait_timeout_s if first else min(federation.rejoin_timeout_s, patience_s)
        nodes = self._wait_for_nodes(federation.num_sites if first else len(self._known), wait_s)
        while True:
            certain = {name: known for name, known in self._known.items() if known[0] in nodes and name not in self._doubtful}
            self._known, self._doubtful = certain, set()
            self._meet(nodes, federation.wait_timeout_s)
            if self._known or first or time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS)
            nodes = self._wait_for_nodes(1, deadline - time.monotonic())
        if not self._known:
            raise ValueError(
                f"connect: expected {federation.num_sites} sites, got none of {len(nodes)} nodes; see the sites' logs"
            )
        return {name: info for name, (_, info) in sorted(self._known.items())}

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
        """Send each named site its instruction; yield the replies as they arrive, None while there is none.

        A site whose message can no longer be answered, since its node died or was cut off, is asked again when it is back; one
        whose process for the message died is asked once more.
        """
        deadline = time.monotonic() + timeout_s
        there = {name: instructions[name] for name in self._known if name in instructions}
        waiting = self._push(kind, there, timeout_s)
        late = self._late if kind == "train" else {}
        lost = {name: time.monotonic() for name in there if name not in waiting.values()}  # site → when
        crashed: set[str] = set()
        pause, next_look = POLL_SECONDS, time.monotonic()
        try:
            while (now := time.monotonic()) < deadline and (waiting or self._may_return(lost)):
                news = False
                for message, reply in self._pull([*waiting, *late]):
                    is_late = message in late
                    name = late.pop(message) if is_late else waiting.pop(message)
                    first_crash = _has_crashed(reply) and name not in crashed
                    if _is_lost(reply) or first_crash:
                        if not is_late:
                            log.warning("%s was lost; it is asked again when it is back", name)
                            self._known.pop(name, None)
                            lost[name] = now
                            if first_crash:
                                crashed.add(name)
                        continue
                    packet = self._received(name, reply)
                    if name in instructions and not (is_late and packet.error):
                        news = True
                        yield name, packet
                if lost and now >= next_look:
                    self._meet(self._nodes(), QUERY_SECONDS)
                    back = {name: instructions[name] for name in lost if name in self._known}
                    waiting |= self._push(kind, back, max(1.0, deadline - time.monotonic()))
                    lost = {name: when for name, when in lost.items() if name not in waiting.values()}
                    next_look = time.monotonic() + LOOK_SECONDS
                pause = POLL_SECONDS if news else min(1.02 * pause, LONGEST_POLL_SECONDS)
                if not news:
                    yield None
                    time.sleep(pause)
        finally:  # also when the caller stops listening
            if kind == "train":
                self._late = waiting

    def _may_return(self, lost: Mapping[str, float]) -> bool:
        """Whether one of the lost sites is still waited for when all others have replied."""
        return any(time.monotonic() - when < self._config.federation.rejoin_timeout_s for when in lost.values())

    def _received(self, name: str, reply: Message) -> Packet:
        """The reply; one that fails, or calls itself by another name, comes from a site that has to be asked anew who it is."""
        packet = _decode(reply)
        if packet.error is None and packet.config.get("site") != name:
            packet = Packet(config={"error": "RENAMED"})
        if packet.error is not None:
            self._doubtful.add(name)
        return packet

    def _meet(self, nodes: Collection[int], timeout_s: float) -> None:
        """Ask the nodes that are new who they are."""
        now = time.monotonic()
        known = {node for node, _ in self._known.values()}
        may_be_asked = [node for node in nodes if now - self._strangers.get(node, float("-inf")) >= ASK_ANEW_SECONDS]
        new = {str(node): node for node in may_be_asked if node not in known}
        self._strangers |= dict.fromkeys(new.values(), now)
        waiting = self._send("query", {name: (node, Packet()) for name, node in new.items()}, timeout_s)
        deadline = now + timeout_s
        while waiting and time.monotonic() < deadline:
            for message, reply in self._pull(waiting):
                self._introduce(new[waiting.pop(message)], reply)
            time.sleep(POLL_SECONDS)

    def _introduce(self, node: int, reply: Message) -> None:
        try:
            name, info = read_introduction(_decode(reply), self._config)
        except ValueError as fault:
            log.warning("node %d does not take part: %s", node, fault)
            if _is_lost(reply):
                del self._strangers[node]  # it could not have answered
            return
        if name in self._known:
            log.warning("node %d does not take part: there is a node for %s already", node, name)
            return
        self._known[name] = (node, info)
        del self._strangers[node]

    def _wait_for_nodes(self, expected: int, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while len(nodes := self._nodes()) < expected and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if len(nodes) < expected:
            log.warning("%d of %d sites are there after %.0f s", len(nodes), expected, timeout_s)
        return nodes

    def _nodes(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def _push(self, kind: str, packets: Mapping[str, Packet], timeout_s: float) -> dict[str, str]:
        return self._send(kind, {name: (self._known[name][0], packet) for name, packet in packets.items()}, timeout_s)

    def _send(self, kind: str, packets: Mapping[str, tuple[int, Packet]], timeout_s: float) -> dict[str, str]:
        """Push one message a node (Flower needs a list); the messages that the SuperLink took, with the names they go by."""
        packed: dict[tuple[int, ...], Array] = {}
        contents = {id(packet): _encode(packet, packed) for _, packet in packets.values()}
        messages = {
            name: Message(content=contents[id(packet)], dst_node_id=node, message_type=kind, ttl=timeout_s)
            for name, (node, packet) in packets.items()
        }
        taken = set(self._grid.push_messages(list(messages.values()))) if messages else set()
        return {m.metadata.message_id: name for name, m in messages.items() if m.metadata.message_id in taken}

    def _pull(self, messages: Iterable[str]) -> Iterator[tuple[str, Message]]:
        """The replies that are there, one at a time: pulled together they would be in memory together."""
        for message in list(messages):
            for reply in self._grid.pull_messages([message]):
                yield message, reply


def _is_lost(reply: Message) -> bool:
    return reply.has_error() and reply.error.code in UNANSWERABLE


def _has_crashed(reply: Message) -> bool:
    """Whether the ClientApp's process died, which its node notices within a minute; often not the work's fault."""
    return reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_CRASHED


def _encode(packet: Packet, packed: dict[tuple[int, ...], Array]) -> RecordDict:
    """An instruction for Flower; what is in `packed` already, since another site is sent it too, is taken from there."""
    arrays = {}
    for owner, some in by_owner(packet.arrays).items():
        key = tuple(map(id, some.values()))
        if key not in packed:
            blob = pack(some)
            packed[key] = Array("uint8", (len(blob),), "packed", blob)
        arrays[owner] = packed[key]
    return RecordDict({"model": ArrayRecord(arrays), "config": ConfigRecord({**packet.config, "code": code_hash()})})


def _decode(reply: Message) -> Packet:
    if reply.has_error():
        return Packet(config={"error": f"NODE_ERROR_{reply.error.code}"})
    arrays: dict[str, np.ndarray] = {}
    try:
        for record in reply.content.array_records.values():
            for array in record.values():
                arrays |= unpack(array.data)
    except Exception as error:  # whatever bytes a site sends, they must not stop the run
        log.warning("a reply's arrays cannot be read: %s", type(error).__name__)
        return Packet(config={"error": "UNREADABLE"})
    metrics = _scalars(item for record in reply.content.metric_records.values() for item in record.items())
    config = _scalars(item for record in reply.content.config_records.values() for item in record.items())
    return Packet(arrays, metrics, config)  # type: ignore[arg-type]


def _scalars(items: Iterable[tuple[str, object]]) -> dict[str, object]:
    return {key: value for key, value in items if isinstance(value, str | int | float | bool)}
