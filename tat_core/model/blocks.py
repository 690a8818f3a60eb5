"""Transformer blocks of TAT. Features are (B, H, W, C) throughout, so 1×1 convolutions and norms are plain matrix operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tat_core.model.attention import channel_attention
from tat_core.model.depthwise import depthwise_per_image, gated_gelu


def conv3x3(in_channels: int, out_channels: int, bias: bool = False, groups: int = 1) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias, groups=groups)


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution to (B, H, W, C) features; the permuted view is channels_last, so nothing is copied."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class KernelMix(nn.Module):
    """Mix a shared depth-wise kernel with one generated per image: ``weight + gate · generated``.

    A leaf of its own, so that its output's gradient is the kernel's gradient per image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 3, 3))
        self.gate = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, generated: Tensor) -> Tensor:
        """(B, C, 3, 3) generated kernels → (B, C, 3, 3) kernels to apply."""
        return self.weight + self.gate * generated


class HeadTemperature(nn.Module):
    """Scale the attention scores of each head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, scores: Tensor) -> Tensor:
        """(..., heads, c, c) → same."""
        return scores * self.weight


class Attention(nn.Module):
    """Attention between channels (Restormer's transposed attention), with a shared or an image's own depth-wise kernel.

    Parameters
    ----------
    channels, heads : int
    window : int
        Images larger than this (pixels at this level) are attended in overlapping windows whose results are averaged.
    adaptive : bool
        Whether the depth-wise kernel takes a generated part.
    """

    def __init__(self, channels: int, heads: int, window: int, adaptive: bool) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.depthwise = KernelMix(3 * channels) if adaptive else conv3x3(3 * channels, 3 * channels, groups=3 * channels)
        self.temperature = HeadTemperature(heads)
        self.project = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor, generated: Tensor | None) -> Tensor:
        """(B, H, W, C) features, (B, 3C, 3, 3) generated kernels or None → (B, H, W, C)."""
        qkv = apply_depthwise(self.depthwise, self.qkv(x), generated)
        return channel_attention(qkv, self.heads, self.window, self.temperature, self.project)


class FeedForward(nn.Module):
    """Gated feed-forward network with a shared or an image's own depth-wise kernel."""

    def __init__(self, channels: int, hidden: int, adaptive: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, 2 * hidden, bias=False)
        self.depthwise = KernelMix(2 * hidden) if adaptive else conv3x3(2 * hidden, 2 * hidden, groups=2 * hidden)
        self.project = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor, generated: Tensor | None) -> Tensor:
        """(B, H, W, C) features, (B, 2·hidden, 3, 3) generated kernels or None → (B, H, W, C)."""
        return self.project(gated_gelu(apply_depthwise(self.depthwise, self.expand(x), generated)))


def apply_depthwise(depthwise: nn.Module, x: Tensor, generated: Tensor | None) -> Tensor:
    """Depth-wise 3×3 convolution of (B, H, W, C) features with the module's kernel, or its mix with the generated one."""
    if isinstance(depthwise, nn.Conv2d):
        return convolve(depthwise, x)
    if generated is None:
        raise ValueError("apply_depthwise: expected generated kernels for an adaptive block, got None; pass TREN's output")
    return depthwise_per_image(x, depthwise(generated))


class Block(nn.Module):
    """Attention and feed-forward, each on normalised features and added to what came in."""

    def __init__(self, channels: int, heads: int, hidden: int, window: int, adaptive: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads, window, adaptive)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, hidden, adaptive)

    def forward(self, x: Tensor, generated: tuple[Tensor, Tensor] | tuple[None, None]) -> Tensor:
        """(B, H, W, C) features and the level's (attention, feed-forward) kernels → (B, H, W, C)."""
        x = x + self.attention(self.attention_norm(x), generated[0])
        return x + self.feed_forward(self.feed_forward_norm(x), generated[1])


def shrink(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Halve the height and width, double the channels: a convolution, then 2×2 pixels into channels."""
    y = F.pixel_unshuffle(conv(x.permute(0, 3, 1, 2)), 2)
    return y.permute(0, 2, 3, 1).contiguous()


def enlarge(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Double the height and width, halve the channels: a convolution, then channels into 2×2 pixels."""
    y = F.pixel_shuffle(conv(x.permute(0, 3, 1, 2)), 2)
    return y.permute(0, 2, 3, 1).contiguous()
