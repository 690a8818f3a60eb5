"""Packed arrays arrive as they were, in half of the bytes where bfloat16 can hold them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tat_core.blobs import pack, packed_bytes, unpack

_SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
_BITS = hnp.arrays(np.uint32, _SHAPES)  # every float32 there is, NaNs with a payload among them


@given(st.lists(st.tuples(_BITS, st.booleans()), max_size=4))
def test_every_bit_arrives(arrays: list[tuple[np.ndarray, bool]]) -> None:
    sent = {f"a{i}": (bits & 0xFFFF0000 if half else bits).view(np.float32) for i, (bits, half) in enumerate(arrays)}
    sent |= {"counts": np.arange(6, dtype=np.int64).reshape(2, 3), "turned": np.ones((2, 3), np.float32).T}
    arrived = unpack(pack(sent))
    assert list(arrived) == list(sent)
    for key, value in sent.items():
        assert (arrived[key].dtype, arrived[key].shape) == (value.dtype, value.shape)
        assert arrived[key].tobytes() == value.tobytes()


@pytest.mark.parametrize(("precision", "share"), [("float32", 1.0), ("bfloat16", 0.5)])
def test_what_bfloat16_holds_travels_in_half_of_the_bytes(precision: str, share: float) -> None:
    update = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).to(getattr(torch, precision)).float().numpy()
    assert packed_bytes({"w": update}) == share * update.nbytes
    assert 0 <= len(pack({"w": update})) - share * update.nbytes < 100


@pytest.mark.parametrize(
    "blob", [b"", b"\x03", pack({"w": np.ones(3, np.float32)})[:-1], pack({"w": np.ones(3, np.float32)}) + b"x"]
)
def test_other_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match="expected packed arrays"):
        unpack(blob)
