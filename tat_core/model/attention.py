"""Attention between channels, over the whole image or over windows. Features are (H, W, B, C)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EPS = 1e-12

Map = Callable[[Tensor], Tensor]


def channel_attention(qkv: Tensor, heads: int, window: int, temperature: Map, project: Map) -> Tensor:
    """Attend between the channels of each head and project the result.

    With q, k, v of one head as (pixels, c) matrices the result is ``v · softmax(temperature(q̂ᵀk̂))ᵀ``, where ^ divides each
    channel by its norm over the pixels. Norms divide the c×c scores instead of q and k, and the output projection is applied
    to the c×c maps instead of to every pixel. Images larger than the window are attended in equal overlapping windows and
    averaged where these overlap.

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
        out = _attend(qkv.flatten(0, 1), heads, temperature, project)
        return out.view(height, width, batch, channels)

    rows, cols = window_index(height, window, qkv.device), window_index(width, window, qkv.device)
    (num_rows, high), (num_cols, wide) = rows.shape, cols.shape
    parts = qkv[rows.flatten()][:, cols.flatten()].view(num_rows, high, num_cols, wide, batch, 3 * channels)
    out = _attend(parts.permute(1, 3, 0, 2, 4, 5).reshape(high * wide, -1, 3 * channels), heads, temperature, project)
    out = out.view(high, wide, num_rows, num_cols, batch, channels).permute(2, 0, 3, 1, 4, 5)
    out = out.reshape(num_rows * high, num_cols * wide, batch, channels)
    total = out.new_zeros(height, num_cols * wide, batch, channels).index_add(0, rows.flatten(), out)
    total = out.new_zeros(height, width, batch, channels).index_add(1, cols.flatten(), total)
    counts = rows.flatten().bincount()[:, None] * cols.flatten().bincount()
    return total / counts[..., None, None]


def window_index(size: int, window: int, device: torch.device) -> Tensor:
    """Positions (number of windows, window) along one side: evenly stepped windows of which the last ends with the image."""
    window = min(size, window)
    count = math.ceil(size / window)
    step = window if count == 1 else math.ceil((size - window) / (count - 1))
    starts = torch.arange(count, device=device) * step
    return starts.clamp_max(size - window)[:, None] + torch.arange(window, device=device)


def _attend(qkv: Tensor, heads: int, temperature: Map, project: Map) -> Tensor:
    """(pixels, N, 3C) → (pixels, N, C), each of the N images by itself."""
    channels = qkv.shape[-1] // 3
    qk, v = qkv.split((2 * channels, channels), dim=-1)
    gram, norms = _Gram.apply(qk, heads)
    norms = norms.clamp_min(_EPS)
    maps = temperature(gram / (norms[:, 0, :, :, None] * norms[:, 1, :, None, :])).softmax(-1)
    maps = project(_block_diagonal(maps.transpose(-2, -1)))
    return torch.bmm(v.transpose(0, 1), maps).transpose(0, 1)


class _Gram(torch.autograd.Function):
    """qᵀk per image and head, and the norms of q's and k's channels.

    Written out because both gradients together are one matrix product: [q k] · [[diag, dG], [dGᵀ, diag]].
    """

    @staticmethod
    def forward(ctx: Any, qk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """(pixels, N, 2C) → (N, heads, c, c), (N, 2, heads, c)."""
        pixels, num, channels = qk.shape
        size = channels // 2 // heads
        q, k = qk.view(pixels, num, 2, heads, size).permute(2, 1, 3, 0, 4).flatten(1, 2)
        gram = torch.bmm(q.transpose(1, 2), k).view(num, heads, size, size)
        norms = torch.linalg.vector_norm(qk, dim=0).view(num, 2, heads, size)
        ctx.save_for_backward(qk, norms)
        return gram, norms

    @staticmethod
    def backward(ctx: Any, grad_gram: Tensor, grad_norms: Tensor) -> tuple[Tensor, None]:
        qk, norms = ctx.saved_tensors
        pixels, num, channels = qk.shape
        heads, size = norms.shape[2:]
        scale = grad_norms / norms.clamp_min(_EPS)
        mix = torch.diag_embed(scale.transpose(1, 2).reshape(num * heads, 2 * size))
        mix[:, :size, size:] = grad_gram.flatten(0, 1)
        mix[:, size:, :size] = grad_gram.flatten(0, 1).transpose(1, 2)
        if heads == 1:
            return torch.bmm(qk.transpose(0, 1), mix).transpose(0, 1), None
        by_head = qk.view(pixels, num, 2, heads, size).permute(1, 3, 0, 2, 4).reshape(num * heads, pixels, 2 * size)
        grad = torch.bmm(by_head, mix).view(num, heads, pixels, 2, size)
        return grad.permute(2, 0, 3, 1, 4).reshape(pixels, num, channels), None


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(N, heads, c, c) → (N, heads·c, heads·c) with the blocks on the diagonal."""
    num, heads, size, _ = blocks.shape
    if heads == 1:
        return blocks[:, 0]
    return torch.diag_embed(blocks.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2).reshape(num, heads * size, heads * size)
