"""The hospitals as Flower's grid reaches them: encode, push, pull replies as they arrive, decode."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from server.strategy import SiteInfo
from tat_core.config import RunConfig
from tat_core.packet import Packet

log = logging.getLogger("fed_tat.server")

POLL_SECONDS = 0.1


class FlowerSites:
    """The sites behind a Flower grid.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        A simulated or a deployed one.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._node_of: dict[str, int] = {}

    def connect(self, config: RunConfig) -> dict[str, SiteInfo]:
        """Wait for the expected number of nodes, ask each who it is, and keep those that share a task with the run.

        Raises
        ------
        ValueError
            No site takes part.
        """
        nodes = self._wait_for_nodes(config.federation.num_sites, config.federation.wait_timeout_s)
        members: dict[str, SiteInfo] = {}
        for node, reply in self._exchange("query", dict.fromkeys(nodes, Packet()), config.federation.wait_timeout_s):
            name = str(reply.config.get("site", ""))
            tasks = tuple(task for task in str(reply.config.get("tasks", "")).split(",") if task in config.tasks)
            if reply.error is not None or not tasks or name in members:
                reason = reply.error or ("NO_SHARED_TASK" if name not in members else "DUPLICATE_NAME")
                log.warning("node %d (%s) does not take part: %s", node, name or "unnamed", reason)
                continue
            members[name] = SiteInfo(tasks, str(reply.config.get("patients", "")))
            self._node_of[name] = node
        if not members:
            raise ValueError(
                f"connect: expected {config.federation.num_sites} sites, got none of {len(nodes)} nodes; see the sites' logs"
            )
        return dict(sorted(members.items()))

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet]]:
        """Send each named site its instruction; yield the replies as they arrive, until all have come or time is up."""
        name_of = {self._node_of[name]: name for name in instructions}
        packets = {node: instructions[name] for node, name in name_of.items()}
        for node, reply in self._exchange(kind, packets, timeout_s):
            yield name_of[node], reply

    def _wait_for_nodes(self, expected: int, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while len(nodes := sorted(self._grid.get_node_ids())) < expected and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if len(nodes) < expected:
            log.warning("%d of %d sites are there after %.0f s; going on with them", len(nodes), expected, timeout_s)
        return nodes

    def _exchange(self, kind: str, packets: Mapping[int, Packet], timeout_s: float) -> Iterator[tuple[int, Packet]]:
        """Push one message a node (Flower needs a list) and pull until every node has answered or the deadline has passed."""
        contents = {id(packet): _encode(packet) for packet in packets.values()}
        messages = [
            Message(content=contents[id(packet)], dst_node_id=node, message_type=kind, ttl=timeout_s)
            for node, packet in packets.items()
        ]
        waiting = set(self._grid.push_messages(messages)) if messages else set()
        deadline = time.monotonic() + timeout_s
        while waiting and time.monotonic() < deadline:
            replies = list(self._grid.pull_messages(waiting))
            for reply in replies:
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply.metadata.src_node_id, _decode(reply)
            if not replies:
                time.sleep(POLL_SECONDS)


def _encode(packet: Packet) -> RecordDict:
    return RecordDict(
        {
            "model": ArrayRecord({name: Array(value) for name, value in packet.arrays.items()}),
            "config": ConfigRecord(dict(packet.config)),
        }
    )


def _decode(reply: Message) -> Packet:
    if reply.has_error():
        return Packet(config={"error": f"NODE_ERROR_{reply.error.code}"})
    arrays = {name: array.numpy() for record in reply.content.array_records.values() for name, array in record.items()}
    metrics = _scalars(item for record in reply.content.metric_records.values() for item in record.items())
    config = _scalars(item for record in reply.content.config_records.values() for item in record.items())
    return Packet(arrays, metrics, config)  # type: ignore[arg-type]


def _scalars(items: Iterable[tuple[str, object]]) -> dict[str, object]:
    return {key: value for key, value in items if isinstance(value, str | int | float | bool)}
