"""The weights: which tensors a checkpoint must have, and the typed trees that the model runs on.

Two halves. The *table* (`text_tensors`, `mtp_tensors`, `vision_tensors`) declares every tensor by name, shape and
role; loading, quantizing and the report of missing or misshapen tensors are driven by it. The *trees*
(`TextWeights` and what it holds) are immutable and generic in the backend's array type.

Names are edgeq's neutral ones: the hub's, without `model.language_model.` and with `visual.` for `model.visual.`.
Values in the trees are neutral too, whatever the file's conventions were: a norm's `gain` is the factor that is
applied (1 + w for the zero-centred norms), `decay` is -exp(A_log), the convolution is [channels, width], and value
heads are grouped by key head. Vectors are float32; matrices keep their storage (see `Matrix`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from math import prod
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from edgeq.config import ModelConfig, TextConfig, VisionConfig

A = TypeVar("A")
B = TypeVar("B")

__all__ = [
    "AttentionWeights",
    "DeltaNetWeights",
    "LayerWeights",
    "MLPWeights",
    "Matrix",
    "QMatrix",
    "Role",
    "TensorSpec",
    "TextWeights",
    "all_tensors",
    "map_text",
    "mtp_tensors",
    "text_tensors",
    "text_weights",
    "vision_tensors",
]


# --- the table -------------------------------------------------------------------------------------------------------


class Role(Enum):
    """What a tensor is for; decides how it is read and whether a recipe may quantize it."""

    LINEAR = "linear"  # [out, in], quantizable
    EMBEDDING = "embedding"  # [vocabulary, hidden], quantizable; also the head where tied
    GATE = "gate"  # [value heads, hidden]: DeltaNet's a and b projections, tiny and sensitive
    CONV = "conv"  # [channels, 1, width], depthwise
    NORM = "norm"  # [n], zero-centred: y = x * (1 + w)
    GATED_NORM = "gated norm"  # [n], plain: y = x * w
    DECAY = "decay"  # A_log [value heads]
    VECTOR = "vector"  # dt_bias, biases
    VISION = "vision"  # carried, shapes checked; the vision path gives them roles of their own


class TensorSpec(NamedTuple):
    """One tensor that a checkpoint must hold."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def size(self) -> int:
        return prod(self.shape)


def text_tensors(c: TextConfig) -> Iterator[TensorSpec]:
    """Every tensor of the language model, in file order of the layers."""
    yield TensorSpec("embed_tokens.weight", (c.vocab_size, c.hidden_size), Role.EMBEDDING)
    for i, kind in enumerate(c.layer_types):
        yield from _layer_tensors(c, f"layers.{i}.", kind)
    yield TensorSpec("norm.weight", (c.hidden_size,), Role.NORM)
    if not c.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size), Role.LINEAR)


def mtp_tensors(c: TextConfig) -> Iterator[TensorSpec]:
    """The multi-token-prediction head: one gated-attention layer between two norms and a merge."""
    if not c.mtp_num_hidden_layers:
        return
    yield TensorSpec("mtp.fc.weight", (c.hidden_size, 2 * c.hidden_size), Role.LINEAR)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield TensorSpec(f"mtp.{norm}.weight", (c.hidden_size,), Role.NORM)
    yield from _layer_tensors(c, "mtp.layers.0.", "full_attention")


