"""Transformer blocks of TAT.

Features are (H, W, B, C) throughout: 1×1 convolutions and norms act on the last dimension, and see depthwise.py for the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tat_core.model import strips
from tat_core.model.attention import channel_attention
from tat_core.model.depthwise import depthwise_per_image, gated_gelu
from tat_core.model.pointwise import Pointwise, pointwise


def conv3x3(in_channels: int, out_channels: int, bias: bool = False) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def to_images(x: Tensor) -> Tensor:
    """(H, W, B, C) features → (B, C, H, W) images in channels_last memory; no copy for a single image.

    As flat memory in between: a mere permutation leaves a single image a stride over the batch by which convolutions do not
    recognise channels_last, and copy twice.
    """
    height, width, batch, channels = x.shape
    return x.permute(2, 0, 1, 3).flatten().view(batch, height, width, channels).permute(0, 3, 1, 2)


def to_features(images: Tensor) -> Tensor:
    """(B, C, H, W) → (H, W, B, C); the inverse of `to_images`."""
    return images.permute(2, 3, 0, 1).contiguous()


class SharedKernel(nn.Module):
    """A depth-wise 3×3 kernel, handed out once per image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 3, 3))
        nn.init.uniform_(self.weight, -1 / 3, 1 / 3)  # nn.Conv2d's default for nine inputs

    def forward(self, like: Tensor) -> Tensor:
        """(H, W, B, C) features → (B, C, 3, 3) kernels to apply to them."""
        return self.weight.expand(like.shape[2], -1, -1, -1)


class KernelMix(nn.Module):
    """Mix a shared depth-wise 3×3 kernel with one generated per image: ``weight + gate · generated``.

    A leaf of its own, so that the gradient of its output is the kernel's gradient per image.
    """

    def __init__(self, channels: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(channels, 3, 3))
        self.gate = nn.Parameter(torch.zeros(channels, 1, 1))
        nn.init.normal_(self.weight, std=std)

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
        self.qkv = Pointwise(channels, 3 * channels)
        self.depthwise = KernelMix(3 * channels, std=1.0) if adaptive else SharedKernel(3 * channels)
        self.temperature = HeadTemperature(heads)
        self.project = Pointwise(channels, channels)

    def forward(self, x: Tensor, generated: Tensor | None) -> Tensor:
        """(H, W, B, C) features, (B, 3C, 3, 3) generated kernels or None → (H, W, B, C)."""
        qkv = depthwise_per_image(self.qkv(x), self.depthwise(x if generated is None else generated))
        return channel_attention(qkv, self.heads, self.window, self.temperature, self.project)

    def added_in_strips(self, x: Tensor, norm: nn.Module, generated: Tensor | None) -> Tensor:
        """``x + self(norm(x), generated)`` without gradients."""
        part = self.qkv.weight, self.depthwise(x if generated is None else generated)
        return strips.attend(x, norm, part, self.window, self.heads, self.temperature, self.project)


class GateIn(Pointwise):
    """The feed-forward's 1×1 convolution into gate and value, each widened by zero channels to an aligned width.

    The published widths are odd numbers (127, 255, 1021); aligned ones save 11 % of a training step (docs/performance.md).
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) → (..., 2·aligned hidden)."""
        return pointwise(x, widen_halves(self.weight))


class GateOut(Pointwise):
    """The feed-forward's last 1×1 convolution; ignores the zero channels."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., aligned hidden) → (..., C)."""
        return pointwise(x, self.widened(x.shape[-1]))

    def widened(self, width: int) -> Tensor:
        """The weight with zero columns up to a width."""
        return F.pad(self.weight, (0, width - self.in_features))


def widen_halves(rows: Tensor) -> Tensor:
    """(2·hidden, ...) → (2·aligned hidden, ...): zero rows after each half, up to a multiple of 8."""
    extra = -(rows.shape[0] // 2) % 8
    if not extra:
        return rows
    return F.pad(rows.unflatten(0, (2, -1)), (0, 0) * (rows.ndim - 1) + (0, extra)).flatten(0, 1)


class FeedForward(nn.Module):
    """Gated feed-forward network with a shared or an image's own depth-wise kernel."""

    def __init__(self, channels: int, hidden: int, adaptive: bool) -> None:
        super().__init__()
        self.expand = GateIn(channels, hidden)
        self.depthwise = KernelMix(2 * hidden, std=(2 / 9) ** 0.5) if adaptive else SharedKernel(2 * hidden)
        self.project = GateOut(hidden, channels)

    def forward(self, x: Tensor, generated: Tensor | None) -> Tensor:
        """(H, W, B, C) features, (B, 2·hidden, 3, 3) generated kernels or None → (H, W, B, C)."""
        return self.project(gated_gelu(depthwise_per_image(self.expand(x), self._kernels(x, generated))))

    def added_in_strips(self, x: Tensor, norm: nn.Module, generated: Tensor | None) -> Tensor:
        """``x + self(norm(x), generated)`` without gradients, written into ``x``."""
        weights = widen_halves(self.expand.weight).chunk(2)
        parts = list(zip(weights, self._kernels(x, generated).chunk(2, 1), strict=True))
        return strips.feed_forward_(x, norm, parts, self.project.widened(len(weights[0])))

    def _kernels(self, x: Tensor, generated: Tensor | None) -> Tensor:
        return widen_halves(self.depthwise(x if generated is None else generated).transpose(0, 1)).transpose(0, 1)


class Block(nn.Module):
    """Attention and feed-forward, each on normalised features and added to what came in."""

    def __init__(self, channels: int, heads: int, hidden: int, window: int, adaptive: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads, window, adaptive)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, hidden, adaptive)

    def forward(self, x: Tensor, generated: tuple[Tensor, Tensor] | tuple[None, None]) -> Tensor:
        """(H, W, B, C) features and the level's (attention, feed-forward) kernels → (H, W, B, C)."""
        if strips.apply_to(x):
            x = self.attention.added_in_strips(x, self.attention_norm, generated[0])
            return self.feed_forward.added_in_strips(x, self.feed_forward_norm, generated[1])
        x = x + self.attention(self.attention_norm(x), generated[0])
        return x + self.feed_forward(self.feed_forward_norm(x), generated[1])


def shrink(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Halve the height and width, double the channels: a convolution, then 2×2 pixels into channels."""
    return to_features(F.pixel_unshuffle(conv(to_images(x)), 2))


def enlarge(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Double the height and width, halve the channels: a convolution, then channels into 2×2 pixels."""
    return to_features(F.pixel_shuffle(conv(to_images(x)), 2))
