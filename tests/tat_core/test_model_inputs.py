"""TAT on any batch and size, its determinism, its parameter groups and its awake hypernetwork."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tat_core.config import ModelConfig
from tat_core.groups import TASK_CODE, group_of
from tat_core.model import strips
from tat_core.model.attention import cells, channel_attention
from tat_core.model.blocks import Block, KernelMix, to_images
from tat_core.model.tat import TAT, build_model

TINY = ModelConfig(
    dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, tren_features=8, tren_code=16, kernel_init="awake", task_code=True
)


@pytest.fixture(scope="module")
def tiny() -> TAT:
    return build_model(TINY, seed=3)


@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 3), height=st.integers(16, 70), width=st.integers(16, 70))
def test_any_batch_and_size_is_restored_in_its_own_shape(batch: int, height: int, width: int) -> None:
    image = torch.rand(batch, 1, height, width)
    with torch.no_grad():
        restored = build_model(TINY, seed=3)(image)
    assert restored.shape == image.shape
    assert restored.isfinite().all()


@pytest.mark.parametrize("size", [(40, 64), (200, 216)])  # plain attention; windows at every level
def test_result_does_not_depend_on_the_rest_of_the_batch(tiny: TAT, size: tuple[int, int]) -> None:
    images = torch.rand(3, 1, *size)
    with torch.no_grad():
        together = tiny(images)
        permuted = tiny(images[[2, 0, 1]])
        alone = torch.cat([tiny(image[None]) for image in images])
    torch.testing.assert_close(permuted, together[[2, 0, 1]], rtol=0, atol=2e-6)
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-6)


def test_padding_to_a_multiple_of_eight_is_by_reflection(tiny: TAT) -> None:
    image = torch.rand(1, 1, 35, 46)
    padded = torch.nn.functional.pad(image, (0, 2, 0, 5), mode="reflect")
    with torch.no_grad():
        assert torch.equal(tiny(image), tiny(padded)[..., :35, :46])


@pytest.mark.parametrize("shape", [(1, 1, 15, 64), (1, 64, 64), (2, 3, 64, 64)])
def test_unusable_input_is_refused(tiny: TAT, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"restore: expected images \(B, 1, H, W\).*got .*; pad"):
        tiny(torch.zeros(shape))


def test_kernels_of_the_whole_image_can_be_given(tiny: TAT) -> None:
    image = torch.rand(2, 1, 64, 48)
    with torch.no_grad():
        kernels = tiny.tren.kernels(tiny.pooled_features(image))
        assert torch.equal(tiny(image, kernels), tiny(image))
        swapped = {level: (a.flip(0), f.flip(0)) for level, (a, f) in kernels.items()}
        assert not torch.allclose(tiny(image, swapped), tiny(image))


@pytest.mark.parametrize("batch", [1, 2])
def test_images_are_channels_last_as_convolutions_recognise_it(batch: int) -> None:
    features = torch.rand(6, 5, batch, 4)
    images = to_images(features)
    assert torch.equal(images, features.permute(2, 3, 0, 1))
    assert images.stride() == torch.empty(images.shape, memory_format=torch.channels_last).stride()
    assert (images.data_ptr() == features.data_ptr()) == (batch == 1)


@pytest.mark.parametrize("most", [None, 10])
@pytest.mark.parametrize(
    ("size", "window", "starts"), [(64, 192, [0]), (256, 192, [0, 64]), (328, 192, [0, 136]), (41, 24, [0, 17])]
)
def test_windows_are_evenly_stepped_and_end_with_the_image(size: int, window: int, starts: list[int], most: int | None) -> None:
    pieces = cells(size, window, most)
    edges = {0, size} | {edge for s in starts for edge in (s, min(size, s + window))}
    assert edges <= {0, *(cut.stop for cut in pieces.cuts)}
    assert [cut.start for cut in pieces.cuts] == [0, *(cut.stop for cut in pieces.cuts[:-1])]
    assert all(cut.stop - cut.start <= most for cut in pieces.cuts) if most else len(pieces.cuts) == len(edges) - 1
    for column, start in zip(pieces.cover.T.bool().tolist(), starts, strict=True):
        covered = [piece for piece, inside in zip(pieces.cuts, column, strict=True) if inside]
        assert (covered[0].start, covered[-1].stop) == (start, min(size, start + window))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 21),
    width=st.integers(1, 13),
    batch=st.integers(1, 2),
    heads=st.sampled_from([1, 2]),
    rows=st.integers(1, 22),
    precise=st.booleans(),
)
def test_strips_without_gradients_are_the_block(
    height: int, width: int, batch: int, heads: int, rows: int, precise: bool
) -> None:
    torch.manual_seed(height)
    block = Block(16, heads, 21, window=8, adaptive=True)
    torch.nn.init.normal_(block.attention.depthwise.gate)
    torch.nn.init.normal_(block.feed_forward.depthwise.gate)
    x = torch.randn(height, width, batch, 16)
    generated = (torch.randn(batch, 48, 3, 3), torch.randn(batch, 42, 3, 3))
    with (
        mock.patch.object(strips, "_STRIP_BYTES", 1),
        mock.patch.object(strips, "_FEWEST_ROWS", rows),
        torch.autocast("cpu", torch.bfloat16, enabled=not precise),
    ):
        whole = block(x, generated).detach()
        with torch.no_grad():
            in_strips = block(x, generated)
    assert in_strips.dtype == whole.dtype
    # In bf16 either is up to 0.08 standard deviations from the exact block (300 draws).
    torch.testing.assert_close(in_strips, whole, rtol=0, atol=(2e-5 if precise else 0.2) * float(whole.std()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "side"), [(1, 32), (2, 24), (1, 200)])
def test_a_network_prepared_to_restore_does_so_to_the_same_bits(precision: str, batch: int, side: int) -> None:
    model = build_model(replace(TINY, precision=precision), seed=0)
    lq = torch.rand(batch, 1, side, side)
    with torch.no_grad():
        before = model(lq)
        assert torch.equal(model.prepare_to_restore()(lq), before)
    kept = {name: value.dtype for name, value in model.named_parameters()}
    assert (kept["encoder1.0.attention.qkv.weight"] == torch.bfloat16) == (precision == "bf16")
    assert kept["tren.mlp.0.weight"] == kept["latent.0.attention.depthwise.weight"] == torch.float32


def plain_attention(qkv: Tensor, heads: int, temperature: Tensor, weight: Tensor) -> Tensor:
    """The definition, one image: (H, W, 3C) → (H, W, C)."""
    height, width, channels = qkv.shape
    q, k, v = qkv.double().reshape(height * width, 3, heads, channels // 3 // heads).permute(1, 2, 3, 0)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    out = ((q @ k.mT) * temperature).softmax(-1) @ v
    return (out.permute(2, 0, 1).reshape(height, width, -1) @ weight.double().T).to(qkv.dtype)


@pytest.mark.parametrize("heads", [1, 2])
def test_windowed_attention_averages_windows(heads: int) -> None:
    qkv, weight, temperature = torch.randn(20, 13, 2, 24), torch.randn(8, 8), torch.rand(heads, 1, 1)
    ours = channel_attention(qkv, heads, 8, lambda s: s * temperature, lambda m: m @ weight.T)
    total, count = torch.zeros(20, 13, 2, 8), torch.zeros(20, 13, 1, 1)
    for top in (0, 6, 12):
        for left in (0, 5):
            for image in range(2):
                part = qkv[top : top + 8, left : left + 8, image]
                total[top : top + 8, left : left + 8, image] += plain_attention(part, heads, temperature, weight)
            count[top : top + 8, left : left + 8] += 1
    torch.testing.assert_close(ours, total / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("window", [8, 3])
def test_attention_gradient_is_exact(heads: int, window: int) -> None:
    qkv = torch.randn(3, 4, 2, 24, dtype=torch.double, requires_grad=True)
    temperature, weight = torch.rand(heads, 1, 1, dtype=torch.double), torch.randn(8, 8, dtype=torch.double)
    assert torch.autograd.gradcheck(
        lambda x: channel_attention(x, heads, window, lambda s: s * temperature, lambda m: m @ weight), qkv
    )


def test_build_is_a_pure_function_of_configuration_and_seed() -> None:
    before = torch.random.get_rng_state()
    a, b, other = (build_model(TINY, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], other[name]) for name in a)


def test_every_parameter_has_a_group_and_sits_in_a_leaf_module(tiny: TAT) -> None:
    groups = {name: group_of(name) for name, _ in tiny.named_parameters()}
    assert set(groups.values()) == {"backbone", "hypernetwork", "adapter"}
    assert groups["latent.0.attention.depthwise.gate"] == groups["output.weight"] == "adapter"
    assert groups.pop(TASK_CODE) == "adapter"
    assert all((group == "hypernetwork") == name.startswith("tren.") for name, group in groups.items())
    for module in tiny.modules():
        assert not (list(module.children()) and list(module.parameters(recurse=False)))


def test_unknown_parameter_has_no_group() -> None:
    with pytest.raises(ValueError, match="head_weight"):
        group_of("head_weight")


def kernel_shares(model: TAT, image: Tensor) -> list[float]:
    shares: list[float] = []
    for module in model.modules():
        if isinstance(module, KernelMix):
            module.register_forward_hook(
                lambda m, args, _: shares.append(float((m.gate * args[0]).norm() / (m.weight.expand_as(args[0])).norm()))
            )
    with torch.no_grad():
        model(image)
    return shares


def test_generated_kernels_sleep_as_published_and_matter_when_awake() -> None:
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    awake = kernel_shares(build_model(TINY, seed=4), image)
    assert len(awake) == 2 * 5
    assert all(0.05 < share < 0.3 for share in awake)
    asleep = ModelConfig(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, tren_features=8, tren_code=16)
    assert max(kernel_shares(build_model(asleep, seed=4), image)) == 0


def test_every_parameter_learns_from_the_first_step_when_awake(tiny: TAT) -> None:
    tiny.zero_grad()
    (tiny(torch.rand(2, 1, 32, 32)) - 0.5).abs().mean().backward()
    silent = [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
