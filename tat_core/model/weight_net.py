"""The published loss balancer's network: three L1 statistics of a sample → its weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_CHANNELS = 16


class WeightNet(nn.Module):
    """Estimate w for `tat_core.loss.balanced_loss` from what restoring a sample did (arXiv:2512.14550).

    Starts at w = 1 for every sample, as published.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(3, _CHANNELS)
        self.norm = nn.LayerNorm(_CHANNELS)
        self.expand = nn.Linear(_CHANNELS, 16 * _CHANNELS)
        self.contract = nn.Linear(16 * _CHANNELS, _CHANNELS)
        self.exit = nn.Linear(_CHANNELS, 1)
        nn.init.zeros_(self.exit.weight)
        nn.init.ones_(self.exit.bias)

    def forward(self, stats: Tensor) -> Tensor:
        """Estimate the weights.

        Parameters
        ----------
        stats : torch.Tensor (B, 3)
            L1(lq, hq), L1(lq, restored), L1(restored, hq) of each sample, detached.

        Returns
        -------
        torch.Tensor (B,)
            w, of either sign; the loss uses its square.
        """
        x = self.entry(stats)
        x = x + self.contract(F.gelu(self.expand(self.norm(x))))
        return self.exit(x).squeeze(-1)
