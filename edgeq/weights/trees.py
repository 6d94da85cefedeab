"""The trees: the weights of each part of the model, typed and immutable.

A tree's leaves are whatever it is a tree of: in the declaration (`edgeq.weights.table`) each is a `TensorSpec`, on a
backend a vector (A) or a matrix in the backend's own form (M). `map_tree` makes one out of the other, for every part
alike.

Values are neutral, whatever the file's conventions were: a zero-centred norm's gain is 1 + w, the factor that is
applied, `decay` is -exp(A_log), the convolution is [channels, width], and value heads are grouped by key head. Vectors
are float32; matrices keep their storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

A = TypeVar("A")
M = TypeVar("M")
T = TypeVar("T")

__all__ = [
    "Affine",
    "AttentionWeights",
    "DeltaNetWeights",
    "LayerWeights",
    "MLPWeights",
    "MTPWeights",
    "MergerWeights",
    "TextWeights",
    "VisionBlockWeights",
    "VisionWeights",
    "leaves",
    "map_tree",
]


class MLPWeights(NamedTuple, Generic[M]):
    """SwiGLU feed-forward."""

    gate_proj: M
    up_proj: M
    down_proj: M


class DeltaNetWeights(NamedTuple, Generic[A, M]):
    """Gated DeltaNet mixer; rows of in_proj_qkv are [queries | keys | values]."""

    in_proj_qkv: M
    in_proj_z: M
    in_proj_b: M
    in_proj_a: M
    conv: A  # [channels, width]
    decay: A  # [value heads], -exp(A_log)
    dt_bias: A  # [value heads]
    norm: A  # gain [value head dim]
    out_proj: M


class AttentionWeights(NamedTuple, Generic[A, M]):
    """Gated attention mixer; rows of q_proj are [query | gate] for each head in turn."""

    q_proj: M
    k_proj: M
    v_proj: M
    o_proj: M
    q_norm: A  # gain [head dim]
    k_norm: A  # gain [head dim]


class LayerWeights(NamedTuple, Generic[A, M]):
    """A decoder layer: a mixer and a feed-forward, each behind a norm."""

    input_layernorm: A
    mixer: DeltaNetWeights[A, M] | AttentionWeights[A, M]
    post_attention_layernorm: A
    mlp: MLPWeights[M]


class TextWeights(NamedTuple, Generic[A, M]):
    """The language model; `lm_head` is the embedding itself where the checkpoint ties them."""

    embed_tokens: M
    layers: tuple[LayerWeights[A, M], ...]
    norm: A
    lm_head: M


class MTPWeights(NamedTuple, Generic[A, M]):
    """The multi-token-prediction head: norms of the next token's embedding and of the last hidden state, a merge of
    the two, one gated-attention layer, a norm. The embedding and lm_head are the language model's."""

    fc: M
    pre_fc_norm_embedding: A
    pre_fc_norm_hidden: A
    norm: A
    layer: LayerWeights[A, M]


class Affine(NamedTuple, Generic[A, M]):
    """A projection or a layer norm with a bias."""

    weight: M
    bias: A


class VisionBlockWeights(NamedTuple, Generic[A, M]):
    """A block of the vision tower: full attention and a feed-forward, each behind a layer norm."""

    norm1: Affine[A, A]
    norm2: Affine[A, A]
    qkv: Affine[A, M]
    proj: Affine[A, M]
    fc1: Affine[A, M]
    fc2: Affine[A, M]


class MergerWeights(NamedTuple, Generic[A, M]):
    """What makes one token of the language model out of a square of patches."""

    norm: Affine[A, A]
    fc1: Affine[A, M]
    fc2: Affine[A, M]


class VisionWeights(NamedTuple, Generic[A, M]):
    """The vision tower; the patch embedding's weight is a matrix [hidden, colours * frames * height * width]."""

    patch_embed: Affine[A, M]
    pos_embed: M
    blocks: tuple[VisionBlockWeights[A, M], ...]
    merger: MergerWeights[A, M]


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves in order; one that stands in two places comes twice."""
    if isinstance(tree, tuple):
        for branch in tree:
            yield from leaves(branch)
    else:
        yield tree


def map_tree(convert: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree of `convert(leaf)`. A leaf that stands in two places (a tied head) is converted once."""
    converted: dict[int, Any] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, tuple):
            return type(node)(*map(walk, node)) if hasattr(node, "_fields") else tuple(map(walk, node))
        if id(node) not in converted:
            converted[id(node)] = convert(node)
        return converted[id(node)]

    try:
        return walk(tree)
    finally:
        converted.clear()  # `walk` refers to itself, so what it knows would stay until the next collection of garbage
