"""Network namespaces: the coordinator and every hospital on a machine of their own, joined by slow links."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

COORDINATOR_ADDRESS = "10.71.0.1"
LINK = "tbf rate 30mbit burst 64kb latency 400ms"


class Network:
    """Namespaces that exist; see `network`.

    Parameters
    ----------
    prefix : str
        Of the namespaces' names.
    hospitals : sequence of str
    """

    def __init__(self, prefix: str, hospitals: Sequence[str]) -> None:
        self._prefix, self._numbers = prefix, {name: number for number, name in enumerate(hospitals, start=1)}

    def inside(self, who: str) -> list[str]:
        """What to put before a command that runs on the machine of the coordinator or a hospital."""
        return ["ip", "netns", "exec", self.namespace(who)]

    def namespace(self, who: str) -> str:
        """The namespace's name."""
        return f"{self._prefix}-{self._numbers.get(who, 0)}"

    def address(self, hospital: str) -> str:
        """The hospital's address, as the coordinator sees it."""
        return f"10.71.{self._numbers[hospital]}.2"

    def set_link(self, hospital: str, state: str) -> None:
        """Cut or mend (``down``, ``up``) a hospital's link, in the middle: neither end is told."""
        _ip("-n", self.namespace("coordinator"), "link", "set", f"site{self._numbers[hospital]}", state)

    def make(self) -> None:
        """Make the namespaces and their links."""
        centre = self.namespace("coordinator")
        _ip("netns", "add", centre)
        _ip("-n", centre, "link", "set", "lo", "up")
        _ip("-n", centre, "address", "add", f"{COORDINATOR_ADDRESS}/32", "dev", "lo")
        for hospital, number in self._numbers.items():
            space, port, net = self.namespace(hospital), f"site{number}", f"10.71.{number}"
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", centre, "link", "add", port, "type", "veth", "peer", "name", "wan", "netns", space)
            for where, device, address in ((centre, port, f"{net}.1/30"), (space, "wan", f"{net}.2/30")):
                _ip("-n", where, "address", "add", address, "dev", device)
                _ip("-n", where, "link", "set", device, "up")
                subprocess.run(["tc", "-n", where, "qdisc", "add", "dev", device, "root", *LINK.split()], check=True)
            _ip("-n", space, "route", "add", "default", "via", f"{net}.1")

    def remove(self) -> None:
        """Remove what is there of them."""
        for who in ("coordinator", *self._numbers):
            subprocess.run(["ip", "netns", "delete", self.namespace(who)], capture_output=True, check=False)


@contextlib.contextmanager
def network(hospitals: Sequence[str]) -> Iterator[Network]:
    """A network for the hospitals of these names; it is gone afterwards."""
    made = Network(f"ft{os.getpid()}", hospitals)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def reason_to_skip() -> str | None:
    """Why this machine cannot have namespaces, or None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [command for command in ("ip", "tc", "faketime", "nginx") if shutil.which(command) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
