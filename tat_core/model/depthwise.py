"""Parameter-free operations on (H, W, B, C) features: one depth-wise kernel per image, and the gated GELU.

With the batch beside the channels, B images of C channels are one image of B·C channels in memory. One depth-wise kernel per
image is then an ordinary depth-wise convolution: no loop, no copy, as fast as with a shared kernel (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_per_image(x: Tensor, kernels: Tensor, pad_rows: int = 1) -> Tensor:
    """Convolve each image with its own depth-wise 3×3 kernels, zero-padded.

    Parameters
    ----------
    x : torch.Tensor (H, W, B, C)
    kernels : torch.Tensor (B, C, 3, 3)
    pad_rows : int, optional
        Zero rows above and below; without them, two rows fewer come out.

    Returns
    -------
    torch.Tensor (H, W, B, C)
    """
    height, width, batch, channels = x.shape
    wide = x.reshape(1, height, width, batch * channels).permute(0, 3, 1, 2)
    out = F.conv2d(wide, kernels.reshape(-1, 1, 3, 3), padding=(pad_rows, 1), groups=batch * channels)
    return out.permute(0, 2, 3, 1).reshape(-1, width, batch, channels)


def gated_gelu(x: Tensor) -> Tensor:
    """``gelu(first half of the channels) · second half``: (..., 2C) → (..., C)."""
    return _GatedGelu.apply(x)


class _GatedGelu(torch.autograd.Function):
    """Keeps its input alone for the backward pass and writes both halves of the gradient into one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, value = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_value = grad_x.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=grad_value)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return grad_x
