"""`coordinator.yaml`, and the processes of a coordinator: SuperLink, reverse proxy, and the run that they carry."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from server.consortium import AUTHORITY, COORDINATOR, LOOPBACK
from tat_core.code import CODE_HEADER, code_hash
from tat_core.config import RunConfig, load_config

FILE = "coordinator.yaml"
EXAMPLE = """\
# What `tat coordinator up` needs to know. Everything else about the run is in its preset and overrides.
listen: 0.0.0.0:8443     # where hospitals connect: open this port, and no other, in the firewall
superlink_port: 8000     # the SuperLink's, on 127.0.0.1 alone
preset: null             # such as full or smoke; null waits for hospitals and starts no run
overrides: []            # such as [name=first, federation.num_sites=3]
"""


@dataclass(frozen=True)
class CoordinatorConfig:
    """What `coordinator.yaml` says.

    Attributes
    ----------
    folder : Path
        The coordinator's folder; the file lies in it.
    listen : str
        ``host:port`` of the proxy.
    superlink_port : int
    preset : str or None
        The run's preset; None starts no run.
    overrides : tuple of str
        ``key=value``.
    requests_per_second : int
        What one address may send, all its hospitals together; more is delayed, not refused.
    max_request_mb : int
        Largest request; Flower sends models in pieces of 5 MB.
    max_database_mb : int
        Beyond this the SuperLink's database is begun anew before the next start; hospitals are registered again by themselves.
    """

    folder: Path
    listen: str = "0.0.0.0:8443"
    superlink_port: int = 8000
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    requests_per_second: int = 200
    max_request_mb: int = 16
    max_database_mb: int = 10_000

    @property
    def superlink(self) -> str:
        """``host:port`` of the SuperLink."""
        return f"127.0.0.1:{self.superlink_port}"

    @property
    def run_overrides(self) -> list[str]:
        """The run's overrides; it goes on by itself with what is on disk, under ``runs/``."""
        return [*self.overrides, f"output_dir={self.folder / 'runs'}", "resume=true"]

    @property
    def run(self) -> RunConfig | None:
        """The run's resolved configuration."""
        return load_config(self.preset, self.run_overrides) if self.preset else None


def read_coordinator(path: Path) -> CoordinatorConfig:
    """Read and check `coordinator.yaml`, the run's configuration included.

    Raises
    ------
    ValueError
        The file is missing, is not YAML, or a key is unknown or of the wrong type.
    """
    if not path.is_file():
        raise ValueError(f"coordinator: expected a file, got {path}, which does not exist; `tat provision init` makes one")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"coordinator: expected YAML in {path}, got a syntax error: {error}; correct that line") from None
    kinds = {field.name: field.type for field in fields(CoordinatorConfig) if field.name != "folder"}
    if not isinstance(content, dict) or not set(content) <= set(kinds):
        got = ", ".join(map(str, sorted(set(content) - set(kinds)))) if isinstance(content, dict) else repr(content)
        raise ValueError(f"coordinator: expected keys among {', '.join(kinds)} in {path}, got {got}; correct it")
    for key, value in content.items():
        if not _fits(value, str(kinds[key])):
            raise ValueError(f"coordinator: expected {key} in {path} to be {kinds[key]}, got {value!r}; correct it")
    host, _, port = str(content.get("listen", "0.0.0.0:8443")).rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator: expected listen in {path} to be HOST:PORT, got {content['listen']!r}; correct it")
    content["overrides"] = tuple(content.get("overrides") or ())
    config = CoordinatorConfig(path.parent.resolve(), **content)
    _ = config.run
    return config


def superlink_command(config: CoordinatorConfig) -> list[str]:
    """The command line of the SuperLink: loopback only, known hospitals only, everything on disk."""
    certificate = str(config.folder / LOOPBACK)
    return [
        str(Path(sys.executable).parent / "flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(config.superlink_port)),
        *("--ssl-certfile", certificate, "--ssl-keyfile", certificate, "--ssl-ca-certfile", str(config.folder / AUTHORITY)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(config.folder / "superlink" / "state.db")),
    ]


def proxy_executable() -> str | None:
    """nginx, also where only root's path would find it."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def proxy_command(config: CoordinatorConfig) -> list[str]:
    """The command line of the reverse proxy.

    Raises
    ------
    ValueError
        nginx is not installed.
    """
    executable = proxy_executable()
    if executable is None:
        raise ValueError("coordinator: expected nginx, got none; install it, on Debian by `apt-get install nginx-light`")
    return [executable, "-p", str(config.folder / "proxy"), "-c", "nginx.conf", "-e", "error.log"]


def proxy_configuration(config: CoordinatorConfig) -> str:
    """The proxy's configuration: Flower's Fleet paths, within limits, and nothing else."""
    template = jinja2.Template(
        (resources.files("deploy") / "nginx.conf.j2").read_text(),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    return template.render(
        config=config,
        certificate=config.folder / COORDINATOR,
        authority=config.folder / AUTHORITY,
        code_header=f"{CODE_HEADER} {code_hash()}",
        is_root=os.geteuid() == 0,
    )


def _fits(value: Any, kind: str) -> bool:
    if kind == "tuple[str, ...]":
        return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    if kind == "int":
        return type(value) is int and value > 0
    return isinstance(value, str) or (kind == "str | None" and value is None)
