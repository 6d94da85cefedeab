"""Outlier channels injected without changing the function, as in real checkpoints (the rescaling pairs of AWQ).

A few channels of a layer's input get a norm gain 8 or 16 times larger, and the matrix columns that read them are made
smaller by the same factor; likewise MLP channels between `up_proj` and `down_proj`, and value channels between `v_proj`
and `o_proj`. The logits stay the same; quantizers see small columns on which large activations fall.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .model import Attention, Layer, Model, RMSNorm

Factors = Callable[[int], Tensor]


def inject(model: Model, share: float = 0.01, seed: int = 0) -> None:
    """Rescale `share` of the channels of every pair, in place. Powers of two, so that bfloat16 rounds no matrix."""
    rng = torch.Generator().manual_seed(seed)

    def factors(channels: int) -> Tensor:
        chosen = torch.randperm(channels, generator=rng)[: max(1, round(share * channels))]
        out = torch.ones(channels)
        out[chosen] = 8.0 * 2.0 ** torch.randint(0, 2, chosen.shape, generator=rng)
        return out

    with torch.no_grad():
        for layer in [*model.text.layers, *model.mtp.layers]:
            inject_layer(layer, factors)


def inject_layer(layer: Layer, factors: Factors) -> None:
    mixer = layer.self_attn if layer.kind == "full_attention" else layer.linear_attn
    readers = [m for name, m in mixer.named_children() if name.startswith(("in_proj", "q_proj", "k_proj", "v_proj"))]
    scale_norm(layer.input_layernorm, readers, factors)
    scale_norm(layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj], factors)
    f = factors(layer.mlp.up_proj.out_features)
    layer.mlp.up_proj.weight *= f[:, None]
    layer.mlp.down_proj.weight /= f
    if isinstance(mixer, Attention):
        scale_values(mixer, factors)


def scale_norm(norm: RMSNorm, readers: list[nn.Linear], factors: Factors) -> None:
    """Gain 1 + w times f, columns divided by the ratio of the gains as bfloat16 stores them."""
    f = factors(norm.weight.numel())
    old = 1 + norm.weight.bfloat16().float()
    stored = (old * f - 1).bfloat16().float()
    ratio = torch.where(f == 1, f, (1 + stored) / old)
    norm.weight.copy_(torch.where(f == 1, norm.weight, stored))
    for reader in readers:
        reader.weight /= ratio


def scale_values(attention: Attention, factors: Factors) -> None:
    """v_proj rows times f; the o_proj columns that read them, in every query head of the group, divided by f."""
    s = attention.s
    f = factors(s.kv_heads * s.head_dim)
    attention.v_proj.weight *= f[:, None]
    spread = f.view(s.kv_heads, 1, s.head_dim).expand(-1, s.heads // s.kv_heads, -1).reshape(-1)
    attention.o_proj.weight /= spread
