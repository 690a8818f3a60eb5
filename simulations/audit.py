"""What can be seen of an image in an update? `python -m simulations.audit` attacks one, as a curious coordinator could.

Gradient inversion as in Geiping et al. (arXiv:2003.14053): search for the image whose gradient points where the update points
(cosine distance, total variation as prior, Adam on the sign of the gradient). The attacker knows the model, the loss and the
optimiser, and gets the easiest prey: one small patch of a brain, a small network at its published start, and no
other site in between. Writes docs/results/audit.json and audit.png. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from client.site import load_site
from simulations.bench.transcription import restore
from simulations.hospitals import build_hospitals
from tat_core.config import PrivacyConfig, TrainConfig, load_config
from tat_core.data.patches import sample_batch
from tat_core.data.prepared import PreparedSplit, StoredCase, open_split, prepare
from tat_core.dpsgd import PatientSgd
from tat_core.model.allocator import tune_allocator
from tat_core.model.reference import to_published
from tat_core.model.tat import TAT, build_model
from tat_core.train import make_optimiser, train

_SMOOTH = 0.01  # width over which the attacker rounds off |x|, whose gradient says nothing about its size


@dataclass(frozen=True)
class Case:
    """An update to attack.

    Attributes
    ----------
    steps, batch : int
        Local steps, and patches in each.
    adam : bool
        Whether AdamW made the update, or it is the bare gradient.
    noise : float or None
        Noise multiplier of a private step; None without privacy.
    """

    steps: int
    batch: int
    adam: bool
    noise: float | None = None


CASES = {
    "gradient of one patch": Case(1, 1, adam=False),
    "one step of AdamW, one patch": Case(1, 1, adam=True),
    "20 steps of AdamW, 4 patches each": Case(20, 4, adam=True),
    "private gradient, noise 0.01": Case(1, 1, adam=False, noise=0.01),
    "private gradient, noise 1": Case(1, 1, adam=False, noise=1.0),
}


def main() -> None:
    """Attack every case and write what was found."""
    parser = argparse.ArgumentParser(description="Gradient inversion of one update.")
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--side", type=int, default=32, help="of the patch, in pixels")
    parser.add_argument("--hospitals", type=Path, default=Path("data/hospitals-demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)
    build_hospitals(options.hospitals, "demo")
    folder = load_site(options.hospitals / "mri-pd" / "site.yaml").data["MRI"]
    one, many = _one_patch(open_split(prepare(folder), "train"), options.side), open_split(prepare(folder), "train")
    truth = sample_batch({"MRI": one}, 1, options.side, np.random.default_rng(0)).lq[0, 0].numpy()
    guesses: dict[str, np.ndarray] = {"the mean of the patch": np.full_like(truth, truth.mean())}
    with Progress() as progress:
        bar = progress.add_task("attacking", total=len(CASES) * options.iterations)
        for name, case in CASES.items():
            model = build_model(replace(load_config("demo").model, kernel_init="published", task_code=False), seed=1)
            state = to_published(model)
            update = make_update(model, one if case.batch == 1 else many, case, options.side)
            guesses[name] = invert(state, update, case.adam, options.side, options.iterations, lambda: progress.advance(bar))
    results = {name: similarity(truth, guess) for name, guess in guesses.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "audit.json").write_text(json.dumps({**vars(options), "results": results}, indent=1, default=str) + "\n")
    draw(truth, guesses, results, options.output / "audit.png")
    table = Table("what left", "PSNR, dB", "SSIM")
    for name, values in results.items():
        table.add_row(name, f"{values['psnr_db']:.1f}", f"{values['ssim']:.2f}")
    Console(width=100).print(table)


def make_update(model: TAT, split: PreparedSplit, case: Case, side: int) -> dict[str, Tensor]:
    """What the site would send, negated, by published name: the direction in which the loss rises."""
    splits = {"MRI": split}
    config = TrainConfig(patch_size=side, batch_size=case.batch, lr=2e-3, weight_decay=0.0, schedule="constant")
    if case.adam:
        before = {name: value.clone() for name, value in to_published(model).items()}
        optimiser = make_optimiser(model, config)
        train(model, splits, config, rng=np.random.default_rng(0), num_steps=case.steps, optimiser=optimiser)
        return {name: before[name] - value for name, value in to_published(model).items()}
    privacy = PrivacyConfig(enabled=True, clip_norm=0.1 if case.noise is not None else 1e9)
    PatientSgd(privacy, case.noise or 0.0, 1.0, np.random.default_rng(1).bytes).set_gradients(model, splits, side)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data.copy_(parameter.grad)
    return to_published(model)


def invert(
    state: dict[str, Tensor], update: dict[str, Tensor], adam: bool, side: int, iterations: int, on_step: Callable[[], None]
) -> np.ndarray:
    """The low-quality image, (side, side) in 0..1, that explains an update best."""
    state = {name: value.detach().clone().requires_grad_() for name, value in state.items()}
    names = [name for name, value in update.items() if bool(value.any())]
    target = torch.cat([update[name].detach().flatten() for name in names])
    generator = torch.Generator().manual_seed(0)
    lq = (0.3 + 0.05 * torch.randn(1, 1, side, side, generator=generator)).requires_grad_()
    change = (0.01 * torch.randn(1, 1, side, side, generator=generator)).requires_grad_()  # hq = lq + change
    optimiser = torch.optim.Adam([{"params": [lq], "lr": 0.03}, {"params": [change], "lr": 0.005}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for _ in range(iterations):
        optimiser.zero_grad()
        difference = restore(state, lq) - (lq + change)
        loss = torch.sqrt(difference.square() + _SMOOTH**2).mean()
        gradients = torch.autograd.grad(loss, [state[name] for name in names], create_graph=True)
        guess = torch.cat([gradient.flatten() for gradient in gradients])
        if adam:  # its first step takes little more than the sign of the gradient
            guess = guess / torch.sqrt(guess.square() + guess.detach().square().median() + 1e-20)
        cost = 1 - torch.nn.functional.cosine_similarity(guess, target, dim=0) + 0.01 * total_variation(lq)
        for variable, gradient in zip((lq, change), torch.autograd.grad(cost, (lq, change)), strict=True):
            variable.grad = gradient.sign()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            lq.clamp_(0, 1)
        on_step()
    return lq.detach()[0, 0].numpy()


def total_variation(image: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels."""
    return image.diff(dim=-1).abs().mean() + image.diff(dim=-2).abs().mean()


