"""Outlier channels injected without changing the function, as in real checkpoints (the rescaling pairs of AWQ).

A channel of a layer's input is made `factor` times smaller in the norm's gain and its matrix columns larger by the same
factor, or the other way round; likewise MLP channels between `up_proj` and `down_proj`, and value channels between
`v_proj` and `o_proj`. In exact arithmetic the logits stay the same; quantizers see heavy-tailed weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .model import Attention, Layer, Model


def inject(model: Model, share: float = 0.01, low: float = 8, high: float = 30, seed: int = 0) -> None:
    """Rescale `share` of the channels of every pair, in place, by factors in [low, high]."""
    rng = torch.Generator().manual_seed(seed)

    def factors(channels: int) -> Tensor:
        chosen = torch.randperm(channels, generator=rng)[: max(1, round(share * channels))]
        out = torch.ones(channels)
        out[chosen] = low + (high - low) * torch.rand(len(chosen), generator=rng)
        return out

    with torch.no_grad():
        for layer in [*model.text.layers, *model.mtp.layers]:
            inject_layer(layer, factors)


def inject_layer(layer: Layer, factors) -> None:
    mixer = layer.self_attn if layer.kind == "full_attention" else layer.linear_attn
    inputs = [
        m for name, m in mixer.named_children() if isinstance(m, nn.Linear) and name not in ("o_proj", "out_proj")
    ]
    scale_norm(layer.input_layernorm, inputs, factors)
    scale_norm(layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj], factors)
    f = factors(layer.mlp.up_proj.out_features)
    layer.mlp.up_proj.weight *= f[:, None]
    layer.mlp.down_proj.weight /= f
    if isinstance(mixer, Attention):
        scale_values(mixer, factors)


def scale_norm(norm: nn.Module, readers: list[nn.Linear], factors) -> None:
    """Gain (1 + w) / f, columns * f: the weights carry the outliers."""
    f = factors(norm.weight.numel())
    norm.weight.copy_((1 + norm.weight) / f - 1)
    for reader in readers:
        reader.weight *= f


def scale_values(attention: Attention, factors) -> None:
    """v_proj rows * f, and the o_proj columns that read them, in every query head of the group, / f."""
    s = attention.s
    f = factors(s.kv_heads * s.head_dim)
    attention.v_proj.weight *= f[:, None]
    spread = f.view(s.kv_heads, 1, s.head_dim).expand(-1, s.heads // s.kv_heads, -1).reshape(-1)
    attention.o_proj.weight /= spread
