"""1×1 convolutions of (H, W, B, C) features: products of pixels by a matrix.

Large ones in fp32 on an AMD processor with AVX-512 go through oneDNN's convolution instead of torch's matrix product. The latter
is MKL's, which keeps AMD's processors to AVX2: on a Zen 5 the convolution is 2.3 times as fast (docs/performance.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEWEST_PRODUCTS = 2**22  # for each thread; below, a convolution's preparations cost more than it saves
_BOUND_BY_MKL = torch.cpu.get_capabilities().get("avx512_f", False) and "AMD" in torch.cpu.get_capabilities()["cpu_name"]
_IMAGES = 16  # of fewer, torch gives MKL a single thread's 1×1 convolution as well


class Pointwise(nn.Linear):
    """A 1×1 convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return pointwise(x, self.weight)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply every pixel by the same matrix: (..., C) and (out, C) → (..., out)."""
    if not _by_convolution(x, len(weight)):
        return F.linear(x, weight)
    return _convolve(x.reshape(-1, x.shape[-1]), weight, 1).reshape(*x.shape[:-1], -1)


def pointwise_per_image(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply the pixels of each image by its own matrix: (pixels, B, C) and (B, C, out) → (pixels, B, out)."""
    if not _by_convolution(x, matrices.shape[-1]):
        return torch.bmm(x.transpose(0, 1), matrices).transpose(0, 1)
    return _convolve(x.reshape(len(x), -1), matrices.mT.flatten(0, 1), len(matrices)).reshape(*x.shape[:-1], -1)


def _by_convolution(x: Tensor, out_channels: int) -> bool:
    if not _BOUND_BY_MKL or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return x.numel() * out_channels >= torch.get_num_threads() * _FEWEST_PRODUCTS


def _convolve(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """(pixels, groups · in) and (groups · out, in) → (pixels, groups · out) as an image's."""
    images = x.contiguous().view(math.gcd(len(x), _IMAGES), -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(images, weight[:, :, None, None], groups=groups).permute(0, 2, 3, 1)
