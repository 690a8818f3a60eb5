"""A model's arrays as a few byte strings: one for what all tasks share, one for each task's own.

A message then carries two arrays instead of some hundreds (Flower moves each by requests of its own), whoever passes it on need
not open it, and what several sites share is the same bytes, which Flower stores once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np

from tat_core.sharing import owner_of

SHARED = "shared"
_LENGTH_BYTES = 8


def by_owner(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Arrays parted into what all tasks share (under ``shared``) and each task's own (under its name)."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        parts.setdefault(owner_of(key)[0] or SHARED, {})[key] = value
    return parts


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A byte string: the length of a list of names, types and shapes; the list as JSON; the values."""
    header = json.dumps([[key, value.dtype.str, value.shape] for key, value in arrays.items()]).encode()
    values = (np.ascontiguousarray(value).data for value in arrays.values())
    return b"".join([len(header).to_bytes(_LENGTH_BYTES, "little"), header, *values])


def unpack(blob: bytes) -> dict[str, np.ndarray]:
    """The inverse of `pack`: read-only arrays that lie in the byte string itself.

    Raises
    ------
    ValueError
        The bytes are not what `pack` makes.
    """
    try:
        return _unpack(blob)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"unpack: expected packed arrays, got other bytes ({error}); update the sender") from None


def _unpack(blob: bytes) -> dict[str, np.ndarray]:
    place = _LENGTH_BYTES + int.from_bytes(blob[:_LENGTH_BYTES], "little")
    arrays: dict[str, np.ndarray] = {}
    for key, kind, shape in json.loads(blob[_LENGTH_BYTES:place]):
        if not isinstance(key, str) or key in arrays or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError("a wrong entry")
        dtype = np.dtype(str(kind))
        values = np.frombuffer(memoryview(blob)[place : place + math.prod(shape) * dtype.itemsize], dtype)
        arrays[key] = values.reshape(shape)
        place += values.nbytes
    if place != len(blob):
        raise ValueError("bytes are left over, or missing")
    return arrays