def _layer_tensors(c: TextConfig, prefix: str, kind: str) -> Iterator[TensorSpec]:
    def tensor(name: str, role: Role, *shape: int) -> TensorSpec:
        return TensorSpec(prefix + name, shape, role)

    hidden = c.hidden_size
    yield tensor("input_layernorm.weight", Role.NORM, hidden)
    if kind == "linear_attention":
        yield tensor("linear_attn.in_proj_qkv.weight", Role.LINEAR, c.conv_dim, hidden)
        yield tensor("linear_attn.in_proj_z.weight", Role.LINEAR, c.value_dim, hidden)
        yield tensor("linear_attn.in_proj_b.weight", Role.GATE, c.linear_num_value_heads, hidden)
        yield tensor("linear_attn.in_proj_a.weight", Role.GATE, c.linear_num_value_heads, hidden)
        yield tensor("linear_attn.conv1d.weight", Role.CONV, c.conv_dim, 1, c.linear_conv_kernel_dim)
        yield tensor("linear_attn.A_log", Role.DECAY, c.linear_num_value_heads)
        yield tensor("linear_attn.dt_bias", Role.VECTOR, c.linear_num_value_heads)
        yield tensor("linear_attn.norm.weight", Role.GATED_NORM, c.linear_value_head_dim)
        yield tensor("linear_attn.out_proj.weight", Role.LINEAR, hidden, c.value_dim)
    else:
        yield tensor("self_attn.q_proj.weight", Role.LINEAR, 2 * c.attention_dim, hidden)
        yield tensor("self_attn.k_proj.weight", Role.LINEAR, c.kv_dim, hidden)
        yield tensor("self_attn.v_proj.weight", Role.LINEAR, c.kv_dim, hidden)
        yield tensor("self_attn.o_proj.weight", Role.LINEAR, hidden, c.attention_dim)
        yield tensor("self_attn.q_norm.weight", Role.NORM, c.head_dim)
        yield tensor("self_attn.k_norm.weight", Role.NORM, c.head_dim)
    yield tensor("post_attention_layernorm.weight", Role.NORM, hidden)
    yield tensor("mlp.gate_proj.weight", Role.LINEAR, c.intermediate_size, hidden)
    yield tensor("mlp.up_proj.weight", Role.LINEAR, c.intermediate_size, hidden)
    yield tensor("mlp.down_proj.weight", Role.LINEAR, hidden, c.intermediate_size)


def vision_tensors(v: VisionConfig) -> Iterator[TensorSpec]:
    """Every tensor of the vision tower and its merger."""

    def affine(name: str, *shape: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"visual.{name}.weight", shape, Role.VISION)
        yield TensorSpec(f"visual.{name}.bias", shape[:1], Role.VISION)

    hidden, merged = v.hidden_size, v.hidden_size * v.spatial_merge_size**2
    yield from affine("patch_embed.proj", hidden, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield TensorSpec("visual.pos_embed.weight", (v.num_position_embeddings, hidden), Role.VISION)
    for i in range(v.depth):
        yield from affine(f"blocks.{i}.norm1", hidden)
        yield from affine(f"blocks.{i}.norm2", hidden)
        yield from affine(f"blocks.{i}.attn.qkv", 3 * hidden, hidden)
        yield from affine(f"blocks.{i}.attn.proj", hidden, hidden)
        yield from affine(f"blocks.{i}.mlp.linear_fc1", v.intermediate_size, hidden)
        yield from affine(f"blocks.{i}.mlp.linear_fc2", hidden, v.intermediate_size)
    yield from affine("merger.norm", hidden)
    yield from affine("merger.linear_fc1", merged, merged)
    yield from affine("merger.linear_fc2", v.out_hidden_size, merged)


def all_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """The language model's, the MTP head's and the vision tower's tensors."""
    yield from text_tensors(config.text)
    yield from mtp_tensors(config.text)
    if config.vision is not None:
        yield from vision_tensors(config.vision)


# --- the trees -------------------------------------------------------------------------------------------------------


class QMatrix(NamedTuple, Generic[A]):
    """A group-quantized matrix [out, in]: weight = scale * code + bias.

    codes: uint32 [out, in * bits / 32], every row one little-endian stream of `bits`-bit codes, lowest bit first.
    scales, biases: [out, in / group_size], float16, float32 or bfloat16.

    That is MLX's layout. GGUF's types (edgeq.quant.ggml) leave something out, which takes no memory here either:
    block_scales, block_biases: float16 [out, in / 128 or 256]; scales (biases) are int8 then, in units of these.
    biases None: bias = -zero * scale.
    iq4: a 4-bit code is a place in the table edgeq.quant.affine.IQ4, which has the codes proper, of 8 bits.
    """

    codes: A
    scales: A
    biases: A | None
    bits: int
    group_size: int
    block_scales: A | None = None
    block_biases: A | None = None
    zero: int = 0
    iq4: bool = False

    @property
    def arrays(self) -> list[A]:
        """The arrays that it is made of."""
        return [x for x in (self.codes, self.scales, self.biases, *self[5:7]) if x is not None]

    def map(self, convert: Callable[[A], B]) -> QMatrix[B]:
        """`convert` applied to every array."""

        def optional(x: A | None) -> B | None:
            return None if x is None else convert(x)

        return QMatrix(
            convert(self.codes), convert(self.scales), optional(self.biases), self.bits, self.group_size,
            optional(self.block_scales), optional(self.block_biases), self.zero, self.iq4,
        )  # fmt: skip


Matrix: TypeAlias = A | QMatrix[A]
"""A matrix [out, in]: an array (float32, float16 or bfloat16) or a QMatrix."""


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
