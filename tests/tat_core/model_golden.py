"""The golden values of the published network and the weights that they belong to (tests/golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tat_core.model.allocator import tune_allocator

tune_allocator()  # the full network's tests take a third of the time

GOLDEN = Path(__file__).parents[1] / "golden"
OUTPUTS = load_file(GOLDEN / "outputs.safetensors")
SHAPES = json.loads((GOLDEN / "shapes.json").read_text())


def fill(name: str, shape: list[int], prefix: str = "") -> Tensor:
    r = np.random.RandomState(zlib.crc32((prefix + name).encode())).standard_normal(shape)
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


def published_state() -> dict[str, Tensor]:
    return {name: fill(name, shape) for name, shape in SHAPES["tat"].items()}
