"""The published loss balancer's network: three L1 statistics of a sample → its weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tat_core.loss import EPSILON, balanced_loss

_CHANNELS = 16
_STEPS_A_ROUND, _LR = 100, 1e-3


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


def learn_weights(
    before: Mapping[str, list[float]], stats: Mapping[str, tuple[float, float, float]]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Train the network on every task's mean statistics for one round. Pure.

    Parameters
    ----------
    before : mapping of parameter name to its values, flat
        Empty before the first round.
    stats : mapping of task name to means of the three L1s

    Returns
    -------
    after : dict of parameter name to its values, flat
    weights : dict of task name to float
        0.5 / w², the factor of the task's loss in the published objective.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = WeightNet()
    if before:
        net.load_state_dict({name: torch.tensor(before[name]).view_as(value) for name, value in net.state_dict().items()})
    rows = torch.tensor([stats[task] for task in sorted(stats)])
    optimiser = torch.optim.Adam(net.parameters(), lr=_LR)
    for _ in range(_STEPS_A_ROUND):
        optimiser.zero_grad()
        balanced_loss(rows[:, 2], net(rows).square()).backward()
        optimiser.step()
    with torch.no_grad():
        factors = (0.5 / (net(rows).square() + EPSILON)).tolist()
    return {name: value.flatten().tolist() for name, value in net.state_dict().items()}, dict(
        zip(sorted(stats), factors, strict=True)
    )
