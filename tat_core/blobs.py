"""A model's arrays as a few byte strings: one for what all tasks share, one for each task's own.

A message then carries two arrays instead of some hundreds (Flower moves each by requests of its own), whoever passes it on need
not open it, and what several sites share is the same bytes, which Flower stores once. An array of float32 whose values are all
bfloat16 numbers travels in half of the bytes, and arrives as it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np

from tat_core.sharing import owner_of

SHARED = "shared"
_LENGTH_BYTES = 8
_HALF = "bfloat16"  # the name in a list of arrays; their values are the upper halves of float32 numbers
_FEW = 4096


def by_owner(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Arrays parted into what all tasks share (under ``shared``) and each task's own (under its name)."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        parts.setdefault(owner_of(key)[0] or SHARED, {})[key] = value
    return parts


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A byte string: the length of a list of names, types and shapes; the list as JSON; the values."""
    entries, values = [], []
    for key, value in arrays.items():
        half = _is_half(value)
        entries.append([key, _HALF if half else value.dtype.str, value.shape])
        values.append((_upper_half(value) if half else np.ascontiguousarray(value)).data)
    header = json.dumps(entries).encode()
    return b"".join([len(header).to_bytes(_LENGTH_BYTES, "little"), header, *values])


def packed_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """How many bytes the values of arrays take when they travel."""
    return sum(value.nbytes // 2 if _is_half(value) else value.nbytes for value in arrays.values())


def unpack(blob: bytes) -> dict[str, np.ndarray]:
    """The inverse of `pack`: read-only arrays that lie in the byte string itself, and those that travelled in half of it.

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
        dtype = np.dtype("<u2" if kind == _HALF else str(kind))
        values = np.frombuffer(memoryview(blob)[place : place + math.prod(shape) * dtype.itemsize], dtype)
        arrays[key] = (_from_upper_half(values) if kind == _HALF else values).reshape(shape)
        place += values.nbytes
    if place != len(blob):
        raise ValueError("bytes are left over, or missing")
    return arrays


def _is_half(value: np.ndarray) -> bool:
    """Whether an array is of float32 numbers that bfloat16 can hold."""
    if value.dtype != np.dtype("<f4"):
        return False
    halves = value.ravel().view("<u2")[::2]
    return not halves[:_FEW].any() and not halves.any()


def _upper_half(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.ravel().view("<u2")[1::2])


def _from_upper_half(halves: np.ndarray) -> np.ndarray:
    wide = np.zeros((halves.size, 2), "<u2")
    wide[:, 1] = halves
    return wide.reshape(-1).view("<f4")
