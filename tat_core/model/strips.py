"""A block without gradients on a CPU, strip by strip of rows: what is widened is used while it is in the processor's cache.

The same operations as `tat_core.model.blocks`, in another order. The widened features, five times the image's, are never whole
in memory. Gate and value are widened each by itself: a GELU of half of a tensor's channels takes twice as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tat_core.model.attention import attention_maps, cells, gram_and_squares, mean_over_windows, sum_over_windows
from tat_core.model.depthwise import depthwise_per_image
from tat_core.model.pointwise import pointwise, pointwise_per_image

_STRIP_BYTES = 2**24  # of widened features: smaller strips are hardly faster, and much slower beside a busy neighbour
_FEWEST_ROWS = 4

Part = tuple[Tensor, Tensor]
"""Weights (wide, C) of a linear map and depth-wise kernels (B, wide, 3, 3) for what comes out of it."""


def apply_to(x: Tensor) -> bool:
    """Whether features are to go through a block in strips."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def attend(x: Tensor, norm: nn.Module, part: Part, window: int, heads: int, temperature: nn.Module, project: nn.Module) -> Tensor:
    """Features (H, W, B, C) and the attention of them, normalised; the part is that of q, k and v together."""
    height, width, _, channels = x.shape
    rows, cols = cells(height, window, _strip_height(x, [part])), cells(width, window)
    products, values = [], []
    for (qkv,) in _widened(x, norm, [part], rows.cuts):
        for col in cols.cuts:
            products.append(gram_and_squares(qkv[:, col, :, : 2 * channels].flatten(0, 1), heads))
            values.append(qkv[:, col, :, 2 * channels :].flatten(0, 1).contiguous())
    grams, squares = zip(*products, strict=True)
    cover = torch.kron(rows.cover, cols.cover)
    maps = attention_maps(sum_over_windows(grams, cover), sum_over_windows(squares, cover), temperature, project)
    out = torch.empty_like(x)
    places = ((row, col) for row in rows.cuts for col in cols.cuts)
    for place, v, cell_maps in zip(places, values, mean_over_windows(maps, cover), strict=True):
        torch.add(x[place], pointwise_per_image(v, cell_maps).view(x[place].shape), out=out[place])
    return out


def feed_forward_(x: Tensor, norm: nn.Module, parts: Sequence[Part], project: Tensor) -> Tensor:
    """Add to features (H, W, B, C), in place, the gated feed-forward of them, normalised.

    The parts are those of gate and value, `project` is (C, wide). A strip is changed when no other needs what it was.
    """
    rows = cells(x.shape[0], x.shape[0], _strip_height(x, parts)).cuts
    project = project.to(_precision(x))
    for piece, (gate, value) in zip(rows, _widened(x, norm, parts, rows), strict=True):
        x[piece] += pointwise(F.gelu(gate).mul_(value), project)
    return x


def _widened(x: Tensor, norm: nn.Module, parts: Sequence[Part], rows: Sequence[slice]) -> Iterator[list[Tensor]]:
    """For each strip and part ``depthwise_per_image(pointwise(norm(x), weight), kernels)``, (rows, W, B, wide).

    When a strip is given out, all rows up to the one below it have been read.
    """
    dtype = _precision(x)
    parts = [(weight.to(dtype), kernels.to(dtype)) for weight, kernels in parts]
    outside = x.new_zeros(1, *x.shape[1:], dtype=dtype)
    strip, end = outside, 0
    for piece in rows:
        start, end = end, min(piece.stop + 1, len(x))
        # The rows with the one above and the one below, which are widened twice: cheaper than to copy them when they are wide.
        strip = torch.cat([strip[-2:], norm(x[start:end]).to(dtype), *[outside] * (piece.stop == len(x))])
        yield [depthwise_per_image(pointwise(strip, weight), kernels, pad_rows=0) for weight, kernels in parts]


def _strip_height(x: Tensor, parts: Sequence[Part]) -> int:
    height, width, batch, _ = x.shape
    row = width * batch * sum(len(weight) for weight, _ in parts) * _precision(x).itemsize
    return min(height, max(_FEWEST_ROWS, _STRIP_BYTES // row))


def _precision(x: Tensor) -> torch.dtype:
    """What products are computed in: the surrounding autocast's precision, if there is one."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
