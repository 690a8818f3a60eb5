"""Flower's two processes at a hospital, without their waiting: they are slow to look and start a new Python for each message.

    python -m client.node supernode <arguments of flower-supernode> --isolation process
    python -m client.node clientapps HOST:PORT

The first is Flower's SuperNode, which looks for messages as often as it is worth while instead of every 3 s. The second takes
the place of its SuperExec: it has imported Flower and forks a process for each message, so that each message still has a process
of its own, which may die without harm. Both rest on internals of the Flower version that pyproject.toml pins;
tests/client/test_node.py notices when they move.
"""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode
from flwr.supernode.runtime.run_clientapp import run_clientapp

from client.supervise import PARENT_VARIABLE, is_orphan
from tat_core.flower_waits import wait_less

SHORTEST_S, SHARE = 0.1, 0.1
WHILE_WORKING_S = 0.5  # what the SuperNode sleeps between two looks whether the ClientApp has replied
ABSENT_S = 0.2


class Pace:
    """How long to wait before looking again: a share of the time since something last happened.

    So a short round is not held up, and a node that has nothing to do asks as seldom as Flower's own.
    """

    def __init__(self) -> None:
        self._since = time.monotonic()

    def happened(self) -> None:
        """Start anew: something happened just now."""
        self._since = time.monotonic()

    def wait(self, longest_s: float) -> None:
        """Sleep, at most as long as Flower would."""
        time.sleep(min(max(SHORTEST_S, SHARE * (time.monotonic() - self._since)), longest_s))


def supernode() -> None:
    """Run Flower's SuperNode until told to stop or `flower-client` is gone; its loop knows `time` by `sleep` alone."""
    pace = Pace()

    def sleep(seconds: float) -> None:
        if seconds <= WHILE_WORKING_S:
            pace.happened()
            time.sleep(SHORTEST_S / 2)
        else:
            pace.wait(seconds)

    start_parent_process_monitor(int(os.environ.get(PARENT_VARIABLE, os.getppid())))
    start_client_internal.time = SimpleNamespace(sleep=sleep)  # type: ignore[assignment]
    sys.argv[0] = "flower-supernode"
    flower_supernode()


def clientapps(address: str) -> None:
    """Take the SuperNode's tasks and run each in a process of its own, until `flower-client` is gone.

    As in Flower, a task does not wait for the one before: the process of a message whose run has ended may wait for ever.
    """
    children: set[int] = set()
    client = RuntimeHttpClient.from_server_address(
        address, insecure=True, root_certificates=None, interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")]
    )
    pace = Pace()
    while not is_orphan():
        children = {child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)}
        try:
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except httpx.TransportError:  # the SuperNode is not up yet
            time.sleep(ABSENT_S)
            continue
        if answer.HasField("task") and answer.token:
            child = os.fork()
            if child == 0:
                _run_in_child(address, answer.token)
            children.add(child)
            pace.happened()
        pace.wait(1.0)


def _run_in_child(address: str, token: str) -> None:
    """Run Flower's ClientApp process, and end without returning into the loop of the parent."""
    code = 1
    try:
        sys.argv[:] = ["flwr-clientapp"]
        run_clientapp(runtime_api_address=address, token=token, insecure=True, parent_pid=os.getppid())
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Run one of the two."""
    wait_less(pull_objects, pull_and_inflate_object_from_tree)
    role = sys.argv.pop(1)
    if role == "supernode":
        supernode()
    else:
        clientapps(sys.argv[1])


if __name__ == "__main__":
    main()
