"""What a TAT costs and where its generated kernels stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tat_core.config import ModelConfig
from tat_core.groups import GROUPS, group_of
from tat_core.model.blocks import KernelMix
from tat_core.model.tat import TAT


@dataclass(frozen=True)
class ModelInfo:
    """Size and cost of a model.

    Attributes
    ----------
    parameters : dict[str, int]
        Group → number of parameters.
    forward_gflop : float
        Multiplications and additions, in 10⁹, of restoring one image of ``side``².
    step_mib : float
        Weights, gradients, AdamW's two moments and the activations kept for one such image, in MiB.
    side : int
    """

    parameters: dict[str, int]
    forward_gflop: float
    step_mib: float
    side: int


def model_info(config: ModelConfig, side: int = 128) -> ModelInfo:
    """Count a model's parameters by group, its operations and its training memory for one image."""
    model = TAT(config)
    parameters = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        parameters[group_of(name)] += parameter.numel()
    image = torch.zeros(1, 1, side, side)
    counter = FlopCounterMode(display=False)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        restored = model(image)  # held, so that no kept storage is freed and counted under a reused address
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    activations = sum(size for address, size in kept.items() if address not in own)
    del restored
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return ModelInfo(parameters, counter.get_total_flops() / 1e9, (4 * weights + activations) / 2**20, side)


@torch.no_grad()
def kernel_shares(model: TAT, images: Tensor) -> dict[str, float]:
    """How much of every mixed depth-wise kernel is generated, for given images.

    Parameters
    ----------
    model : TAT
    images : torch.Tensor (B, 1, H, W)

    Returns
    -------
    dict[str, float]
        Kernel's name → ‖gate · generated‖ / ‖shared weight‖, mean over the images.
    """
    shares: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, KernelMix):

            def record(mix: KernelMix, args: tuple[Tensor], _: Tensor, name: str = name) -> None:
                generated = (mix.gate * args[0]).flatten(1).norm(dim=1)
                shares[name] = float((generated / mix.weight.norm()).mean())

            handles.append(module.register_forward_hook(record))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return shares


def mean_shares(shares: dict[str, float], stages: Sequence[str]) -> dict[str, float]:
    """Average the shares of `kernel_shares` over each stage's kernels."""
    by_stage = {stage: [share for name, share in shares.items() if name.startswith(f"{stage}.")] for stage in stages}
    return {stage: sum(values) / len(values) for stage, values in by_stage.items() if values}
