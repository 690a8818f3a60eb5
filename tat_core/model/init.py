"""A start at which the generated kernels matter; the published start is what the modules themselves draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tat_core.model.blocks import KernelMix
from tat_core.model.hypernet import Tren

_SHARE = 0.15  # of a mixed kernel's norm, at the start
_GELU_RMS = 0.652  # of gelu(x) for standard normal x


@torch.no_grad()
def wake(model: nn.Module, tren: Tren, features: Tensor) -> None:
    """Make the generated part about 15 % of each kernel's norm from the first step.

    The trunk brings its signal to unit scale and keeps it, the generators get inputs and give outputs of unit scale, and the
    gates open. The output starts small, so that the network starts as nearly the identity and spends no step on undoing a
    random picture.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; draws from the global random state.
    tren : Tren
        The model's hypernetwork, built with ``normalise=True``.
    features : torch.Tensor
        What some image gives as the deepest features; their scale alone is used.
    """
    model.get_parameter("output.weight").mul_(0.01)
    for module in model.modules():
        if isinstance(module, KernelMix):
            module.gate.fill_(_SHARE * module.std / _GELU_RMS)
    for name, parameter in tren.named_parameters():
        if parameter.ndim == 1:
            parameter.zero_()
        elif name.startswith(("attention.", "feed_forward.")):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    # A power of two, so that the last bits of the measured scale leave no trace in the weights.
    tren.entry.weight.mul_(2.0 ** round(-math.log2(float(features.std()))))
