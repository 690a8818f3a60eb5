"""The published TAT, operation by operation, as the yardstick of the benchmark. Written plainly and slow on purpose.

Parameters are a dictionary under the published names; tests hold the result to the golden values. For the benchmark and its
tests alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]


def restore(parameters: Parameters, lq: Tensor) -> Tensor:
    """(B, 1, H, W) → (B, 1, H, W), sides multiples of 8; above a batch of one only at 128×128."""
    p = parameters
    skip1 = _encode(p, "encoder_level1", _conv3(p, "patch_embed.proj", lq), 1)
    skip2 = _encode(p, "encoder_level2", _down(p, "down1_2", skip1), 2)
    skip3 = _encode(p, "encoder_level3", _down(p, "down2_3", skip2), 4)
    deepest = _down(p, "down3_4", skip3)
    kernels = _generate(p, deepest)
    x = _decode(p, "latent", deepest, 8, kernels)
    x = F.conv2d(torch.cat([_up(p, "up4_3", x), skip3], 1), p["reduce_chan_level3.weight"])
    x = _decode(p, "decoder_level3", x, 4, kernels)
    x = F.conv2d(torch.cat([_up(p, "up3_2", x), skip2], 1), p["reduce_chan_level2.weight"])
    x = _decode(p, "decoder_level2", x, 2, kernels)
    decoded = _decode(p, "decoder_level1", torch.cat([_up(p, "up2_1", x), skip1], 1), 1, kernels)
    refined = _decode(p, "refinement", decoded, 1, kernels)
    x = F.gelu(_conv3(p, "reduce_final.0", torch.cat([skip1, decoded, refined], 1)))
    return _conv3(p, "output", F.conv2d(x, p["reduce_final.2.weight"])) + lq


def _conv3(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), padding=1)


def _down(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.pixel_unshuffle(_conv3(p, f"{name}.body.0", x), 2)


def _up(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.pixel_shuffle(_conv3(p, f"{name}.body.0", x), 2)


def _depth(p: Parameters, stage: str) -> int:
    return len({name.split(".")[1] for name in p if name.startswith(f"{stage}.")})


def _encode(p: Parameters, stage: str, x: Tensor, heads: int) -> Tensor:
    for index in range(_depth(p, stage)):
        block = f"{stage}.{index}"
        x = x + _attention(p, f"{block}.attn", _norm(p, f"{block}.norm1", x), heads, None)
        x = x + _feed_forward(p, f"{block}.ffn", _norm(p, f"{block}.norm2", x), None)
    return x


def _decode(p: Parameters, stage: str, x: Tensor, heads: int, kernels: dict[str, Tensor]) -> Tensor:
    level = {"latent": "latent", "decoder_level3": "level3", "decoder_level2": "level2"}.get(stage, "level1")
    for index in range(_depth(p, stage)):
        block = f"{stage}.{index}"
        x = x + _attention(p, f"{block}.attn", _norm(p, f"{block}.norm1", x), heads, kernels[f"{level}_attn"])
        x = x + _feed_forward(p, f"{block}.ffn", _norm(p, f"{block}.norm2", x), kernels[f"{level}_ffn"])
    return x


def _norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    mean = tokens.mean(-1, keepdim=True)
    variance = tokens.var(-1, keepdim=True, unbiased=False)
    tokens = (tokens - mean) / torch.sqrt(variance + 1e-5) * p[f"{name}.body.weight"] + p[f"{name}.body.bias"]
    return tokens.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()


def _depthwise(p: Parameters, name: str, shared: str, x: Tensor, generated: Tensor | None) -> Tensor:
    if generated is None:
        return F.conv2d(x, p[f"{name}.{shared}.weight"], padding=1, groups=x.shape[1])
    batch, channels, height, width = x.shape
    kernel = p[f"{name}.dw_kernel"] + p[f"{name}.lambda_dw"] * generated
    folded = x.reshape(1, batch * channels, height, width)
    out = F.conv2d(folded, kernel.reshape(batch * channels, 1, 3, 3), padding=1, groups=batch * channels)
    return out.reshape(batch, channels, height, width)


def _feed_forward(p: Parameters, name: str, x: Tensor, generated: Tensor | None) -> Tensor:
    x = _depthwise(p, name, "dwconv", F.conv2d(x, p[f"{name}.project_in.weight"]), generated)
    gate, value = x.chunk(2, dim=1)
    return F.conv2d(F.gelu(gate) * value, p[f"{name}.project_out.weight"])


def _attention(p: Parameters, name: str, x: Tensor, heads: int, generated: Tensor | None) -> Tensor:
    qkv = _depthwise(p, name, "qkv_dwconv", F.conv2d(x, p[f"{name}.qkv.weight"]), generated)
    if tuple(x.shape[-2:]) == (128 // heads, 128 // heads):
        out = _attend(qkv, heads, p[f"{name}.temperature"])
    else:
        out = _attend_windows(qkv, heads, p[f"{name}.temperature"])
    return F.conv2d(out, p[f"{name}.project_out.weight"])


def _attend(qkv: Tensor, heads: int, temperature: Tensor) -> Tensor:
    batch, _, height, width = qkv.shape
    q, k, v = (part.reshape(batch, heads, -1, height * width) for part in qkv.chunk(3, dim=1))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scores = ((q @ k.transpose(-2, -1)) * temperature).softmax(-1)
    return (scores @ v).reshape(batch, -1, height, width)


def _attend_windows(qkv: Tensor, heads: int, temperature: Tensor) -> Tensor:
    batch, channels, height, width = qkv.shape
    if batch != 1:
        raise ValueError(f"transcription: expected one image where windows are used, got {batch}; pass them one by one")
    high, wide = min(height, 192 // heads), min(width, 192 // heads)
    places = [(top, left) for top in _starts(height, high) for left in _starts(width, wide)]
    parts = torch.cat([qkv[:, :, top : top + high, left : left + wide] for top, left in places])
    outs = _attend(parts, heads, temperature)
    total, count = qkv.new_zeros(1, channels // 3, height, width), qkv.new_zeros(1, 1, height, width)
    for out, (top, left) in zip(outs, places, strict=True):
        total[0, :, top : top + high, left : left + wide] += out
        count[0, 0, top : top + high, left : left + wide] += 1.0
    return total / count


def _starts(size: int, window: int) -> list[int]:
    count = math.ceil(size / window)
    step = window if count == 1 else math.ceil((size - window) / (count - 1))
    return [min(index * step, size - window) for index in range(count)]


def _generate(p: Parameters, deepest: Tensor) -> dict[str, Tensor]:
    x = F.gelu(_conv3(p, "tren.E.0", F.pixel_shuffle(deepest.clone().detach(), 4)))
    for block in ("tren.E.2", "tren.E.3"):
        x = x + _conv3(p, f"{block}.body.2", F.gelu(_conv3(p, f"{block}.body.0", x)))
    for name in ("tren.E.4", "tren.E.6", "tren.E.8"):
        x = F.gelu(_conv3(p, name, x))
    code = F.adaptive_avg_pool2d(x, 1).flatten(1)
    for name in ("tren.mlp.0", "tren.mlp.2"):
        code = F.gelu(F.linear(code, p[f"{name}.weight"]))
    return {
        f"{level}_{part}": F.gelu(F.linear(code, p[f"tren.kernel_{level}_{part}.0.weight"])).view(len(code), -1, 1, 3, 3)
        for level in ("latent", "level3", "level2", "level1")
        for part in ("ffn", "attn")
    }
