"""Checked settings: how a configuration dataclass declares them, checks them, and turns to and from plain values.

A configuration dataclass is frozen, declares each field with `setting`, calls `validate` from ``__post_init__`` and may have a
``relations`` method for what a range cannot say. The key of a section is the name of its class: ``TrainConfig`` is ``train``.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
Relations = Iterable[tuple[str, str, bool]]
"""(name of the setting, what it must be, whether it is)"""

_BOUNDS = (
    ("at_least", "of at least {}", lambda value, bound: value >= bound),
    ("above", "above {}", lambda value, bound: value > bound),
    ("at_most", "of at most {}", lambda value, bound: value <= bound),
    ("below", "below {}", lambda value, bound: value < bound),
)
_WORDS = {int: "a whole number", float: "a finite number", str: "a word", bool: "true or false", types.NoneType: "null"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "words"}


def setting(default: Any, doc: str, **limits: Any) -> Any:
    """Declare one setting.

    Parameters
    ----------
    default : Any
        Its value when neither the preset nor an override names it.
    doc : str
        One sentence for the reader, with the unit; ``tat config show`` prints it.
    **limits
        ``at_least``, ``above``, ``at_most``, ``below``: bounds of a number, or of every number of a tuple;
        ``choices``: the values allowed, of a word or of every word of a tuple.

    Returns
    -------
    dataclasses.Field
    """
    return field(default=default, metadata={"doc": doc, **limits})


def validate(config: Any) -> None:
    """Check the types, ranges, choices and relations of a configuration dataclass, sections included.

    Raises
    ------
    ValueError
        ``config: expected <key> to be <what>, got <value>; <next step>`` for the first fault found.
    """
    hints = get_type_hints(type(config))
    prefix = key_prefix(type(config))
    for entry in fields(config):
        value, hint = getattr(config, entry.name), hints[entry.name]
        expected = _type_fault(value, hint) or _limit_fault(value, entry.metadata)
        if expected:
            raise fault(prefix + entry.name, expected, value)
        if is_dataclass(hint):
            validate(value)
    relations: Relations = config.relations() if hasattr(config, "relations") else ()
    for name, expected, holds in relations:
        if not holds:
            raise fault(prefix + name, expected, getattr(config, name))


def known_keys(kind: type) -> dict[str, tuple[Any, str]]:
    """Dotted key of every setting of a configuration dataclass: its type and its one-sentence documentation."""
    keys: dict[str, tuple[Any, str]] = {}
    hints = get_type_hints(kind)
    for entry in fields(kind):
        hint = hints[entry.name]
        if is_dataclass(hint):
            keys |= known_keys(hint)  # type: ignore[arg-type]
        else:
            keys[key_prefix(kind) + entry.name] = (hint, entry.metadata.get("doc", ""))
    return keys


def to_plain(value: Any) -> Any:
    """A configuration dataclass as dicts, lists, numbers and strings, fit for JSON or YAML."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    return [to_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def from_plain(values: Mapping[str, Any], kind: type[Config]) -> Config:
    """Build a configuration dataclass from what `to_plain` gave; an absent key takes its default.

    Raises
    ------
    ValueError
        Unknown key, wrong type, or a value out of range; the message names the key.
    """
    prefix = key_prefix(kind)
    if not isinstance(values, Mapping):
        raise fault(prefix.rstrip(".") or "the configuration", "a mapping", values)
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(f"{prefix}{key}", known_keys(kind))
        hint = hints[key]
        arguments[key] = from_plain(value, hint) if is_dataclass(hint) else _typed(value, hint)  # type: ignore[arg-type]
    return kind(**arguments)


def key_prefix(kind: type) -> str:
    """``"train."`` for TrainConfig, ``""`` for RunConfig, the root."""
    name = kind.__name__.removesuffix("Config").lower()
    return "" if name == "run" else f"{name}."


def unknown_key(key: str, known: Iterable[str]) -> ValueError:
    """The error for a key that does not exist, with the nearest one that does."""
    names = list(known)
    last = key.rsplit(".", 1)[-1]
    near = [name for name in names if name.rsplit(".", 1)[-1] == last] or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else "'tat config show demo' lists the keys"
    return ValueError(f"config: expected a known key, got {key!r}; {advice}")


def fault(key: str, expected: str, value: Any) -> ValueError:
    """The error for a value that a key cannot have."""
    given = list(value) if isinstance(value, tuple) else value
    return ValueError(f"config: expected {key} to be {expected}, got {given!r}; 'tat config show demo' explains it")


def describe_type(hint: Any) -> str:
    """A type in words: ``tuple[int, int]`` is "a list of 2 whole numbers"."""
    if get_origin(hint) is types.UnionType:
        return " or ".join(describe_type(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"a list of {'' if inner[-1] is Ellipsis else f'{len(inner)} '}{_PLURALS[inner[0]]}"
    return _WORDS.get(hint, f"a {hint.__name__}")


def _type_fault(value: Any, hint: Any) -> str | None:
    """What a value had to be, or None if it is that."""
    inner = get_args(hint)
    if get_origin(hint) is types.UnionType:
        is_right = any(_type_fault(value, option) is None for option in inner)
    elif get_origin(hint) is tuple:
        is_right = isinstance(value, tuple) and (inner[-1] is Ellipsis or len(value) == len(inner))
        is_right = is_right and all(_type_fault(element, inner[0]) is None for element in value)
    elif hint in (int, float):
        is_right = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool) and math.isfinite(value)
    else:
        is_right = isinstance(value, hint)
    return None if is_right else describe_type(hint)


def _limit_fault(value: Any, limits: Mapping[str, Any]) -> str | None:
    """What a value of the right type had to be, or None if it is that; null is within every limit."""
    each = value if isinstance(value, tuple) else () if value is None else (value,)
    if "choices" in limits and not all(element in limits["choices"] for element in each):
        return ("one of " if not isinstance(value, tuple) else "made of ") + ", ".join(limits["choices"])
    for name, words, holds in _BOUNDS:
        if name in limits and not all(holds(element, limits[name]) for element in each):
            return words.format(limits[name])
    return None


def _typed(value: Any, hint: Any) -> Any:
    """Undo what JSON and YAML do to types: tuples come back as lists, whole floats may come back as integers."""
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(element, get_args(hint)[0]) for element in value)
    return float(value) if hint is float and type(value) is int else value
