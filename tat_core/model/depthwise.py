"""Parameter-free operations on (B, H, W, C) features: one depth-wise kernel per image, and the gated GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_per_image(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image with its own depth-wise 3×3 kernels, zero-padded.

    Parameters
    ----------
    x : torch.Tensor (B, H, W, C)
    kernels : torch.Tensor (B, C, 3, 3)

    Returns
    -------
    torch.Tensor (B, H, W, C)
    """
    channels = x.shape[-1]
    images = x.permute(0, 3, 1, 2).split(1)
    out = [F.conv2d(image, k.unsqueeze(1), padding=1, groups=channels) for image, k in zip(images, kernels, strict=True)]
    return torch.cat(out).permute(0, 2, 3, 1).contiguous()


def gated_gelu(x: Tensor) -> Tensor:
    """``gelu(first half of the channels) · second half``: (..., 2C) → (..., C)."""
    gate, value = x.chunk(2, dim=-1)
    return F.gelu(gate) * value
