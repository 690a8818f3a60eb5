"""Attention between channels, over the whole image or over windows. Features are (H, W, B, C)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tat_core.model.pointwise import pointwise_per_image

_EPS = 1e-12
_FEW_HEADS = 2  # up to which long matrices are multiplied one by one: as a batch they would be copied into another order first

Map = Callable[[Tensor], Tensor]


def channel_attention(qkv: Tensor, heads: int, window: int, temperature: Map, project: Map) -> Tensor:
    """Attend between the channels of each head and project the result.

    With q, k, v of one head as (pixels, c) matrices the result is ``v · softmax(temperature(q̂ᵀk̂))ᵀ``, where ^ divides each
    channel by its norm over the pixels. Norms divide the c×c scores instead of q and k, and the output projection is applied
    to the c×c maps instead of to every pixel. Images larger than the window are attended in equal overlapping windows and
    averaged where these overlap: the windows' borders cut the image into cells, a window's products are the sums of its cells',
    and a cell is multiplied by the mean of its windows' maps. So every pixel is read once, however many windows hold it.

    Parameters
    ----------
    qkv : torch.Tensor (H, W, B, 3C)
    heads : int
    window : int
        Largest side, in pixels, that is attended as one.
    temperature : (B, heads, c, c) → same
    project : linear map on the last dimension, C → C, without bias

    Returns
    -------
    torch.Tensor (H, W, B, C)
    """
    height, width, batch, channels = qkv.shape
    channels //= 3
    if height <= window and width <= window:
        gram, squares, v = _Gram.apply(qkv.flatten(0, 1), heads)
        return pointwise_per_image(v, attention_maps(gram, squares, temperature, project)).view(height, width, batch, channels)

    rows, cols = cells(height, window), cells(width, window)
    cover = torch.kron(rows.cover, cols.cover).to(qkv.device)
    grams, squares, values = zip(
        *(_Gram.apply(qkv[row, col].flatten(0, 1), heads) for row in rows.cuts for col in cols.cuts), strict=True
    )
    maps = attention_maps(sum_over_windows(grams, cover), sum_over_windows(squares, cover), temperature, project)
    outs = map(pointwise_per_image, values, mean_over_windows(maps, cover))
    bands = [torch.cat([next(outs).unflatten(0, (-1, col.stop - col.start)) for col in cols.cuts], 1) for _ in rows.cuts]
    return torch.cat(bands)


@dataclass(frozen=True)
class Cells:
    """One side of an image, cut into pieces.

    Attributes
    ----------
    cuts : list of slice
        From the first pixel to the last.
    cover : torch.Tensor (pieces, windows)
        1 where a window covers a piece.
    """

    cuts: list[slice]
    cover: Tensor


def cells(size: int, window: int, most: int | None = None) -> Cells:
    """The pieces that windows' borders cut one side into, none longer than `most`.

    As few windows as cover the side, evenly stepped; the last ends with the image.
    """
    window = min(size, window)
    count = math.ceil(size / window)
    step = window if count == 1 else math.ceil((size - window) / (count - 1))
    starts = [min(i * step, size - window) for i in range(count)]
    borders = sorted({*starts, *(start + window for start in starts)})
    cuts = [slice(i, min(i + (most or size), high)) for low, high in pairwise(borders) for i in range(low, high, most or size)]
    return Cells(cuts, torch.tensor([[float(start <= cut.start < start + window) for start in starts] for cut in cuts]))


def gram_and_squares(qk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(pixels, N, 2C) → qᵀk, (N, heads, c, c), and the channels' squared norms, (N, 2, heads, c), in fp32 or better."""
    q, k = _split_heads(qk, heads)
    if heads <= _FEW_HEADS:
        gram = torch.stack([torch.mm(q[n, h].T, k[n, h]) for n in range(len(q)) for h in range(heads)]).unflatten(0, (-1, heads))
    else:
        gram = q.mT @ k
    precise = qk.to(torch.promote_types(qk.dtype, torch.float32))
    squares = precise.square() if precise is qk else precise.square_()
    # Three times as fast as vector_norm over the first dimension.
    return gram, squares.sum(0).unflatten(-1, (2, heads, -1))


def sum_over_windows(parts: list[Tensor] | tuple[Tensor, ...], cover: Tensor) -> Tensor:
    """What every window adds up to: a (B, …) per cell in, (windows · B, …) in fp32 or better out."""
    whole = torch.stack(parts).flatten(1)
    whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
    with torch.autocast(whole.device.type, enabled=False):
        return (cover.T.to(whole.dtype) @ whole).view(-1, *parts[0].shape[1:])


def mean_over_windows(maps: Tensor, cover: Tensor) -> Tensor:
    """The mean map of the windows that cover a cell: (windows · B, C, C) → (cells, B, C, C)."""
    mean = (cover / cover.sum(1, keepdim=True)).to(maps.dtype) @ maps.view(cover.shape[1], -1)
    return mean.view(len(cover), -1, *maps.shape[1:])


def attention_maps(gram: Tensor, squares: Tensor, temperature: Map, project: Map) -> Tensor:
    """(N, heads, c, c) and (N, 2, heads, c) → (N, C, C), by which each pixel of v is multiplied."""
    norms = squares.clamp_min(_EPS**2).sqrt()
    maps = temperature(gram / (norms[:, 0, :, :, None] * norms[:, 1, :, None, :])).softmax(-1)
    return project(_block_diagonal(maps.transpose(-2, -1)))


class _Gram(torch.autograd.Function):
    """qᵀk per image and head, the squared norms of q's and k's channels, and v.

    Written out so that the norms' gradient costs one scaled copy and everything lands in one gradient tensor.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels, N, 3C) → (N, heads, c, c), (N, 2, heads, c), (pixels, N, C)."""
        channels = qkv.shape[-1] // 3
        ctx.save_for_backward(qkv)
        return *gram_and_squares(qkv[..., : 2 * channels], heads), qkv[..., 2 * channels :]

    @staticmethod
    def backward(ctx: Any, grad_gram: Tensor, grad_squares: Tensor, grad_v: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        heads, channels = grad_gram.shape[1], qkv.shape[-1] // 3
        grad = torch.empty_like(qkv)
        grad[..., 2 * channels :] = grad_v
        torch.mul(qkv[..., : 2 * channels], 2 * grad_squares.flatten(1), out=grad[..., : 2 * channels])
        q, k = _split_heads(qkv[..., : 2 * channels], heads)
        grad_q, grad_k = _split_heads(grad[..., : 2 * channels], heads)
        if heads > _FEW_HEADS:
            grad_q.add_(k @ grad_gram.mT)
            grad_k.add_(q @ grad_gram)
            return grad, None
        for place in itertools.product(range(len(q)), range(heads)):
            grad_q[place].addmm_(k[place], grad_gram[place].T)
            grad_k[place].addmm_(q[place], grad_gram[place])
        return grad, None


def _split_heads(qk: Tensor, heads: int) -> Tensor:
    """(pixels, N, 2C) → q and k as views, (2, N, heads, pixels, c)."""
    return qk.unflatten(-1, (2, heads, -1)).permute(2, 1, 3, 0, 4)


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(N, heads, c, c) → (N, heads·c, heads·c) with the blocks on the diagonal."""
    num, heads, size, _ = blocks.shape
    if heads == 1:
        return blocks[:, 0]
    return torch.diag_embed(blocks.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2).reshape(num, heads * size, heads * size)
