"""Checkpoints of the published network: its parameter names and shapes to ours and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tat_core.config import ModelConfig
from tat_core.model.tat import TAT

_STAGES = {
    "encoder1": "encoder_level1",
    "encoder2": "encoder_level2",
    "encoder3": "encoder_level3",
    "decoder3": "decoder_level3",
    "decoder2": "decoder_level2",
    "decoder1": "decoder_level1",
}
_BLOCK = {
    "attention_norm.": "norm1.body.",
    "feed_forward_norm.": "norm2.body.",
    "attention.temperature.weight": "attn.temperature",
    "attention.qkv.": "attn.qkv.",
    "attention.project.": "attn.project_out.",
    "attention.depthwise.gate": "attn.lambda_dw",
    "feed_forward.expand.": "ffn.project_in.",
    "feed_forward.project.": "ffn.project_out.",
    "feed_forward.depthwise.gate": "ffn.lambda_dw",
}
_ADAPTIVE_KERNEL = {"attention.depthwise.weight": "attn.dw_kernel", "feed_forward.depthwise.weight": "ffn.dw_kernel"}
_SHARED_KERNEL = {"attention.depthwise.": "attn.qkv_dwconv.", "feed_forward.depthwise.": "ffn.dwconv."}
_TOP = {
    "embed.": "patch_embed.proj.",
    "down1.": "down1_2.body.0.",
    "down2.": "down2_3.body.0.",
    "down3.": "down3_4.body.0.",
    "up3.": "up4_3.body.0.",
    "up2.": "up3_2.body.0.",
    "up1.": "up2_1.body.0.",
    "merge3.": "reduce_chan_level3.",
    "merge2.": "reduce_chan_level2.",
    "fuse.": "reduce_final.0.",
    "fuse_mix.": "reduce_final.2.",
    "output.": "output.",
}
_TREN = {
    "entry.": "E.0.",
    "residual.0.first.": "E.2.body.0.",
    "residual.0.second.": "E.2.body.2.",
    "residual.1.first.": "E.3.body.0.",
    "residual.1.second.": "E.3.body.2.",
    "trunk.0.": "E.4.",
    "trunk.1.": "E.6.",
    "trunk.2.": "E.8.",
    "mlp.0.": "mlp.0.",
    "mlp.1.": "mlp.2.",
}


def from_published(state: Mapping[str, Tensor], config: ModelConfig | None = None) -> TAT:
    """Build a TAT from a checkpoint in the published format.

    Parameters
    ----------
    state : Mapping[str, torch.Tensor]
        Published names → tensors; also an ``ema_pytorch`` wrapper's state, of which the averaged weights are taken.
    config : ModelConfig, optional
        The size that the checkpoint has; by default the published one.

    Returns
    -------
    TAT

    Raises
    ------
    ValueError
        A name is missing or unknown, or a tensor has another shape; up to five are named.
    """
    state = _unwrap_ema(state)
    model = TAT(config or ModelConfig())
    ours = model.state_dict()
    names = {name: published_name(name) for name in ours}
    problems = [f"{theirs} is missing" for theirs in names.values() if theirs not in state]
    problems += [f"{theirs} is unknown" for theirs in sorted(set(state) - set(names.values()))]
    for name, theirs in names.items():
        want = _published_shape(name, ours[name])
        if theirs in state and tuple(state[theirs].shape) != want:
            problems.append(f"{theirs} has shape {tuple(state[theirs].shape)} instead of {want}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"from_published: expected a published TAT checkpoint of this size, got {'; '.join(problems[:5])}{more}; "
            "check the file and the model configuration"
        )
    model.load_state_dict({name: state[theirs].reshape(ours[name].shape) for name, theirs in names.items()})
    return model


def to_published(model: TAT) -> dict[str, Tensor]:
    """Give the model's weights under the published names and shapes; the inverse of `from_published`."""
    return {
        published_name(name): tensor.detach().clone().reshape(_published_shape(name, tensor))
        for name, tensor in model.state_dict().items()
    }


def published_name(name: str) -> str:
    """Translate one of our parameter names into the published one."""
    head, _, rest = name.partition(".")
    if head == "tren":
        part, _, level = rest.partition(".")
        if part in ("attention", "feed_forward"):
            return f"tren.kernel_{level.removesuffix('.weight')}_{'attn' if part == 'attention' else 'ffn'}.0.weight"
        return "tren." + _replace_prefix(rest, _TREN)
    if head in _STAGES or head in ("latent", "refinement"):
        index, _, rest = rest.partition(".")
        kernels = _SHARED_KERNEL if head.startswith("encoder") else _ADAPTIVE_KERNEL
        return f"{_STAGES.get(head, head)}.{index}.{_replace_prefix(rest, _BLOCK | kernels)}"
    return _replace_prefix(name, _TOP)


def _replace_prefix(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"published_name: expected a parameter name of TAT, got {name!r}; add it to tat_core/model/reference.py")


def _published_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Published 1×1 convolutions are 4-D, kernels have a group dimension and mixed ones a batch dimension."""
    shape = tuple(tensor.shape)
    if name.startswith("tren."):
        return shape
    if ".depthwise." in name:
        return (shape[0], 1, *shape[1:]) if name.startswith("encoder") else (1, shape[0], 1, *shape[1:])
    return (*shape, 1, 1) if len(shape) == 2 else shape


def _unwrap_ema(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    prefix = "ema_model."
    averaged = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return averaged or state
