"""The trees: the weights that the model runs on, typed, immutable and generic in the backend's array.

Values in them are neutral, whatever the file's conventions were: a norm's `gain` is the factor that is applied (1 + w
for the zero-centred norms), `decay` is -exp(A_log), the convolution is [channels, width], and value heads are grouped
by key head. Vectors are float32; matrices keep their storage (see `Matrix`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from edgeq.config import TextConfig
from edgeq.formats.qmatrix import Matrix, QMatrix

A = TypeVar("A")
B = TypeVar("B")

__all__ = [
    "AttentionWeights",
    "DeltaNetWeights",
    "LayerWeights",
    "MLPWeights",
    "TextWeights",
    "map_text",
    "text_weights",
]


class MLPWeights(NamedTuple, Generic[A]):
    """SwiGLU feed-forward."""

    gate_proj: Matrix[A]
    up_proj: Matrix[A]
    down_proj: Matrix[A]


class DeltaNetWeights(NamedTuple, Generic[A]):
    """Gated DeltaNet mixer; rows of in_proj_qkv are [queries | keys | values]."""

    in_proj_qkv: Matrix[A]
    in_proj_z: Matrix[A]
    in_proj_b: Matrix[A]
    in_proj_a: Matrix[A]
    conv: A  # [channels, width]
    decay: A  # [value heads], -exp(A_log)
    dt_bias: A  # [value heads]
    norm: A  # gain [value head dim]
    out_proj: Matrix[A]


class AttentionWeights(NamedTuple, Generic[A]):
    """Gated attention mixer; rows of q_proj are [query | gate] for each head in turn."""

    q_proj: Matrix[A]
    k_proj: Matrix[A]
    v_proj: Matrix[A]
    o_proj: Matrix[A]
    q_norm: A  # gain [head dim]
    k_norm: A  # gain [head dim]


class LayerWeights(NamedTuple, Generic[A]):
    """A decoder layer: a mixer and a feed-forward, each behind a norm."""

    input_layernorm: A
    mixer: DeltaNetWeights[A] | AttentionWeights[A]
    post_attention_layernorm: A
    mlp: MLPWeights[A]


class TextWeights(NamedTuple, Generic[A]):
    """The language model; `lm_head` is the embedding itself where the checkpoint ties them."""

    embed_tokens: Matrix[A]
    layers: tuple[LayerWeights[A], ...]
    norm: A
    lm_head: Matrix[A]


def text_weights(c: TextConfig, matrix: Callable[[str], Matrix[A]], vector: Callable[[str], A]) -> TextWeights[A]:
    """Build the tree; `matrix` and `vector` fetch a tensor by its neutral name (see the table)."""

    def mlp(p: str) -> MLPWeights[A]:
        return MLPWeights(*(matrix(f"{p}mlp.{name}_proj.weight") for name in ("gate", "up", "down")))

    def delta_net(p: str) -> DeltaNetWeights[A]:
        p += "linear_attn."
        return DeltaNetWeights(
            in_proj_qkv=matrix(f"{p}in_proj_qkv.weight"),
            in_proj_z=matrix(f"{p}in_proj_z.weight"),
            in_proj_b=matrix(f"{p}in_proj_b.weight"),
            in_proj_a=matrix(f"{p}in_proj_a.weight"),
            conv=vector(f"{p}conv1d.weight"),
            decay=vector(f"{p}A_log"),
            dt_bias=vector(f"{p}dt_bias"),
            norm=vector(f"{p}norm.weight"),
            out_proj=matrix(f"{p}out_proj.weight"),
        )

    def attention(p: str) -> AttentionWeights[A]:
        p += "self_attn."
        return AttentionWeights(
            q_proj=matrix(f"{p}q_proj.weight"),
            k_proj=matrix(f"{p}k_proj.weight"),
            v_proj=matrix(f"{p}v_proj.weight"),
            o_proj=matrix(f"{p}o_proj.weight"),
            q_norm=vector(f"{p}q_norm.weight"),
            k_norm=vector(f"{p}k_norm.weight"),
        )

    def layer(p: str, kind: str) -> LayerWeights[A]:
        return LayerWeights(
            input_layernorm=vector(f"{p}input_layernorm.weight"),
            mixer=delta_net(p) if kind == "linear_attention" else attention(p),
            post_attention_layernorm=vector(f"{p}post_attention_layernorm.weight"),
            mlp=mlp(p),
        )

    embed_tokens = matrix("embed_tokens.weight")
    return TextWeights(
        embed_tokens=embed_tokens,
        layers=tuple(layer(f"layers.{i}.", kind) for i, kind in enumerate(c.layer_types)),
        norm=vector("norm.weight"),
        lm_head=embed_tokens if c.tie_word_embeddings else matrix("lm_head.weight"),
    )


def map_text(
    weights: TextWeights[A],
    convert: Callable[[A], B],
    prepare: Callable[[QMatrix[A]], QMatrix[A]] = lambda m: m,
) -> TextWeights[B]:
    """Apply `prepare` to every quantized matrix, then `convert` to every array of the tree; a tied head stays the same
    object as the embedding."""

    def matrix(m: Matrix[A]) -> Matrix[B]:
        return prepare(m).map(convert) if isinstance(m, QMatrix) else convert(m)

    def mixer(m: DeltaNetWeights[A] | AttentionWeights[A]) -> DeltaNetWeights[B] | AttentionWeights[B]:
        leaves: list[Any] = [matrix(leaf) for leaf in m]
        return DeltaNetWeights(*leaves) if isinstance(m, DeltaNetWeights) else AttentionWeights(*leaves)

    embed_tokens = matrix(weights.embed_tokens)
    return TextWeights(
        embed_tokens=embed_tokens,
        layers=tuple(
            LayerWeights(
                convert(layer.input_layernorm),
                mixer(layer.mixer),
                convert(layer.post_attention_layernorm),
                MLPWeights(*(matrix(m) for m in layer.mlp)),
            )
            for layer in weights.layers
        ),
        norm=convert(weights.norm),
        lm_head=embed_tokens if weights.lm_head is weights.embed_tokens else matrix(weights.lm_head),
    )
