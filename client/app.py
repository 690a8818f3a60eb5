"""The ClientApp of a hospital: hands each message, unopened, to the warm trainer, or answers it here where there is none.

Flower starts a process for each message, so nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.wire import FOLDER_VARIABLE, Parcel, TrainerError, ask
from tat_core.code import code_hash

log = logging.getLogger("fed_tat")

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the coordinator's question about this site."""
    return _answer("query", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _answer("train", message, context)


@app.train("baseline")
def baseline(message: Message, context: Context) -> Message:
    """Score the site's own model, trained without the others."""
    return _answer("train.baseline", message, context)


@app.train("fine_tune")
def fine_tune(message: Message, context: Context) -> Message:
    """Fit the released model to this site's images; it stays here, and is scored."""
    return _answer("train.fine_tune", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the global model on the validation patients."""
    return _answer("evaluate", message, context)


def site_file(context: Context) -> Path:
    """The file of the hospital that this node serves.

    A deployed node states it (``--node-config 'site="/path/site.yaml"'``). In a simulation the nodes are numbered, and
    number n is the n-th site folder, in order of name, under the directory in the environment variable ``FED_TAT_SITES``.

    Raises
    ------
    ValueError
        Neither is given, or there are fewer site folders than simulated nodes.
    """
    if "site" in context.node_config:
        return Path(str(context.node_config["site"]))
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
    return files[number]


def _answer(kind: str, message: Message, context: Context) -> Message:
    try:
        request = _request(kind, message, context)
        if trainer := os.environ.get(FOLDER_VARIABLE):
            reply = ask(Path(trainer), request, message.metadata.ttl)
        else:
            from client.answer import answer  # imports torch

            reply = answer(site_file(context), request)
    except TrainerError as error:
        log.error("%s", error)
        reply = Parcel({"config": {"error": error.code}, "metrics": {}})
    except (ValueError, OSError):
        # Before the site is known there is no log of its own; standard error stays on the site's machine.
        log.exception("refused before any work")
        reply = Parcel({"config": {"error": "SITE_CONFIGURATION"}, "metrics": {}})
    return Message(_content(reply), reply_to=message)


def _request(kind: str, message: Message, context: Context) -> Parcel:
    content = message.content
    config = {key: value for record in content.config_records.values() for key, value in record.items()}
    blobs = {name: array.data for record in content.array_records.values() for name, array in record.items()}
    run = {key: str(context.run_config[key]) for key in ("preset", "overrides")}
    return Parcel({"kind": kind, "code": code_hash(), "config": config, **run}, blobs)


def _content(reply: Parcel) -> RecordDict:
    arrays = {name: Array("uint8", (len(blob),), "packed", blob) for name, blob in reply.blobs.items()}
    return RecordDict(
        {
            "update": ArrayRecord(arrays),
            "metrics": MetricRecord(reply.header["metrics"]),
            "config": ConfigRecord(reply.header["config"]),
        }
    )
