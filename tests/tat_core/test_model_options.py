"""Checkpointing changes nothing but memory; bf16 stays close; the benchmark's transcription agrees in every gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from simulations.bench.transcription import restore
from tat_core.config import ModelConfig
from tat_core.model.reference import from_published, published_name, to_published
from tat_core.model.tat import TAT, build_model

SMALL = ModelConfig(dim=16, num_blocks=(1, 2, 1, 1), num_refinement_blocks=1, tren_features=16, tren_code=32)


@pytest.fixture(scope="module")
def model() -> TAT:
    """Published form, with gates open and norms stirred so that every gradient is alive."""
    built = build_model(SMALL, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 1 or name.endswith("gate"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            elif name.startswith("tren."):
                parameter.mul_(3)
    return built


def gradients(model: TAT, lq: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(lq) - 0.5).abs().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-7)) for name in ours)


@pytest.mark.parametrize("size", [(3, 1, 128, 128), (1, 1, 200, 208)])
def test_gradients_are_the_transcriptions(model: TAT, size: tuple[int, ...]) -> None:
    lq = torch.rand(size, generator=torch.Generator().manual_seed(1))
    parameters = {name: tensor.requires_grad_() for name, tensor in to_published(model).items()}
    (restore(parameters, lq) - 0.5).abs().mean().backward()
    theirs = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    ours = {published_name(name): grad for name, grad in gradients(model, lq).items()}
    assert worst({name: grad.reshape(theirs[name].shape) for name, grad in ours.items()}, theirs) < 1e-4


def variant(model: TAT, config: ModelConfig) -> TAT:
    return from_published(to_published(model), config)


def test_checkpointing_gives_the_same_gradients(model: TAT) -> None:
    lq = torch.rand(2, 1, 40, 48)
    again = gradients(variant(model, replace(SMALL, checkpointing=True)), lq)
    assert worst(again, gradients(model, lq)) == 0


def test_bf16_stays_close_and_returns_fp32(model: TAT) -> None:
    lq = torch.rand(2, 1, 64, 64)
    coarse = variant(model, replace(SMALL, precision="bf16"))
    with torch.no_grad():
        exact, rounded = model(lq), coarse(lq)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * (exact - lq).norm()
    ours, exactly = (torch.cat([g.flatten() for g in gradients(m, lq).values()]) for m in (coarse, model))
    assert (ours - exactly).norm() < 0.1 * exactly.norm()
