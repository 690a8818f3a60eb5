"""The warm trainer: a process of `flower-client` that outlives messages, so that torch, CUDA and caches are paid for once.

    python -m client.trainer SITE_FILE SOCKET_FOLDER

It runs nothing but the installed code, one request at a time. When whoever asked is gone or its time is up, the work is worth
nothing: the process ends, in mid-step, and `flower-client` starts another. What it keeps on disk is written atomically, so the
next one repeats the round exactly.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import torch

from client.answer import answer
from client.site import load_site
from client.supervise import is_orphan
from client.wire import METHOD, SERVICE, SOCKET, Parcel, reachable, receive, send
from tat_core.code import code_hash

log = logging.getLogger("fed_tat.trainer")

ABANDONED = 75
"""Exit status after a request that was given up."""


def serve(site_file: Path, folder: Path) -> grpc.Server:
    """Listen on a socket in `folder`, which is made so that no other user may enter it.

    Raises
    ------
    ValueError
        The folder is another user's, or the socket cannot be opened.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = code_hash()  # of what was imported above, whatever is installed later

    def respond(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        done = threading.Event()
        context.add_callback(lambda: None if done.is_set() else _give_up())
        request = receive(messages)
        if request.header["code"] != own:
            done.set()
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another version was installed; restart flower-client")
        reply: Parcel = answer(site_file, request)
        done.set()
        yield from send(reply)

    # One thread: a second request waits until the first is answered.
    server = grpc.server(ThreadPoolExecutor(1))
    methods = {METHOD: grpc.stream_stream_rpc_method_handler(respond)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    with reachable(folder) as address:
        before = os.umask(0o177)
        try:
            server.add_insecure_port(address)
        finally:
            os.umask(before)
    assert (folder / SOCKET).stat().st_mode & 0o077 == 0, "others may open the socket"
    server.start()
    return server


def _give_up() -> None:
    log.warning("whoever asked is gone; the work is given up")
    logging.shutdown()
    os._exit(ABANDONED)


def main() -> None:
    """Serve until killed, or until `flower-client` is gone."""
    site_file, folder = map(Path, sys.argv[1:])
    device = load_site(site_file).device
    if device != "cpu":
        torch.zeros(1, device=device)  # the start of CUDA, before the first message
    server = serve(site_file, folder)
    while server.wait_for_termination(1.0) and not is_orphan():  # true when the time is up
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
