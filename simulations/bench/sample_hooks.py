"""Per-sample gradients of a whole batch at once, by a rule for each kind of leaf: the yardstick for tat_core/dpsgd.py.

What Opacus does, with rules of our own: its rule for convolutions is wrong for channels_last inputs, and the features are
(H, W, B, C). Not part of the product, because it is slower there than one patient at a time (docs/results/privacy.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tat_core.model.blocks import GateIn, GateOut, HeadTemperature, KernelMix, SharedKernel
from tat_core.model.tat import TAT

# (leaf, its input, the gradient of its output) → gradients per sample, each (B, *parameter.shape), in the order of its parameters
Rule = Callable[[Any, Tensor, Tensor], list[Tensor]]


def per_sample_gradients(model: TAT, lq: Tensor, loss_of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Name of every parameter → (B, *shape), the gradient of each sample's loss.

    Parameters
    ----------
    model : TAT
        Sides of the images must be within its attention window.
    lq : torch.Tensor (B, 1, H, W)
    loss_of : callable
        Restored images → (B,) losses.

    Raises
    ------
    ValueError
        A leaf with parameters has no rule, or did not take part.
    """
    leaves = {name: leaf for name, leaf in model.named_modules() if any(True for _ in leaf.parameters(recurse=False))}
    found: dict[str, Tensor] = {}

    def watch(name: str, leaf: nn.Module) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        rule = _RULES.get(type(leaf))
        if rule is None:
            raise ValueError(f"per-sample gradients: expected a rule for {name} ({type(leaf).__name__}), got none; add one")
        names = [f"{name}.{parameter}" for parameter, _ in leaf.named_parameters(recurse=False)]

        def forward_hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            taken = inputs[0].detach()
            output.register_hook(lambda grad: found.update(zip(names, rule(leaf, taken, grad), strict=True)))

        return forward_hook

    handles = [leaf.register_forward_hook(watch(name, leaf)) for name, leaf in leaves.items()]
    # The ordinary gradients are not wanted. What needs none of its inputs' must need one itself, or nothing would flow back.
    needed = {"tren.entry"} | {name for name, leaf in leaves.items() if isinstance(leaf, SharedKernel)}
    try:
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in needed)
        sources = [p for name in sorted(needed) for p in leaves[name].parameters()]
        lq = lq.detach().requires_grad_()
        torch.autograd.grad(loss_of(model(lq)).sum(), [lq, *sources])
    finally:
        model.requires_grad_(True)
        for handle in handles:
            handle.remove()
    for name, _ in model.named_parameters():
        if name not in found:
            raise ValueError(f"per-sample gradients: expected one for {name}, got none; it took no part in the loss")
    return found


def clipped_sum(gradients: dict[str, Tensor], clip_norm: float) -> Tensor:
    """Sum over the samples of their gradients shortened to `clip_norm`, flat in the order of names."""
    flat = torch.cat([value.flatten(1) for value in gradients.values()], 1)
    scales = (clip_norm / flat.norm(dim=1)).clamp_max(1.0)
    return scales @ flat


def _per_row(grad: Tensor, taken: Tensor) -> Tensor:
    """Weight gradient of a linear map, (B, out, in). Features are (H, W, B, C); codes (B, C) and maps (B, rows, C) start with B."""
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
    batch = len(taken)
    weight = leaf.weight.repeat(batch, 1, 1, 1)
    wide_grad, wide = grad.reshape(1, -1, *grad.shape[2:]), taken.reshape(1, -1, *taken.shape[2:])
    by_sample = torch.nn.grad.conv2d_weight(wide, weight.shape, wide_grad, padding=1, groups=batch)
    weights = by_sample.view(batch, *leaf.weight.shape)
    return [weights] if leaf.bias is None else [weights, grad.sum((2, 3))]


def _kernel_mix(_: KernelMix, generated: Tensor, grad: Tensor) -> list[Tensor]:
    return [grad, (grad * generated).sum((2, 3), keepdim=True)]


def _shared_kernel(_: SharedKernel, __: Tensor, grad: Tensor) -> list[Tensor]:
    return [grad]


def _temperature(_: HeadTemperature, scores: Tensor, grad: Tensor) -> list[Tensor]:
    return [(grad * scores).sum((2, 3), keepdim=True)]


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    GateIn: _gate_in,
    GateOut: _gate_out,
    nn.LayerNorm: _layer_norm,
    nn.Conv2d: _conv,
    KernelMix: _kernel_mix,
    SharedKernel: _shared_kernel,
    HeadTemperature: _temperature,
}
