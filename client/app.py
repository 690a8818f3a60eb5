"""The ClientApp of a hospital: decode the message, call `client.work`, encode the reply."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.alone import baseline_round
from client.outgoing import refusal
from client.site import Site, load_site
from client.work import Action, describe, evaluate_round, handle, refuse, train_round
from tat_core.config import load_config
from tat_core.packet import Packet

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the coordinator's question about this site."""
    return _answer(describe, message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _answer(train_round, message, context)


@app.train("baseline")
def baseline(message: Message, context: Context) -> Message:
    """Score the site's own model, trained without the others."""
    return _answer(baseline_round, message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the global model on the validation patients."""
    return _answer(evaluate_round, message, context)


def site_of(context: Context) -> Site:
    """The hospital that this node serves.

    A deployed node states its file (``--node-config 'site="/path/site.yaml"'``). In a simulation the nodes are numbered, and
    number n is the n-th site folder, in order of name, under the directory in the environment variable ``FED_TAT_SITES``.

    Raises
    ------
    ValueError
        Neither is given, or there are fewer site folders than simulated nodes.
    """
    if "site" in context.node_config:
        return load_site(Path(str(context.node_config["site"])))
    if "partition-id" not in context.node_config:
        raise ValueError(
            "site: expected node-config to name the site file, got none; start the node with --node-config 'site=\"…\"'"
        )
    root = Path(os.environ.get("FED_TAT_SITES", "data/hospitals-demo"))
    files = sorted(root.glob("*/site.yaml"))
    number = int(context.node_config["partition-id"])
    if number >= len(files):
        raise ValueError(
            f"site: expected a site folder for simulated node {number}, got {len(files)} folders in FED_TAT_SITES={root}; "
            "make the sample hospitals with `tat simulate`, or lower num-supernodes"
        )
    return load_site(files[number])


def _answer(action: Action, message: Message, context: Context) -> Message:
    site = None
    try:
        site = site_of(context)
        _log_to(site.state_dir / "site.log")
        config = load_config(str(context.run_config["preset"]), str(context.run_config["overrides"]))
        instruction = _decode(message.content)
    except Exception:  # Flower would send the text of any
        # Before the site is known there is no log of its own; standard error stays on the site's machine.
        logging.getLogger("fed_tat").exception("refused before any work")
        code = "SITE_CONFIGURATION"
        reply = refusal(code) if site is None else refuse(site, action, Packet(), code)
    else:
        reply = handle(action, site, config, instruction)
    return Message(_encode(reply), reply_to=message)


def _log_to(path: Path) -> None:
    """Send the site's log to its own file, and nowhere else; a simulated process serves several sites in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("fed_tat")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)


def _decode(content: RecordDict) -> Packet:
    arrays = {name: array.numpy() for record in content.array_records.values() for name, array in record.items()}
    config = {key: value for record in content.config_records.values() for key, value in record.items()}
    return Packet(arrays, {}, config)  # type: ignore[arg-type]


def _encode(reply: Packet) -> RecordDict:
    return RecordDict(
        {
            "update": ArrayRecord({name: Array(value) for name, value in reply.arrays.items()}),
            "metrics": MetricRecord(dict(reply.metrics)),
            "config": ConfigRecord(dict(reply.config)),
        }
    )
