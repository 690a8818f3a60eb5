"""Initial weights: the published ones, and a variant whose generated kernels matter from the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tat_core.model.blocks import Attention, FeedForward, KernelMix

if TYPE_CHECKING:
    from tat_core.model.tat import TAT

_SHARE = 0.15  # of the mixed kernel's norm, at the start
_GELU_RMS = 0.652  # of gelu(x) for standard normal x
_ATTENTION_STD = 1.0
_FEED_FORWARD_STD = (2 / 9) ** 0.5


def initialise(model: TAT) -> None:
    """Fill the shared kernels as published, and wake the hypernetwork if the configuration says so.

    Linear and convolution layers keep PyTorch's default, as the published code does. ``awake`` makes the trunk keep its
    signal's scale, the generators' inputs and outputs of unit scale, and the gates such that the generated part is about
    15 % of a kernel's norm.

    Parameters
    ----------
    model : TAT
        Changed in place; draws from the global random state.
    """
    awake = model.config.kernel_init == "awake"
    for module in model.modules():
        if not isinstance(module, Attention | FeedForward) or not isinstance(module.depthwise, KernelMix):
            continue
        std = _ATTENTION_STD if isinstance(module, Attention) else _FEED_FORWARD_STD
        nn.init.normal_(module.depthwise.weight, std=std)
        if awake:
            nn.init.constant_(module.depthwise.gate, _SHARE * std / _GELU_RMS)
    if awake:
        _wake(model.tren)


@torch.no_grad()
def _wake(tren: nn.Module) -> None:
    for name, parameter in tren.named_parameters():
        if parameter.ndim == 1:
            parameter.zero_()
        elif name.startswith(("attention.", "feed_forward.")):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
