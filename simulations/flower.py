"""A run of the Flower apps on a local SuperLink with Ray-simulated nodes, one a hospital."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import server
from tat_core.environment import QUIET_ENVIRONMENT

START_SECONDS = 60.0


def simulate(
    preset: str,
    overrides: list[str],
    sites_dir: Path,
    num_sites: int,
    log_file: Path,
    on_poll: Callable[[], None],
    num_cpus: int = 2,
) -> None:
    """Submit the apps with `flwr run` and wait for the end of the run.

    Flower's exit code says nothing about the run: look at what the run wrote.

    Parameters
    ----------
    preset, overrides : str, list of str
        The run's configuration, resolved by both apps alike.
    sites_dir : Path
        Folders of the hospitals; node n is the n-th by name.
    num_sites : int
    log_file : Path
        Where everything that Flower prints goes.
    on_poll : callable
        Called about twice a second while the run goes on.
    num_cpus : int
        Hospitals that train at the same time.
    """
    binaries = Path(sys.executable).parent
    with tempfile.TemporaryDirectory(prefix="ft", ignore_cleanup_errors=True) as scratch, open(log_file, "ab") as log:
        environment = {
            **os.environ,
            **QUIET_ENVIRONMENT,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": scratch,
            "RAY_TMPDIR": scratch,
            "FED_TAT_SITES": str(sites_dir.resolve()),
        }
        with _superlink(scratch, environment, log) as address:
            connection = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
            (Path(scratch) / "config.toml").write_text(connection)
            run = subprocess.Popen(
                [
                    str(binaries / "flwr"),
                    "run",
                    str(app_folder()),
                    "here",
                    "--stream",
                    "--run-config",
                    f'preset="{preset}" overrides="{_toml(shlex.join(overrides))}"',
                    "--federation-config",
                    f"num-supernodes={num_sites} client-resources-num-cpus=1 init-args-num-cpus={num_cpus}",
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            while run.poll() is None:
                on_poll()
                time.sleep(0.5)
            on_poll()


def app_folder() -> Path:
    """The folder with the pyproject.toml that the app bundle is made of.

    Raises
    ------
    ValueError
        The packages were installed without their source checkout.
    """
    folder = Path(server.__file__).resolve().parents[1]
    if not (folder / "pyproject.toml").is_file():
        raise ValueError(
            "simulate: expected an editable installation, got one without its pyproject.toml; install with `pip install -e .`"
        )
    return folder


@contextlib.contextmanager
def _superlink(scratch: str, environment: dict[str, str], log: object) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    executable = shutil.which("flower-superlink", path=environment["PATH"])
    assert executable is not None, "flwr brings flower-superlink"
    process = subprocess.Popen(
        [executable, "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)],
        cwd=scratch,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,  # type: ignore[call-overload]
        stderr=log,
        start_new_session=True,
    )
    try:
        _wait_for_port(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise ValueError(
        f"simulate: expected a SuperLink on port {port}, got none after {START_SECONDS:.0f} s; see flower.log in the run's folder"
    )


def _toml(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
