"""TREN, the hypernetwork: from an image's deepest encoder features to its own depth-wise kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tat_core.model.blocks import conv3x3, to_images

LEVELS = ("level1", "level2", "level3", "latent")

Kernels = dict[str, tuple[Tensor, Tensor]]
"""Level → (attention, feed-forward) kernels, each (B, channels, 3, 3)."""


class ResidualConv(nn.Module):
    """Two convolutions with a GELU between them, added to the input."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = conv3x3(features, features, bias=True)
        self.second = conv3x3(features, features, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → same."""
        return x + self.second(F.gelu(self.first(x)))


class TaskCode(nn.Module):
    """Add a task's own vector to every image's code. A leaf of its own, for gradients per sample."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(code))

    def forward(self, code: Tensor) -> Tensor:
        """(B, C) → same."""
        return code + self.weight


class Tren(nn.Module):
    """Task representation network: one code per image, and from it every adaptive level's kernels.

    Parameters
    ----------
    in_channels : int
        Channels of the deepest features (a multiple of 16).
    features : int
        Width of the trunk; it ends at four times that.
    code : int
        Length of the code.
    widths : dict[str, tuple[int, int]]
        Level → channels of the attention's and the feed-forward's depth-wise convolution.
    normalise : bool
        Bring the code to zero mean and unit variance, so that the kernels' scale does not depend on the trunk's.
    task_code : bool
        Add a vector that each task learns of its own: from images alone the codes of all tasks come out nearly parallel
        (docs/results/awake.md).
    """

    def __init__(
        self, in_channels: int, features: int, code: int, widths: dict[str, tuple[int, int]], normalise: bool, task_code: bool
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.task = TaskCode(code) if task_code else None
        self.entry = conv3x3(in_channels // 16, features, bias=True)
        self.residual = nn.ModuleList(ResidualConv(features) for _ in range(2))
        self.trunk = nn.ModuleList(
            conv3x3(a, b) for a, b in ((features, features), (features, 2 * features), (2 * features, 4 * features))
        )
        self.mlp = nn.ModuleList((nn.Linear(4 * features, code, bias=False), nn.Linear(code, code, bias=False)))
        self.attention = nn.ModuleDict({name: nn.Linear(code, 9 * width[0], bias=False) for name, width in widths.items()})
        self.feed_forward = nn.ModuleDict({name: nn.Linear(code, 9 * width[1], bias=False) for name, width in widths.items()})

    def pooled(self, deepest: Tensor) -> Tensor:
        """(H, W, B, C) deepest features → (B, 4·features), the trunk's mean over the image (an average of tiles' means)."""
        x = F.pixel_shuffle(to_images(deepest.detach()), 4)
        x = F.gelu(self.entry(x))
        for block in self.residual:
            x = block(x)
        for conv in self.trunk:
            x = F.gelu(conv(x))
        return x.mean((2, 3))

    def kernels(self, pooled: Tensor) -> Kernels:
        """(B, 4·features) → every adaptive level's kernels, in full precision: bf16 weights cost more to make than they save."""
        with torch.autocast(pooled.device.type, enabled=False):
            code = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
            for layer in self.mlp:
                code = F.gelu(layer(code))
            if self.normalise:
                code = F.layer_norm(code, code.shape[-1:])
            if self.task is not None:
                code = F.layer_norm(self.task(code), code.shape[-1:])
            return {
                name: (_as_kernels(self.attention[name], code), _as_kernels(self.feed_forward[name], code)) for name in LEVELS
            }

    def forward(self, deepest: Tensor) -> Kernels:
        """(H, W, B, C) deepest features → every adaptive level's kernels. No gradient reaches the features."""
        return self.kernels(self.pooled(deepest))


def _as_kernels(generator: nn.Module, code: Tensor) -> Tensor:
    return torch.unflatten(F.gelu(generator(code)), 1, (-1, 3, 3))
