"""The published gradients: the balanced loss, its weight network and every parameter's gradient norm."""

import json

import pytest
import torch
from model_golden import GOLDEN, OUTPUTS, SHAPES, fill, golden_image, published_state
from torch import Tensor

from tat_core.loss import balanced_loss, per_sample_l1
from tat_core.model.reference import from_published, published_name
from tat_core.model.weight_net import WeightNet

WEIGHT_NET = {
    "entry": "fc_in",
    "norm": "res_block.norm",
    "expand": "res_block.fc1",
    "contract": "res_block.fc2",
    "exit": "fc_out",
}


def published_weight_name(name: str) -> str:
    part, kind = name.split(".")
    return f"weight_estimator.{WEIGHT_NET[part]}.{kind}"


def published_weight_net() -> WeightNet:
    net = WeightNet()
    names = {name: published_weight_name(name) for name in net.state_dict()}
    assert sorted(names.values()) == sorted(SHAPES["awl"])
    net.load_state_dict({name: fill(theirs, SHAPES["awl"][theirs], "awl.") for name, theirs in names.items()})
    return net


def assert_norms(gradients: dict[str, Tensor], golden: dict[str, float]) -> None:
    assert gradients.keys() == golden.keys()
    # Some gradients are zero up to rounding: those are held to the scale of the others.
    floor = 1e-6 * max(golden.values())
    wrong = {
        n: (float(g.norm()), golden[n]) for n, g in gradients.items() if abs(g.norm() - golden[n]) > 1e-3 * golden[n] + floor
    }
    assert not wrong


def test_loss_and_gradients_are_the_published_ones() -> None:
    model, net = from_published(published_state()), published_weight_net()
    lq, hq = golden_image(101, (2, 1, 128, 128)), golden_image(102, (2, 1, 128, 128))
    restored = model(lq)
    loss = per_sample_l1(restored, hq)
    stats = torch.stack((per_sample_l1(lq, hq), per_sample_l1(lq, restored), loss), 1).detach()
    weights = net(stats)
    objective = balanced_loss(loss, weights.square())
    objective.backward()

    golden = json.loads((GOLDEN / "gradient_norms.json").read_text())
    assert objective.item() == pytest.approx(golden["loss"], rel=1e-5)
    torch.testing.assert_close(stats, OUTPUTS["loss.101.102.stats"], rtol=1e-4, atol=0)
    torch.testing.assert_close(weights, OUTPUTS["loss.101.102.w"], rtol=1e-4, atol=0)
    assert_norms({published_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}, golden["tat"])
    assert_norms({published_weight_name(n): p.grad for n, p in net.named_parameters() if p.grad is not None}, golden["awl"])


def test_weight_net_starts_at_one() -> None:
    torch.testing.assert_close(WeightNet()(torch.rand(5, 3)), torch.ones(5))
