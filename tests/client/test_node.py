"""Flower's two processes at a hospital: what they rest on in Flower is still there, and no message holds up another."""

from __future__ import annotations

import ast
import inspect
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskResponse, SendTaskHeartbeatResponse
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode import start_client_internal
from flwr.supernode.runtime.run_clientapp import run_clientapp

from client import node

WAIT_S = 60.0  # generous: a busy machine takes long to start a Python


def test_the_supernode_knows_time_by_sleep_alone_and_sleeps_as_expected() -> None:
    """What is put in the place of its `time` has `sleep` only, and tells its two kinds of waiting apart by their length."""
    calls = []
    for item in ast.walk(ast.parse(inspect.getsource(start_client_internal))):
        if isinstance(item, ast.Attribute) and isinstance(item.value, ast.Name) and item.value.id == "time":
            assert item.attr == "sleep"
        if isinstance(item, ast.Call) and ast.unparse(item.func) == "time.sleep":
            calls.append(ast.literal_eval(item.args[0]))
    assert sorted(calls) == [node.WHILE_WORKING_S, node.WHILE_WORKING_S, 3]


def test_flower_takes_the_arguments_that_it_is_given() -> None:
    inspect.signature(run_clientapp).bind(runtime_api_address="", token="", insecure=True, parent_pid=1)
    inspect.signature(start_parent_process_monitor).bind(1)


def test_pauses_grow_with_the_wait_up_to_flowers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [1000.0], []
    monkeypatch.setattr(node, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append))
    pace = node.Pace()
    for seconds_later in (0.0, 0.5, 10.0, 3600.0):
        now[0] = 1000.0 + seconds_later
        pace.wait(3.0)
    pace.happened()
    pace.wait(3.0)
    assert slept == pytest.approx([node.SHORTEST_S, node.SHORTEST_S, 1.0, 3.0, node.SHORTEST_S])


class _Runtime(ThreadingHTTPServer):
    """A SuperNode's Runtime API that hands out some tasks and never answers the processes that it hands them to."""

    daemon_threads = True

    def __init__(self, tasks: int) -> None:
        self.tokens = [f"token-{number}" for number in range(tasks)]
        self.looks, self.pulling, self.end = 0, 0, threading.Event()
        super().__init__(("127.0.0.1", 0), _Answers)

    def handle_error(self, *_: object) -> None:
        """Who asked was killed."""


class _Answers(BaseHTTPRequestHandler):
    server: _Runtime
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = self._answer().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self) -> AcquireTaskResponse | SendTaskHeartbeatResponse:
        answer = AcquireTaskResponse()
        if self.path == "/v1/runtime/send-task-heartbeat":
            return SendTaskHeartbeatResponse(success=True)  # at anything else Flower's process ends itself
        if self.path == "/v1/runtime/pull-task-input":
            self.server.pulling += 1
            self.server.end.wait(WAIT_S)
        elif self.path == "/v1/runtime/acquire-task":
            self.server.looks += 1
            if self.server.tokens:
                answer.token = self.server.tokens.pop(0)
                answer.task.task_id = 1
        return answer

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _runtime(tasks: int) -> Iterator[_Runtime]:
    with _Runtime(tasks) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.end.set()
        server.shutdown()


def _wait_for(condition: object, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_message_waits_for_no_other_and_a_dead_process_is_reaped() -> None:
    with _runtime(tasks=2) as server:
        command = [sys.executable, "-m", "client.node", "clientapps", f"127.0.0.1:{server.server_port}"]
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(lambda: server.pulling == 2, "both messages have a process, neither of which ends")
            children = process.children()
            assert len(children) == 2
            for child in children:
                child.kill()
            _wait_for(lambda: process.children() == [], "no zombie is left")
            looks = server.looks
            _wait_for(lambda: server.looks > looks, "it looks for the next message")
        finally:
            process.kill()
            process.wait()


STARTS = """
import os, sys, time
from client.supervise import Group
group = Group(lambda: {"ClientApps": [sys.executable, "-m", "client.node", "clientapps", sys.argv[1]]}, os.environ, 1.0)
group.look()
print(group._processes["ClientApps"].pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("after_s", [0.0, 2.5])
def test_it_waits_for_a_node_that_is_not_up_and_ends_with_flower_client(after_s: float) -> None:
    """Also if that is gone before it has begun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    parent = subprocess.Popen([sys.executable, "-c", STARTS, address], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    process = psutil.Process(int(parent.stdout.readline()))
    with parent:
        time.sleep(after_s)
        assert process.is_running()
        parent.kill()
    _wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "it ends")
