"""The hospitals as Flower's grid reaches them: encode, push, pull replies as they arrive, decode."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from server.sites import SiteInfo
from tat_core.blobs import by_owner, pack, unpack
from tat_core.code import code_hash
from tat_core.config import RunConfig
from tat_core.packet import Packet

log = logging.getLogger("fed_tat.server")

POLL_SECONDS = 0.1
SITE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it becomes the name of a file


class FlowerSites:
    """The sites behind a Flower grid.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        A simulated or a deployed one.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._known: dict[int, tuple[str, SiteInfo]] = {}
        self._late: set[str] = set()  # messages of the round before that nobody has answered yet

    def members(self, config: RunConfig) -> dict[str, SiteInfo]:
        """The sites that are there now; before the first round, wait for the expected number of them.

        New nodes are asked who they are. One that does not answer properly is asked again next time.

        Raises
        ------
        ValueError
            No site takes part.
        """
        federation = config.federation
        nodes = self._wait_for_nodes(1 if self._known else federation.num_sites, federation.wait_timeout_s)
        self._known = {node: known for node, known in self._known.items() if node in nodes}
        new = dict.fromkeys((node for node in nodes if node not in self._known), Packet())
        for news in self._exchange("query", new, federation.wait_timeout_s):
            if news is not None:
                self._introduce(*news, config)
        if not self._known:
            raise ValueError(
                f"connect: expected {federation.num_sites} sites, got none of {len(nodes)} nodes; see the sites' logs"
            )
        return dict(sorted(self._known.values()))

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
        """Send each named site its instruction; yield the replies as they arrive, None while there is none."""
        name_of = {node: name for node, (name, _) in self._known.items() if name in instructions}
        packets = {node: instructions[name] for node, name in name_of.items()}
        for news in self._exchange(kind, packets, timeout_s):
            if news is None or news[0] in name_of:
                yield None if news is None else (name_of[news[0]], news[1])

    def _introduce(self, node: int, reply: Packet, config: RunConfig) -> None:
        name = str(reply.config.get("site", ""))
        tasks = tuple(task for task in config.tasks if task in str(reply.config.get("tasks", "")).split(","))
        fault = reply.error
        if fault is None and (not SITE_NAME.fullmatch(name) or name in {known for known, _ in self._known.values()}):
            fault = "WRONG_NAME"
        if fault is None and not tasks:
            fault = "NO_SHARED_TASK"
        if fault is None:
            self._known[node] = (name, SiteInfo(tasks, str(reply.config.get("patients", ""))))
        else:
            log.warning("node %d does not take part: %s", node, fault)

    def _wait_for_nodes(self, expected: int, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while len(nodes := sorted(self._grid.get_node_ids())) < expected and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if len(nodes) < expected:
            log.warning("%d of %d sites are there after %.0f s; going on with them", len(nodes), expected, timeout_s)
        return nodes

    def _exchange(self, kind: str, packets: Mapping[int, Packet], timeout_s: float) -> Iterator[tuple[int, Packet] | None]:
        """Push one message a node (Flower needs a list) and pull until every node has answered or the time is up."""
        packed: dict[tuple[int, ...], Array] = {}
        contents = {id(packet): _encode(packet, packed) for packet in packets.values()}
        messages = [
            Message(content=contents[id(packet)], dst_node_id=node, message_type=kind, ttl=timeout_s)
            for node, packet in packets.items()
        ]
        waiting = set(self._grid.push_messages(messages)) if messages else set()
        late = self._late if kind == "train" else set()
        deadline = time.monotonic() + timeout_s
        try:
            while waiting and time.monotonic() < deadline:
                replies = list(self._grid.pull_messages(waiting | late))
                for reply in replies:
                    waiting.discard(reply.metadata.reply_to_message_id)
                    late.discard(reply.metadata.reply_to_message_id)
                    yield reply.metadata.src_node_id, _decode(reply)
                if not replies:
                    yield None
                    time.sleep(POLL_SECONDS)
        finally:  # also when the caller stops listening
            if kind == "train":
                self._late = waiting


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
    except ValueError:  # whatever bytes a site sends, they must not stop the run
        return Packet(config={"error": "UNREADABLE"})
    metrics = _scalars(item for record in reply.content.metric_records.values() for item in record.items())
    config = _scalars(item for record in reply.content.config_records.values() for item in record.items())
    return Packet(arrays, metrics, config)  # type: ignore[arg-type]


def _scalars(items: Iterable[tuple[str, object]]) -> dict[str, object]:
    return {key: value for key, value in items if isinstance(value, str | int | float | bool)}