def similarity(truth: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM of a guess, data range that of the true patch."""
    span = float(truth.max() - truth.min())
    return {
        "psnr_db": float(peak_signal_noise_ratio(truth, guess, data_range=span)),
        "ssim": float(structural_similarity(truth, guess, data_range=span)),
    }


def draw(truth: np.ndarray, guesses: dict[str, np.ndarray], results: dict[str, Any], path: Path) -> None:
    """The true patch beside what each attack found."""
    figure, axes = plt.subplots(1, len(guesses) + 1, figsize=(2.1 * (len(guesses) + 1), 2.8), layout="constrained")
    for axis, (name, image) in zip(axes, {"true patch": truth, **guesses}.items(), strict=True):
        axis.imshow(image, cmap="gray", vmin=truth.min(), vmax=truth.max())
        score = f"\n{results[name]['psnr_db']:.1f} dB, SSIM {results[name]['ssim']:.2f}" if name in results else ""
        axis.set_title(name.replace(", ", ",\n") + score, fontsize=7)
        axis.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _one_patch(split: PreparedSplit, side: int) -> PreparedSplit:
    """The centre of the middle slice, as a data set of one patient."""
    lq, hq = split.pair(len(split) // 2)
    top, left = (lq.shape[0] - side) // 2, (lq.shape[1] - side) // 2
    window = slice(top, top + side), slice(left, left + side)
    return PreparedSplit(split.task, [StoredCase("one", "one", np.stack([lq[window], hq[window]])[:, None])])


if __name__ == "__main__":
    main()
