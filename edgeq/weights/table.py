"""The declaration: every tensor that a checkpoint must have, by name, shape, part and role.

It is written as the trees that the model runs on (`edgeq.weights.trees`), with a `TensorSpec` for every weight, so that
there is one list of tensors and one structure. Loading, quantizing, memory arithmetic and the report of missing or
misshapen tensors are driven by it. Names are edgeq's neutral ones (`edgeq.formats.names`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from edgeq.config import LayerKind, ModelConfig, TextConfig, VisionConfig
from edgeq.weights.trees import (
    Affine,
    AttentionWeights,
    DeltaNetWeights,
    LayerWeights,
    MergerWeights,
    MLPWeights,
    MTPWeights,
    TextWeights,
    VisionBlockWeights,
    VisionWeights,
    leaves,
)

__all__ = [
    "Part",
    "Role",
    "TensorSpec",
    "all_tensors",
    "declare_mtp",
    "declare_text",
    "declare_vision",
    "mtp_tensors",
    "text_tensors",
    "vision_tensors",
]


class Part(Enum):
    """Which part of the model a tensor belongs to. Only the language model has to be there."""

    TEXT = "text"
    MTP = "MTP head"
    VISION = "vision"


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
    LAYER_NORM = "layer norm"  # [n], plain, with a bias: y = (x - mean) / deviation * w + b
    PATCH = "patch embedding"  # [hidden, colours, frames, height, width]
    POSITION = "position embedding"  # [positions, hidden]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a checkpoint must hold."""

    name: str
    shape: tuple[int, ...]
    role: Role
    part: Part = Part.TEXT

    @property
    def size(self) -> int:
        """How many weights it has."""
        return prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied by or looked up in, and may be stored quantized; else it is a float32 vector."""
        return self.role in _MATRICES


_MATRICES = (Role.LINEAR, Role.EMBEDDING, Role.GATE, Role.POSITION, Role.PATCH)


# --- the language model ----------------------------------------------------------------------------------------------


def declare_text(c: TextConfig) -> TextWeights[TensorSpec, TensorSpec]:
    """The language model."""
    embedding = TensorSpec("embed_tokens.weight", (c.vocab_size, c.hidden_size), Role.EMBEDDING)
    head = TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size), Role.LINEAR)
    return TextWeights(
        embed_tokens=embedding,
        layers=tuple(_Layer(c, f"layers.{i}.", Part.TEXT).declare(kind) for i, kind in enumerate(c.layer_types)),
        norm=TensorSpec("norm.weight", (c.hidden_size,), Role.NORM),
        lm_head=embedding if c.tie_word_embeddings else head,
    )


def declare_mtp(c: TextConfig) -> MTPWeights[TensorSpec, TensorSpec]:
    """The multi-token-prediction head."""
    layer = _Layer(c, "mtp.", Part.MTP)
    return MTPWeights(
        fc=layer.tensor("fc.weight", Role.LINEAR, c.hidden_size, 2 * c.hidden_size),
        pre_fc_norm_embedding=layer.tensor("pre_fc_norm_embedding.weight", Role.NORM, c.hidden_size),
        pre_fc_norm_hidden=layer.tensor("pre_fc_norm_hidden.weight", Role.NORM, c.hidden_size),
        norm=layer.tensor("norm.weight", Role.NORM, c.hidden_size),
        layer=_Layer(c, "mtp.layers.0.", Part.MTP).declare("full_attention"),
    )


class _Layer:
    """Declares a decoder layer whose tensors' names begin with `prefix`."""

    def __init__(self, c: TextConfig, prefix: str, part: Part) -> None:
        self.c, self.prefix, self.part = c, prefix, part

    def tensor(self, name: str, role: Role, *shape: int) -> TensorSpec:
        return TensorSpec(self.prefix + name, shape, role, self.part)

    def declare(self, kind: LayerKind) -> LayerWeights[TensorSpec, TensorSpec]:
        hidden = self.c.hidden_size
        return LayerWeights(
            input_layernorm=self.tensor("input_layernorm.weight", Role.NORM, hidden),
            mixer=self.delta_net() if kind == "linear_attention" else self.attention(),
            post_attention_layernorm=self.tensor("post_attention_layernorm.weight", Role.NORM, hidden),
            mlp=self.mlp(),
        )

    def delta_net(self) -> DeltaNetWeights[TensorSpec, TensorSpec]:
        c, heads = self.c, self.c.linear_num_value_heads
        return DeltaNetWeights(
            in_proj_qkv=self.tensor("linear_attn.in_proj_qkv.weight", Role.LINEAR, c.conv_dim, c.hidden_size),
            in_proj_z=self.tensor("linear_attn.in_proj_z.weight", Role.LINEAR, c.value_dim, c.hidden_size),
            in_proj_b=self.tensor("linear_attn.in_proj_b.weight", Role.GATE, heads, c.hidden_size),
            in_proj_a=self.tensor("linear_attn.in_proj_a.weight", Role.GATE, heads, c.hidden_size),
            conv=self.tensor("linear_attn.conv1d.weight", Role.CONV, c.conv_dim, 1, c.linear_conv_kernel_dim),
            decay=self.tensor("linear_attn.A_log", Role.DECAY, heads),
            dt_bias=self.tensor("linear_attn.dt_bias", Role.VECTOR, heads),
            norm=self.tensor("linear_attn.norm.weight", Role.GATED_NORM, c.linear_value_head_dim),
            out_proj=self.tensor("linear_attn.out_proj.weight", Role.LINEAR, c.hidden_size, c.value_dim),
        )

    def attention(self) -> AttentionWeights[TensorSpec, TensorSpec]:
        c = self.c
        return AttentionWeights(
            q_proj=self.tensor("self_attn.q_proj.weight", Role.LINEAR, 2 * c.attention_dim, c.hidden_size),
            k_proj=self.tensor("self_attn.k_proj.weight", Role.LINEAR, c.kv_dim, c.hidden_size),
            v_proj=self.tensor("self_attn.v_proj.weight", Role.LINEAR, c.kv_dim, c.hidden_size),
            o_proj=self.tensor("self_attn.o_proj.weight", Role.LINEAR, c.hidden_size, c.attention_dim),
            q_norm=self.tensor("self_attn.q_norm.weight", Role.NORM, c.head_dim),
            k_norm=self.tensor("self_attn.k_norm.weight", Role.NORM, c.head_dim),
        )

    def mlp(self) -> MLPWeights[TensorSpec]:
        wide, hidden = self.c.intermediate_size, self.c.hidden_size
        return MLPWeights(
            gate_proj=self.tensor("mlp.gate_proj.weight", Role.LINEAR, wide, hidden),
            up_proj=self.tensor("mlp.up_proj.weight", Role.LINEAR, wide, hidden),
            down_proj=self.tensor("mlp.down_proj.weight", Role.LINEAR, hidden, wide),
        )


