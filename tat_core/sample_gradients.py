"""Each sample's own gradient, for a whole batch at once, by a rule for each kind of leaf module.

What Opacus does, with rules of our own: its rule for convolutions is silently wrong for channels_last inputs, and the features
are (H, W, B, C). A leaf watches its input and its output's gradient; from the two the rule makes the gradients of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from tat_core.model.blocks import GateIn, GateOut, HeadTemperature, KernelMix, SharedKernel
from tat_core.model.hypernet import TaskCode
from tat_core.model.pointwise import Pointwise

# Without the hypernetwork's own parameters among the wanted ones, no gradient leads through these to the image.
_NO_WAY_TO_THE_IMAGE = (SharedKernel, KernelMix, TaskCode)
# (leaf, its input, the gradient of its output) → gradients per sample, each (B, *parameter.shape), in the order of its parameters
Rule = Callable[[Any, Tensor, Tensor], list[Tensor]]


def per_sample_gradients(
    model: nn.Module, lq: Tensor, loss_of: Callable[[Tensor], Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """Name of each of the parameters `names` → (B, *shape), the gradient of each sample's loss.

    Parameters
    ----------
    model : torch.nn.Module
        A TAT.
    lq : torch.Tensor (B, 1, H, W)
        More than one only if they are small enough to be attended as a whole.
    loss_of : callable
        Restored images → (B,) losses.
    names : collection of str

    Raises
    ------
    ValueError
        A leaf with such parameters has no rule, or one took no part in the loss.
    """
    leaves = {name: leaf for name, leaf in model.named_modules() if _own_names(name, leaf) & set(names)}
    found: dict[str, Tensor] = {}
    # Nothing is computed but what leads from the loss to these.
    ends = [lq.detach().requires_grad_()]

    def watch(name: str, leaf: nn.Module) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        rule = _RULES.get(type(leaf))
        if rule is None:
            raise ValueError(f"privacy: expected a rule for {name} ({type(leaf).__name__}), got none; add one to {__name__}")
        parameters = [f"{name}.{parameter}" for parameter, _ in leaf.named_parameters(recurse=False)]

        def keep(taken: Tensor, grad: Tensor) -> None:
            precise = torch.promote_types(torch.promote_types(taken.dtype, grad.dtype), torch.float32)
            for parameter, value in zip(parameters, rule(leaf, taken.to(precise), grad.to(precise)), strict=True):
                # An image in windows has a row for each.
                found[parameter] = value if len(lq) > 1 else value.sum(0, keepdim=True)

        def forward_hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if not inputs[0].requires_grad or isinstance(leaf, _NO_WAY_TO_THE_IMAGE):
                ends.extend(leaf.parameters(recurse=False))
            taken = inputs[0].detach()
            output.register_hook(lambda grad: keep(taken, grad))

        return forward_hook

    handles = [leaf.register_forward_hook(watch(name, leaf)) for name, leaf in leaves.items()]
    try:
        torch.autograd.grad(loss_of(model(ends[0])).sum(), ends, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in found:
            raise ValueError(
                f"privacy: expected a gradient for every trained parameter, got none for {name}; "
                "leave its group out of privacy.groups"
            )
        if len(found[name]) != len(lq):
            raise ValueError(
                f"privacy: expected patches within the attention window, got {tuple(lq.shape)}; lower train.patch_size"
            )
    return {name: found[name] for name in names}


def _own_names(name: str, leaf: nn.Module) -> set[str]:
    return {f"{name}.{parameter}" for parameter, _ in leaf.named_parameters(recurse=False)}


def _per_row(grad: Tensor, taken: Tensor) -> Tensor:
    """Weight gradient of a linear map, (B, out, in): of features (H, W, B, C), codes (B, C) or maps (B, rows, C)."""
    if grad.ndim == 4:
        return torch.einsum("hwbo,hwbi->boi", grad, taken)
    return torch.einsum("b...o,b...i->boi", grad, taken)


def _linear(_: nn.Linear, taken: Tensor, grad: Tensor) -> list[Tensor]:
    return [_per_row(grad, taken)]


def _gate_in(leaf: GateIn, taken: Tensor, grad: Tensor) -> list[Tensor]:
    return [_per_row(grad, taken).unflatten(1, (2, -1))[:, :, : leaf.out_features // 2].flatten(1, 2)]


def _gate_out(leaf: GateOut, taken: Tensor, grad: Tensor) -> list[Tensor]:
    return [_per_row(grad, taken[..., : leaf.in_features])]


def _layer_norm(leaf: nn.LayerNorm, taken: Tensor, grad: Tensor) -> list[Tensor]:
    normal = F.layer_norm(taken, leaf.normalized_shape, eps=leaf.eps)
    return [(grad * normal).sum((0, 1)), grad.sum((0, 1))]


def _conv(leaf: nn.Conv2d, taken: Tensor, grad: Tensor) -> list[Tensor]:
    """B images of C channels as one of B·C, so that every sample has weights, and a gradient, of its own."""
    batch, (out_channels, *kernel) = len(taken), leaf.weight.shape
    wide, wide_grad = (tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in (taken, grad))
    by_sample = conv2d_weight(wide, (batch * out_channels, *kernel), wide_grad, padding=1, groups=batch)
    weights = by_sample.view(batch, out_channels, *kernel)
    return [weights] if leaf.bias is None else [weights, grad.sum((2, 3))]


def _kernel_mix(_: KernelMix, generated: Tensor, grad: Tensor) -> list[Tensor]:
    return [grad, (grad * generated).sum((2, 3), keepdim=True)]


def _shared_kernel(_: SharedKernel, __: Tensor, grad: Tensor) -> list[Tensor]:
    return [grad]


def _task_code(_: TaskCode, __: Tensor, grad: Tensor) -> list[Tensor]:
    return [grad]


def _temperature(_: HeadTemperature, scores: Tensor, grad: Tensor) -> list[Tensor]:
    return [(grad * scores).sum((2, 3), keepdim=True)]


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    Pointwise: _linear,
    GateIn: _gate_in,
    GateOut: _gate_out,
    nn.LayerNorm: _layer_norm,
    nn.Conv2d: _conv,
    KernelMix: _kernel_mix,
    SharedKernel: _shared_kernel,
    HeadTemperature: _temperature,
    TaskCode: _task_code,
}
