"""What the coordinator asks of its own SuperLink: which hospitals may connect, start the run, how it goes.

The one file that speaks Flower's Control API, which open-source Flower does not authenticate: it is reached on loopback only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

# The project file that is the whole bundle: it names the apps, which every machine has installed itself.
PROJECT = """\
[project]
name = "fed-tat"
version = "{version}"
license = "Apache-2.0"
dependencies = ["flwr>=1.41.0,<1.42"]

[tool.flwr.app]
publisher = "fed-tat"
fab-include = ["pyproject.toml"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
preset = "demo"
overrides = ""
"""


@contextmanager
def control(address: str, authority_pem: bytes) -> Iterator[ControlHttpClient]:
    """A connection to the SuperLink at ``host:port``; its calls raise `httpx.HTTPError` while it is down."""
    interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    with ControlHttpClient.from_server_address(address, False, authority_pem, interceptors) as client:
        yield client


def register_only(client: ControlHttpClient, sites: Mapping[str, str]) -> None:
    """Make the given hospitals, and no others, the ones that may connect.

    Parameters
    ----------
    client : ControlHttpClient
    sites : mapping of site name to OpenSSH public key
    """
    wanted = {_key_bytes(public_key): name for name, public_key in sites.items()}
    present = {
        node.public_key: node.node_id for node in client.ListNodes(ListNodesRequest()).nodes_info if node.status != "unregistered"
    }
    for key, node_id in present.items():
        if key not in wanted:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
    for key, name in wanted.items():
        if key not in present:
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))


def node_status(client: ControlHttpClient) -> dict[str, str]:
    """``online``, ``offline`` or ``registered`` (never seen), by the name of the hospital."""
    nodes = client.ListNodes(ListNodesRequest()).nodes_info
    return {node.name: node.status for node in nodes if node.status != "unregistered"}


def start_run(client: ControlHttpClient, preset: str, overrides: str) -> int:
    """Submit the run; its identity at the SuperLink."""
    content, _ = build_fab_from_files({"pyproject.toml": PROJECT.format(version=version("fed-tat")).encode()})
    bundle = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    config = user_config_to_proto({"preset": preset, "overrides": overrides})
    return int(client.StartRun(StartRunRequest(fab=bundle, override_config=config)).run_id)


def run_status(client: ControlHttpClient, run_id: int) -> tuple[str, str]:
    """``pending``, ``starting``, ``running`` or ``finished``, and what Flower says of how it ended."""
    runs = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
    status = runs[run_id].status
    return status.status, f"{status.sub_status} {status.details}".strip()


def _key_bytes(public_key: str) -> bytes:
    key = load_ssh_public_key(public_key.encode())
    assert isinstance(key, EllipticCurvePublicKey), "read_request lets no others pass"
    return public_key_to_bytes(key)
