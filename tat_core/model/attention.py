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
    gram, norms, v = _Gram.apply(qkv, heads)
    norms = norms.clamp_min(_EPS)
    maps = temperature(gram / (norms[:, 0, :, :, None] * norms[:, 1, :, None, :])).softmax(-1)
    maps = project(_block_diagonal(maps.transpose(-2, -1)))
    return torch.bmm(v.transpose(0, 1), maps).transpose(0, 1)


class _Gram(torch.autograd.Function):
    """qᵀk per image and head, the norms of q's and k's channels, and v.

    Written out so that the norms' gradient costs one scaled copy and everything lands in one gradient tensor.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels, N, 3C) → (N, heads, c, c), (N, 2, heads, c), (pixels, N, C)."""
        q, k, v = _split_heads(qkv, heads)
        gram = torch.matmul(q.mT, k)
        precise = torch.promote_types(qkv.dtype, torch.float32)
        # Three times as fast as vector_norm over the first dimension.
        norms = qkv[..., : qkv.shape[-1] // 3 * 2].to(precise).square().sum(0).sqrt()
        norms = norms.view(gram.shape[0], 2, heads, -1)
        ctx.save_for_backward(qkv, norms)
        return gram, norms, v

    @staticmethod
    def backward(ctx: Any, grad_gram: Tensor, grad_norms: Tensor, grad_v: Tensor) -> tuple[Tensor, None]:
        qkv, norms = ctx.saved_tensors
        heads, channels = norms.shape[2], qkv.shape[-1] // 3
        grad = torch.empty_like(qkv)
        grad[..., 2 * channels :] = grad_v
        torch.mul(qkv[..., : 2 * channels], (grad_norms / norms.clamp_min(_EPS)).flatten(1), out=grad[..., : 2 * channels])
        q, k, _ = _split_heads(qkv, heads)
        grad_q, grad_k, _ = _split_heads(grad, heads)
        if heads > 1:
            grad_q.add_(k @ grad_gram.mT)
            grad_k.add_(q @ grad_gram)
            return grad, None
        for image in range(qkv.shape[1]):  # the widest level, where a temporary as large as q would cost
            grad_q[image, 0].addmm_(k[image, 0], grad_gram[image, 0].T)
            grad_k[image, 0].addmm_(q[image, 0], grad_gram[image, 0])
        return grad, None


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pixels, N, 3C) → q and k as views (N, heads, pixels, c), and v (pixels, N, C)."""
    pixels, num, channels = qkv.shape
    parts = qkv.view(pixels, num, 3, heads, channels // 3 // heads).permute(2, 1, 3, 0, 4)
    return parts[0], parts[1], qkv[..., channels // 3 * 2 :]


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(N, heads, c, c) → (N, heads·c, heads·c) with the blocks on the diagonal."""
    num, heads, size, _ = blocks.shape
    if heads == 1:
        return blocks[:, 0]
    return torch.diag_embed(blocks.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2).reshape(num, heads * size, heads * size)
