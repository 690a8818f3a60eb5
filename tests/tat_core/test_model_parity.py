"""The published network's golden values, to the last digit that fp32 allows (tests/golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tat_core.config import ModelConfig
from tat_core.model.reference import from_published, to_published
from tat_core.model.tat import TAT, build_model

GOLDEN = Path(__file__).parents[1] / "golden"
OUTPUTS = load_file(GOLDEN / "outputs.safetensors")
SHAPES = json.loads((GOLDEN / "shapes.json").read_text())
SMALL = ModelConfig(dim=16, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, tren_features=16, tren_code=32)


def fill(name: str, shape: list[int]) -> Tensor:
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    part = name.rsplit(".", 1)[-1]
    if part == "temperature" or (part == "weight" and ".norm" in name):
        values = 1 + 0.1 * r
    elif part in ("bias", "lambda_dw", "dw_kernel"):
        values = r * {"bias": 0.1, "lambda_dw": 0.5, "dw_kernel": 1 / 3}[part]
    else:
        values = r / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def golden_image(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape).astype(np.float32))


def relative_error(ours: Tensor, golden: Tensor) -> float:
    return float((ours - golden).norm() / golden.norm())


@pytest.fixture(scope="module")
def published_state() -> dict[str, Tensor]:
    return {name: fill(name, shape) for name, shape in SHAPES["tat"].items()}


@pytest.fixture(scope="module")
def published(published_state: dict[str, Tensor]) -> TAT:
    return from_published(published_state)


@pytest.mark.parametrize("key", [key for key in OUTPUTS if key.startswith("tat.")])
def test_outputs_are_the_published_ones(published: TAT, key: str) -> None:
    _, seed, size = key.split(".")
    image = golden_image(int(seed), tuple(int(n) for n in size.split("x")))
    with torch.no_grad():
        restored = published(image)
    # The image itself is part of the output, so the residual is the stricter measure.
    assert relative_error(restored - image, OUTPUTS[key] - image) < 1e-4


def test_published_checkpoint_survives_both_ways(published: TAT, published_state: dict[str, Tensor]) -> None:
    back = to_published(published)
    assert back.keys() == published_state.keys()
    assert all(torch.equal(back[name], published_state[name]) for name in back)


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
