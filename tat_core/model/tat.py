"""TAT, the task-adaptive transformer (arXiv:2512.14550): one network that restores CT, MRI and PET slices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tat_core.config import ModelConfig
from tat_core.model.blocks import Block, conv3x3, enlarge, shrink, to_features, to_images
from tat_core.model.hypernet import Kernels, Tren
from tat_core.model.init import wake
from tat_core.model.pointwise import Pointwise

MULTIPLE = 8
MIN_SIDE = 16
_PRECISE = ("tren.mlp", "tren.attention", "tren.feed_forward")  # computed in fp32 whatever the precision
_WINDOW = 192  # pixels at the input's scale: one and a half published training patches


class TAT(nn.Module):
    """Restore an image by a U-shaped transformer whose decoder convolves with kernels generated from that image.

    Parameters
    ----------
    config : ModelConfig
        Size and variant; the defaults are the published network of 41.7 M parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, depth, heads = config.dim, config.num_blocks, config.heads

        def stage(level: int, channels: int, count: int, adaptive: bool) -> nn.ModuleList:
            hidden = int(channels * config.ffn_expansion)
            return nn.ModuleList(Block(channels, heads[level], hidden, _WINDOW >> level, adaptive) for _ in range(count))

        self.embed = conv3x3(1, dim)
        self.encoder1 = stage(0, dim, depth[0], adaptive=False)
        self.down1 = conv3x3(dim, dim // 2)
        self.encoder2 = stage(1, 2 * dim, depth[1], adaptive=False)
        self.down2 = conv3x3(2 * dim, dim)
        self.encoder3 = stage(2, 4 * dim, depth[2], adaptive=False)
        self.down3 = conv3x3(4 * dim, 2 * dim)
        self.latent = stage(3, 8 * dim, depth[3], adaptive=True)
        self.up3 = conv3x3(8 * dim, 16 * dim)
        self.merge3 = Pointwise(8 * dim, 4 * dim)
        self.decoder3 = stage(2, 4 * dim, depth[2], adaptive=True)
        self.up2 = conv3x3(4 * dim, 8 * dim)
        self.merge2 = Pointwise(4 * dim, 2 * dim)
        self.decoder2 = stage(1, 2 * dim, depth[1], adaptive=True)
        self.up1 = conv3x3(2 * dim, 4 * dim)
        self.decoder1 = stage(0, 2 * dim, depth[0], adaptive=True)
        self.refinement = stage(0, 2 * dim, config.num_refinement_blocks, adaptive=True)
        self.fuse = conv3x3(5 * dim, dim)
        self.fuse_mix = Pointwise(dim, dim)
        self.output = conv3x3(dim, 1)
        widths = {
            name: (3 * factor * dim, 2 * int(factor * dim * config.ffn_expansion))
            for name, factor in (("level1", 2), ("level2", 2), ("level3", 4), ("latent", 8))
        }
        awake = config.kernel_init == "awake"
        self.tren = Tren(8 * dim, config.tren_features, config.tren_code, widths, normalise=awake, task_code=config.task_code)

    def forward(self, lq: Tensor, kernels: Kernels | None = None) -> Tensor:
        """Restore a batch of images.

        Parameters
        ----------
        lq : torch.Tensor (B, 1, H, W), float32 in [0, 1]
            Any batch size; height and width at least 16.
        kernels : Kernels, optional
            Depth-wise kernels to use instead of generating them from ``lq``: those of the whole image, for its tiles.

        Returns
        -------
        torch.Tensor (B, 1, H, W)
            The restored images, not clipped.

        Raises
        ------
        ValueError
            Not (B, 1, H, W), or a side below 16.
        """
        padded = _pad(lq)
        with self._autocast(lq):
            residual = self._residual(padded, kernels)
        return (residual.to(lq.dtype) + padded)[..., : lq.shape[-2], : lq.shape[-1]]

    def prepare_to_restore(self) -> TAT:
        """Make this a network that only restores, to the same bits but faster, and return it.

        In bf16 the weights are then kept in the precision of the products, to which autocast would turn them for every image
        anew. What makes the kernels stays in fp32, in which it is computed.
        """
        if self.config.precision == "bf16":
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(_PRECISE):
                    module.to(torch.bfloat16)
        return self.eval()

    def pooled_features(self, lq: Tensor) -> Tensor:
        """What TREN keeps of an image, (B, F). Averaged over an image's tiles it serves ``tren.kernels`` for all of them."""
        with self._autocast(lq):
            return self.tren.pooled(self.deepest_features(lq))

    def deepest_features(self, lq: Tensor) -> Tensor:
        """(B, 1, H, W) → what TREN sees of it, (H/8, W/8, B, 8·dim)."""
        return self._encode(_pad(lq))[-1]

    def _residual(self, padded: Tensor, kernels: Kernels | None) -> Tensor:
        skip1, skip2, skip3, deepest = self._encode(padded)
        if kernels is None:
            kernels = self.tren(deepest)
        x = self._run(self.latent, deepest, kernels["latent"])
        x = self.merge3(torch.cat((enlarge(self.up3, x), skip3), -1))
        x = self._run(self.decoder3, x, kernels["level3"])
        x = self.merge2(torch.cat((enlarge(self.up2, x), skip2), -1))
        x = self._run(self.decoder2, x, kernels["level2"])
        decoded = self._run(self.decoder1, torch.cat((enlarge(self.up1, x), skip1), -1), kernels["level1"])
        refined = self._run(self.refinement, decoded, kernels["level1"])
        x = self.fuse(to_images(torch.cat((skip1, decoded, refined), -1)))
        return self.output(to_images(self.fuse_mix(to_features(F.gelu(x)))))

    def _encode(self, padded: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        none = (None, None)
        skip1 = self._run(self.encoder1, to_features(self.embed(to_images(to_features(padded)))), none)
        skip2 = self._run(self.encoder2, shrink(self.down1, skip1), none)
        skip3 = self._run(self.encoder3, shrink(self.down2, skip2), none)
        return skip1, skip2, skip3, shrink(self.down3, skip3)

    def _run(self, blocks: nn.ModuleList, x: Tensor, kernels: tuple[Tensor, Tensor] | tuple[None, None]) -> Tensor:
        for block in blocks:
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, kernels, use_reentrant=False)
            else:
                x = block(x, kernels)
        return x

    def _autocast(self, like: Tensor) -> torch.autocast:
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


def build_model(config: ModelConfig, seed: int) -> TAT:
    """Build a TAT whose initial weights are a pure function of the configuration and the seed.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TAT(config)
        if config.kernel_init == "awake":
            wake(model, model.tren, model.deepest_features(torch.rand(1, 1, 64, 64)))
    return model


def _pad(lq: Tensor) -> Tensor:
    """Reflect at the lower and right edge up to a multiple of 8."""
    if lq.ndim != 4 or lq.shape[1] != 1 or min(lq.shape[-2:]) < MIN_SIDE:
        raise ValueError(
            f"restore: expected images (B, 1, H, W) with sides of at least {MIN_SIDE} pixels, got {tuple(lq.shape)}; "
            "pad smaller images first"
        )
    bottom, right = -lq.shape[-2] % MULTIPLE, -lq.shape[-1] % MULTIPLE
    return F.pad(lq, (0, right, 0, bottom), mode="reflect") if bottom or right else lq
