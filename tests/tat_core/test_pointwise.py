"""1×1 convolutions: oneDNN's convolution and the matrix product are two ways to one result."""

import pytest
import torch
import torch.nn.functional as F

import tat_core.model.pointwise
from tat_core.model.pointwise import pointwise, pointwise_per_image


@pytest.fixture(autouse=True)
def an_amd_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tat_core.model.pointwise, "_BOUND_BY_MKL", True)


def test_which_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda images, *args, **more: calls.append(images.shape) or convolve(images, *args, **more))
    large, small, weight = torch.rand(128, 128, 2, 48), torch.rand(8, 8, 1, 48), torch.rand(256, 48)
    with monkeypatch.context() as another:
        another.setattr(tat_core.model.pointwise, "_BOUND_BY_MKL", False)
        pointwise(large, weight)
    pointwise(small, weight)
    pointwise(large.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        pointwise(large, weight)
    assert not calls
    pointwise(large, weight)
    pointwise_per_image(large.flatten(0, 1), torch.rand(2, 48, 256))
    assert calls == [(16, 48, 2048, 1), (16, 96, 1024, 1)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("side", [64, 67])  # 67² pixels are not whole sixteenths
def test_both_ways_give_the_same(threads: int, side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(side, side, 3, 48, generator=generator)
    weight, matrices = torch.randn(64, 48, generator=generator), torch.randn(3, 48, 64, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _agree(pointwise, F.linear, x, weight)
        # As in attention, where the values are a slice of q, k and v.
        values = torch.cat((x, x), -1).flatten(0, 1)[..., 48:]
        _agree(pointwise_per_image, lambda x, m: torch.einsum("pbi,bio->pbo", x, m), values, matrices)
    finally:
        torch.set_num_threads(before)


def _agree(ours, reference, x: torch.Tensor, weight: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    precise = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    got, expected = ours(x, weight), reference(*precise)
    assert got.shape == expected.shape
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found = [got, *torch.autograd.grad(got, (x, weight), toward)]
    wanted = [expected, *torch.autograd.grad(expected, precise, toward.double())]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * float(other.detach().abs().max()))
