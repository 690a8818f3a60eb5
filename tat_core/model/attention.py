"""Attention between channels, over the whole image or over windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_EPS = 1e-12


def channel_attention(
    qkv: Tensor, heads: int, window: int, temperature: Callable[[Tensor], Tensor], project: Callable[[Tensor], Tensor]
) -> Tensor:
    """Attend between the channels of each head and project the result.

    With q, k, v of one head as (pixels, c) matrices the result is ``v · softmax(temperature(q̂ᵀk̂))ᵀ``, where ^ divides each
    channel by its norm over the pixels. Norms divide the c×c scores instead of q and k, and the output projection is applied
    to the c×c maps instead of to every pixel. Images larger than the window are attended in equal overlapping windows and
    averaged where these overlap.

    Parameters
    ----------
    qkv : torch.Tensor (B, H, W, 3C)
    heads : int
    window : int
        Largest side, in pixels, that is attended as one.
    temperature : (B, heads, c, c) → same
    project : linear map on the last dimension, C → C, without bias

    Returns
    -------
    torch.Tensor (B, H, W, C)
    """
    batch, height, width, channels = qkv.shape
    channels //= 3
    if height <= window and width <= window:
        flat = qkv.reshape(batch, height * width, 3 * channels)
        maps = attention_maps(flat, heads, temperature, project)
        return torch.bmm(flat[..., 2 * channels :], maps).view(batch, height, width, channels)

    rows, cols = window_index(height, window), window_index(width, window)
    (num_rows, high), (num_cols, wide) = rows.shape, cols.shape
    parts = qkv[:, rows][:, :, :, cols].permute(0, 1, 3, 2, 4, 5).reshape(batch * num_rows * num_cols, high * wide, 3 * channels)
    out = torch.bmm(parts[..., 2 * channels :], attention_maps(parts, heads, temperature, project))
    out = out.view(batch, num_rows, num_cols, high, wide, channels).permute(0, 1, 3, 2, 4, 5)
    out = out.reshape(batch, num_rows * high, num_cols * wide, channels)
    total = out.new_zeros(batch, height, num_cols * wide, channels).index_add(1, rows.flatten(), out)
    total = out.new_zeros(batch, height, width, channels).index_add(2, cols.flatten(), total)
    counts = rows.flatten().bincount()[:, None] * cols.flatten().bincount()
    return total / counts[..., None]


def attention_maps(
    qkv: Tensor, heads: int, temperature: Callable[[Tensor], Tensor], project: Callable[[Tensor], Tensor]
) -> Tensor:
    """(N, pixels, 3C) → (N, C, C) matrices that take an image's v, pixel by pixel, to the projected result."""
    num, pixels, channels = qkv.shape
    channels //= 3
    q, k, _ = qkv.view(num, pixels, 3, heads, channels // heads).permute(2, 0, 3, 4, 1)
    norms = torch.linalg.vector_norm(qkv[..., : 2 * channels], dim=1).clamp_min(_EPS)
    q_norm, k_norm = norms.view(num, 2, heads, channels // heads).unbind(1)
    scores = q @ k.transpose(-2, -1) / (q_norm[..., None] * k_norm[..., None, :])
    maps = temperature(scores).softmax(-1)
    return project(block_diagonal(maps.transpose(-2, -1)))


def block_diagonal(blocks: Tensor) -> Tensor:
    """(N, heads, c, c) → (N, heads·c, heads·c) with the blocks on the diagonal."""
    num, heads, size, _ = blocks.shape
    if heads == 1:
        return blocks[:, 0]
    return torch.diag_embed(blocks.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2).reshape(num, heads * size, heads * size)


def window_index(size: int, window: int) -> Tensor:
    """Positions (number of windows, window) along one side: evenly stepped windows of which the last ends with the image."""
    window = min(size, window)
    count = math.ceil(size / window)
    step = window if count == 1 else math.ceil((size - window) / (count - 1))
    starts = torch.arange(count) * step
    return starts.clamp_max(size - window)[:, None] + torch.arange(window)
