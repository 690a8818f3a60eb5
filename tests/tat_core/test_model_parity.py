"""The published network's golden values, to the last digit that fp32 allows (tests/golden/README.md)."""

import pytest
import torch
from model_golden import OUTPUTS, golden_image, published_state
from torch import Tensor

from tat_core.config import ModelConfig
from tat_core.model.reference import from_published, to_published
from tat_core.model.tat import TAT, build_model

SMALL = ModelConfig(dim=16, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, tren_features=16, tren_code=32)


@pytest.fixture(scope="module")
def published() -> TAT:
    return from_published(published_state())


def relative_error(ours: Tensor, golden: Tensor) -> float:
    return float((ours - golden).norm() / golden.norm())


# The two sizes left to the long tests exercise nothing that 200×328 (windows) and a batch at 128² do not.
@pytest.mark.parametrize(
    "key",
    [
        "tat.1.1x1x128x128",
        "tat.2.2x1x128x128",
        pytest.param("tat.3.1x1x160x192", marks=pytest.mark.slow),
        pytest.param("tat.4.1x1x256x256", marks=pytest.mark.slow),
        "tat.5.1x1x200x328",
    ],
)
def test_outputs_are_the_published_ones(published: TAT, key: str) -> None:
    _, seed, size = key.split(".")
    image = golden_image(int(seed), tuple(int(n) for n in size.split("x")))
    with torch.no_grad():
        restored = published(image)
    # The image itself is part of the output, so the residual is the stricter measure.
    assert relative_error(restored - image, OUTPUTS[key] - image) < 1e-4


def test_published_checkpoint_survives_both_ways(published: TAT) -> None:
    back, state = to_published(published), published_state()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_ema_wrapped_checkpoint_gives_the_averaged_weights() -> None:
    model = build_model(SMALL, seed=1)
    averaged = to_published(model)
    wrapped = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    wrapped |= {f"online_model.{name}": torch.zeros_like(tensor) for name, tensor in averaged.items()}
    wrapped |= {f"ema_model.{name}": tensor for name, tensor in averaged.items()}
    again = from_published(wrapped, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("latent.0.ffn.lambda_dw"), "latent.0.ffn.lambda_dw is missing"),
        (lambda state: state.update({"tren.extra": torch.zeros(1)}), "tren.extra is unknown"),
        (lambda state: state.update({"output.weight": torch.zeros(1, 16, 1, 1)}), r"output.weight has shape \(1, 16, 1, 1\)"),
    ],
)
def test_wrong_checkpoints_are_refused_by_name(change, message: str) -> None:  # type: ignore[no-untyped-def]
    state = to_published(build_model(SMALL, seed=1))
    change(state)
    with pytest.raises(ValueError, match=message):
        from_published(state, SMALL)