# --- the vision tower ------------------------------------------------------------------------------------------------


def declare_vision(v: VisionConfig) -> VisionWeights[TensorSpec, TensorSpec]:
    """The vision tower and its merger."""
    patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    positions = (v.num_position_embeddings, v.hidden_size)
    merged = v.hidden_size * v.spatial_merge_size**2
    return VisionWeights(
        patch_embed=_affine("patch_embed.proj", Role.PATCH, v.hidden_size, *patch),
        pos_embed=TensorSpec("visual.pos_embed.weight", positions, Role.POSITION, Part.VISION),
        blocks=tuple(_vision_block(v, f"blocks.{i}.") for i in range(v.depth)),
        merger=MergerWeights(
            norm=_affine("merger.norm", Role.LAYER_NORM, v.hidden_size),
            fc1=_affine("merger.linear_fc1", Role.LINEAR, merged, merged),
            fc2=_affine("merger.linear_fc2", Role.LINEAR, v.out_hidden_size, merged),
        ),
    )


def _vision_block(v: VisionConfig, prefix: str) -> VisionBlockWeights[TensorSpec, TensorSpec]:
    hidden, wide = v.hidden_size, v.intermediate_size
    return VisionBlockWeights(
        norm1=_affine(f"{prefix}norm1", Role.LAYER_NORM, hidden),
        norm2=_affine(f"{prefix}norm2", Role.LAYER_NORM, hidden),
        qkv=_affine(f"{prefix}attn.qkv", Role.LINEAR, 3 * hidden, hidden),
        proj=_affine(f"{prefix}attn.proj", Role.LINEAR, hidden, hidden),
        fc1=_affine(f"{prefix}mlp.linear_fc1", Role.LINEAR, wide, hidden),
        fc2=_affine(f"{prefix}mlp.linear_fc2", Role.LINEAR, hidden, wide),
    )


def _affine(name: str, role: Role, *shape: int) -> Affine[TensorSpec, TensorSpec]:
    return Affine(
        weight=TensorSpec(f"visual.{name}.weight", shape, role, Part.VISION),
        bias=TensorSpec(f"visual.{name}.bias", shape[:1], Role.VECTOR, Part.VISION),
    )


# --- as lists --------------------------------------------------------------------------------------------------------


def text_tensors(c: TextConfig) -> Iterator[TensorSpec]:
    """Every tensor of the language model, a tied head once."""
    return iter(dict.fromkeys(leaves(declare_text(c))))


def mtp_tensors(c: TextConfig) -> Iterator[TensorSpec]:
    """Every tensor of the MTP head, if the model has one."""
    return leaves(declare_mtp(c)) if c.mtp_num_hidden_layers else iter(())


def vision_tensors(v: VisionConfig) -> Iterator[TensorSpec]:
    """Every tensor of the vision tower."""
    return leaves(declare_vision(v))


def all_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """The language model's, the MTP head's and the vision tower's tensors."""
    yield from text_tensors(config.text)
    yield from mtp_tensors(config.text)
    if config.vision is not None:
        yield from vision_tensors(config.vision)
