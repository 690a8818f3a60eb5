"""Between the ClientApp, a process for each message, and the warm trainer, which outlives them: gRPC on a Unix socket.

Only the user who runs both may open the socket: it lies in a folder of that user alone. Nothing here imports torch: a ClientApp
passes the message's bytes on as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

SERVICE, METHOD = "fed_tat.Trainer", "Answer"
FOLDER_VARIABLE = "FED_TAT_TRAINER"
"""The environment variable in which `flower-client` names the socket's folder; unset where there is no trainer."""
SOCKET = "trainer.sock"
CHUNK_BYTES = 1 << 20  # gRPC holds a few at a time, and a message of gRPC's may have 4 MiB
START_SECONDS = 120.0  # until a trainer that is (again) being started answers
ATTEMPTS = 2


@dataclass(frozen=True)
class Parcel:
    """A request to the trainer, or its reply.

    Attributes
    ----------
    header : dict
        Fit for JSON.
    blobs : dict of str to bytes
        A model or an update by owner, as `tat_core.blobs` packs it.
    """

    header: dict[str, Any]
    blobs: dict[str, bytes] = field(default_factory=dict)


class TrainerError(Exception):
    """There is no answer from the trainer; ``code`` may leave the site."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


def ask(folder: Path, request: Parcel, timeout_s: float) -> Parcel:
    """Have the trainer answer a request, once more if it died over it: a round that is repeated repeats exactly.

    Parameters
    ----------
    folder : Path
        Where its socket lies.
    request : Parcel
    timeout_s : float
        After this the answer would reach nobody, and the trainer gives up too.

    Raises
    ------
    TrainerError
        ``TRAINER_ABSENT``, ``TRAINER_DIED``, ``TRAINER_VERSION`` or ``TOO_LATE``.
    """
    for attempt in range(1, ATTEMPTS + 1):
        with reachable(folder) as address, grpc.insecure_channel(address) as channel:
            try:
                grpc.channel_ready_future(channel).result(START_SECONDS)
            except grpc.FutureTimeoutError:
                raise TrainerError("TRAINER_ABSENT", f"no trainer within {START_SECONDS:.0f} s") from None
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")
            try:
                return receive(call(send(request), timeout=timeout_s))
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
            if code is grpc.StatusCode.FAILED_PRECONDITION:
                raise TrainerError("TRAINER_VERSION", str(details))
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TrainerError("TOO_LATE", f"no answer within {timeout_s:.0f} s")
            if attempt == ATTEMPTS:
                raise TrainerError("TRAINER_DIED", f"{code.name}: {details}")
    raise AssertionError("unreachable")


@contextmanager
def reachable(folder: Path) -> Iterator[str]:
    """gRPC's address of the socket in `folder`, by way of a descriptor: the path of a Unix socket may have 107 bytes only.

    Raises
    ------
    ValueError
        Others than this user may enter the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ValueError(f"trainer: expected {folder} to be this user's alone (mode 700), got others; remove the folder")
        yield f"unix:/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


def send(parcel: Parcel) -> Iterator[bytes]:
    """A parcel as the messages of a stream: its header with the sizes of its blobs, then their bytes."""
    sizes = {name: len(blob) for name, blob in parcel.blobs.items()}
    yield json.dumps({"header": parcel.header, "sizes": sizes}).encode()
    for blob in parcel.blobs.values():
        for start in range(0, len(blob), CHUNK_BYTES):
            yield blob[start : start + CHUNK_BYTES]


def receive(stream: Iterable[bytes]) -> Parcel:
    """The inverse of `send`."""
    chunks = iter(stream)
    first = json.loads(next(chunks))
    blobs = {name: _gather(chunks, size) for name, size in first["sizes"].items()}
    for _ in chunks:
        raise AssertionError("more bytes than announced")
    return Parcel(first["header"], blobs)


def _gather(chunks: Iterator[bytes], size: int) -> bytes:
    parts = []
    while size > 0:
        parts.append(next(chunks))
        size -= len(parts[-1])
    return b"".join(parts)
