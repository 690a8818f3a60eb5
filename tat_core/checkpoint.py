"""Model files: safetensors that carry their configuration and verify themselves, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tat_core.config import ModelConfig, config_from_dict, config_to_dict
from tat_core.files import replacing
from tat_core.groups import group_of
from tat_core.model.tat import TAT
from tat_core.sharing import view

FORMAT = "fed-tat model 1"


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies of a model's parameters as float32 arrays, in the model's order."""
    return {name: value.detach().cpu().numpy().astype(np.float32, copy=True) for name, value in model.state_dict().items()}


def load_arrays(model: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Set a model's parameters from arrays of the same names and shapes."""
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})


def model_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, shapes, types and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{value.shape}|{value.dtype.str}|".encode())
        digest.update(value.data)
    return digest.hexdigest()


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write arrays as one safetensors file, atomically and durably.

    Raises
    ------
    OSError
        The disk is full or cannot be written; `path` is as it was before.
    """
    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"write {path.name}: expected room and permission, got: {error}; free disk space and resume") from None


def save_model(path: Path, arrays: Mapping[str, np.ndarray], config: ModelConfig, extra: Mapping[str, Any] | None = None) -> str:
    """Write a model file and return the hash of its parameters.

    Parameters
    ----------
    path : Path
    arrays : mapping of parameter name to float32 array
    config : ModelConfig
        What builds the network that these parameters fit.
    extra : mapping, optional
        JSON-able facts about the run: its name, round, seed, scores.

    Returns
    -------
    str
        `model_hash` of the parameters, also stored in the file and checked by `read_model`.
    """
    digest = model_hash(arrays)
    metadata = {"format": FORMAT, "model": config_to_dict(config), "sha256": digest, "extra": dict(extra or {})}
    save_arrays(path, arrays, {"fed_tat": json.dumps(metadata, sort_keys=True)})
    return digest


@dataclass(frozen=True)
class SavedModel:
    """What a verified model file holds.

    Attributes
    ----------
    arrays : dict of key to float32 array
        Shared parameters, and every task's own.
    metadata : dict
        ``format``, ``model`` (the configuration), ``sha256``, ``extra``.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]

    @property
    def sha256(self) -> str:
        """The hash of the parameters."""
        return str(self.metadata["sha256"])

    @property
    def config(self) -> ModelConfig:
        """What builds the network."""
        return config_from_dict(self.metadata["model"], ModelConfig)

    def network(self, task: str | None = None) -> TAT:
        """Build the network that restores a task's images; it is not for training.

        Parameters
        ----------
        task : str, optional
            Needed where the tasks have parameters of their own: the released file of a federation holds every task's.

        Raises
        ------
        ValueError
            The parameters do not fit the configuration, or there are none for the task.
        """
        model, arrays = TAT(self.config), view(self.arrays, task)
        names = list(model.state_dict())
        left_out = {group_of(name) for name in names if name not in arrays} - {group_of(name) for name in names if name in arrays}
        if left_out:
            raise ValueError(
                f"load model: expected every parameter, got none of the {', '.join(sorted(left_out))}, kept by each site; "
                "train yours with `tat adapt --groups`"
            )
        try:
            load_arrays(model, arrays)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"load model: expected the parameters of this version's network, got others ({reason}); update fed-tat"
            ) from None
        return model.prepare_to_restore()


def read_model(path: Path) -> SavedModel:
    """Read a model file and verify it.

    Raises
    ------
    ValueError
        The file is not a fed-tat model, is damaged, or its parameters do not have the hash that it states.
    """
    if not path.is_file():
        raise ValueError(
            f"load model: expected a model file, got {path}, which does not exist; give the path of a .safetensors file"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            stated = (file.metadata() or {}).get("fed_tat")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load model: expected a safetensors file, got {path.name} ({error}); copy the file again") from None
    if stated is None:
        raise ValueError(
            f"load model: expected a file written by fed-tat, got {path.name} without its metadata; use a released model"
        )
    metadata = json.loads(stated)
    digest = model_hash(arrays)
    if digest != metadata["sha256"]:
        raise ValueError(
            f"load model: expected parameters with sha256 {metadata['sha256'][:12]}…, got {digest[:12]}…; "
            "the file was changed after it was written: copy it again from the coordinator"
        )
    return SavedModel(arrays, metadata)
