"""A preset of ``tat_core/conf/`` with overrides, put together by Hydra. The sole importer of hydra and omegaconf."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tat_core.settings import describe_type, fault, known_keys

# hydra keeps its initialisation in a process-wide singleton.
_HYDRA_LOCK = threading.Lock()


def composed(kind: type, preset: str, items: list[str]) -> dict[str, Any]:
    """The values of a preset and its overrides.

    Parameters
    ----------
    kind : type
        The configuration dataclass whose defaults and types are the base of every preset.
    preset : str
    items : list of str
        Overrides ``key=value`` whose keys are known.

    Raises
    ------
    ValueError
        A value of the wrong type, or a preset that does not fit; the message names the key.
    """
    with _HYDRA_LOCK, initialize_config_module("tat_core.conf", version_base="1.3"):
        ConfigStore.instance().store(name="base", node=_schema(kind))
        try:
            values = OmegaConf.to_container(compose(preset, overrides=items), resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise _fault_in(kind, preset, items, error) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _schema(kind: type) -> DictConfig:
    """The defaults with their types. Frozen dataclasses come out read-only, which would keep presets and overrides out."""
    schema = OmegaConf.structured(kind)
    for node in (schema, *(schema[entry.name] for entry in fields(kind) if OmegaConf.is_config(schema[entry.name]))):
        OmegaConf.set_readonly(node, None)
    return schema


def _fault_in(kind: type, preset: str, items: list[str], error: BaseException) -> ValueError:
    """Say in our words which override hydra could not take; each is tried alone, since hydra does not always name it."""
    for item in items:
        try:
            compose(preset, overrides=[item])
        except (HydraException, OmegaConfBaseException):
            key, _, value = item.partition("=")
            return fault(key, describe_type(known_keys(kind)[key][0]), value)
    reason = str(error.__cause__ or error).splitlines()[0]
    return ValueError(f"config: expected {preset}.yaml to hold known keys and right types, got: {reason}; mend the file")
