"""The table: every tensor that a checkpoint must have, by name, shape, part and role.

Loading, quantizing and the report of missing or misshapen tensors are driven by it. Names are edgeq's neutral ones (see
`edgeq.formats.names`).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from math import prod
from typing import NamedTuple

from edgeq.config import ModelConfig, TextConfig, VisionConfig

__all__ = ["Part", "Role", "TensorSpec", "all_tensors", "mtp_tensors", "text_tensors", "vision_tensors"]


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


class TensorSpec(NamedTuple):
    """One tensor that a checkpoint must hold."""

    name: str
    shape: tuple[int, ...]
    role: Role
    part: Part = Part.TEXT

    @property
    def size(self) -> int:
        return prod(self.shape)


def text_tensors(c: TextConfig) -> Iterator[TensorSpec]:
    """Every tensor of the language model, in file order of the layers."""
    yield TensorSpec("embed_tokens.weight", (c.vocab_size, c.hidden_size), Role.EMBEDDING)
    for i, kind in enumerate(c.layer_types):
        yield from _layer_tensors(c, f"layers.{i}.", kind, Part.TEXT)
    yield TensorSpec("norm.weight", (c.hidden_size,), Role.NORM)
    if not c.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size), Role.LINEAR)


def mtp_tensors(c: TextConfig) -> Iterator[TensorSpec]:
    """The multi-token-prediction head: one gated-attention layer between two norms and a merge."""
    if not c.mtp_num_hidden_layers:
        return
    yield TensorSpec("mtp.fc.weight", (c.hidden_size, 2 * c.hidden_size), Role.LINEAR, Part.MTP)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield TensorSpec(f"mtp.{norm}.weight", (c.hidden_size,), Role.NORM, Part.MTP)
    yield from _layer_tensors(c, "mtp.layers.0.", "full_attention", Part.MTP)


def _layer_tensors(c: TextConfig, prefix: str, kind: str, part: Part) -> Iterator[TensorSpec]:
    def tensor(name: str, role: Role, *shape: int) -> TensorSpec:
        return TensorSpec(prefix + name, shape, role, part)

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

    def affine(name: str, role: Role, *shape: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"visual.{name}.weight", shape, role, Part.VISION)
        yield TensorSpec(f"visual.{name}.bias", shape[:1], Role.VECTOR, Part.VISION)

    hidden, merged = v.hidden_size, v.hidden_size * v.spatial_merge_size**2
    patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield from affine("patch_embed.proj", Role.PATCH, hidden, *patch)
    positions = (v.num_position_embeddings, hidden)
    yield TensorSpec("visual.pos_embed.weight", positions, Role.POSITION, Part.VISION)
    for i in range(v.depth):
        yield from affine(f"blocks.{i}.norm1", Role.LAYER_NORM, hidden)
        yield from affine(f"blocks.{i}.norm2", Role.LAYER_NORM, hidden)
        yield from affine(f"blocks.{i}.attn.qkv", Role.LINEAR, 3 * hidden, hidden)
        yield from affine(f"blocks.{i}.attn.proj", Role.LINEAR, hidden, hidden)
        yield from affine(f"blocks.{i}.mlp.linear_fc1", Role.LINEAR, v.intermediate_size, hidden)
        yield from affine(f"blocks.{i}.mlp.linear_fc2", Role.LINEAR, hidden, v.intermediate_size)
    yield from affine("merger.norm", Role.LAYER_NORM, hidden)
    yield from affine("merger.linear_fc1", Role.LINEAR, merged, merged)
    yield from affine("merger.linear_fc2", Role.LINEAR, v.out_hidden_size, merged)


def all_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """The language model's, the MTP head's and the vision tower's tensors."""
    yield from text_tensors(config.text)
    yield from mtp_tensors(config.text)
    if config.vision is not None:
        yield from vision_tensors(config.vision)
