"""The model's configuration, read from `config.json`. Nothing else in edgeq reads that file's model fields.

Two layouts are understood: the multimodal one of the hub (`model_type` "qwen3_5", text settings under
`text_config`) and the text-only one ("qwen3_5_text", settings at the top). Base and chat checkpoints have the same
configuration. A key that is missing, of the wrong type or of a value edgeq does not implement is an error that
names it; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from edgeq.errors import ModelError

__all__ = ["LayerKind", "ModelConfig", "RopeConfig", "TextConfig", "VisionConfig", "read_config", "read_json"]

LayerKind = Literal["linear_attention", "full_attention"]

# No Qwen3.5 comes near these; a larger number is a damaged or hostile file, caught before anything is allocated.
_MAX_SIZE = 1 << 20
_MAX_LAYERS = 1 << 10
_MAX_POSITIONS = 1 << 26

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Partial, interleaved multimodal rotary embedding (mRoPE).

    The first `dim` of every head's entries rotate; `sections` says how many of the `dim // 2` frequencies follow
    the time, height and width axis.
    """

    theta: float
    dim: int
    sections: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The language model: `layer_types` spells out which layers are Gated DeltaNet and which gated attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[LayerKind, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    mtp_num_hidden_layers: int
    eos_token_ids: tuple[int, ...]

    @property
    def key_dim(self) -> int:
        """Width of all DeltaNet queries (and of all keys) of a token."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all DeltaNet values of a token."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: queries, keys and values side by side."""
        return 2 * self.key_dim + self.value_dim

    @property
    def attention_dim(self) -> int:
        """Width of all attention queries of a token (and of the output gate)."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all attention keys (and of all values) of a token."""
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower's sizes."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    out_hidden_size: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint: the language model, the vision tower if it has one, and the ids that stand for images."""

    text: TextConfig
    vision: VisionConfig | None = None
    name: str | None = None  # `_name_or_path`, where the checkpoint says what it is
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None


class _Section:
    """Typed access to one object of `config.json`; every error names the key's full path."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def error(self, key: str, found: object, expected: str) -> ModelError:
        return ModelError(
            f"{self.where}{key} is {found!r}, expected {expected}",
            hint="download the config.json of a Qwen3.5 checkpoint again",
        )

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.values.get(key, default)
        if value is None:
            raise self.error(key, "missing", f"a value of type {kind.__name__}")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, value, f"a value of type {kind.__name__}")
        return value

    def size(self, key: str, default: int | None = None, *, low: int = 1, high: int = _MAX_SIZE) -> int:
        value = self.get(key, int, default)
        if not low <= value <= high:
            raise self.error(key, value, f"{low} to {high}")
        return value

    def expect(self, key: str, *allowed: object) -> None:
        """A key that may be absent, but if present must have a value that edgeq implements."""
        if key in self.values and self.values[key] not in allowed:
            raise self.error(key, self.values[key], " or ".join(map(repr, allowed)))

    def section(self, key: str) -> _Section:
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, "missing" if value is None else value, "an object")
        return _Section(value, f"{self.where}{key}.")

    def ints(self, key: str, value: object) -> tuple[int, ...]:
        found = [value] if type(value) is int else value
        if not isinstance(found, Sequence) or not all(type(i) is int and i >= 0 for i in found):
            raise self.error(key, value, "an id or a list of ids")
        return tuple(found)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`; ModelError if it is not there, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", hint="give the folder of a complete checkpoint") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def read_config(path: Path) -> ModelConfig:
    """Read `path`, a config.json."""
    return parse_config(read_json(path), str(path.name))


def parse_config(values: Mapping[str, Any], name: str = "config.json") -> ModelConfig:
    """Turn the fields of a config.json into a ModelConfig; ModelError names whatever does not fit."""
    top = _Section(values, f"{name}: ")
    model_type = top.get("model_type", str)
    if model_type == "qwen3_5_text":
        return ModelConfig(_text_config(top, top), name=_name(values))
    if model_type != "qwen3_5":
        raise ModelError(
            f"{name}: model_type is {model_type!r}, expected 'qwen3_5' or 'qwen3_5_text'",
            hint="use a Qwen3.5 model: 0.8B, 2B or 4B",
        )
    return ModelConfig(
        text=_text_config(top.section("text_config"), top),
        vision=_vision_config(top.section("vision_config")) if values.get("vision_config") is not None else None,
        name=_name(values),
        image_token_id=values.get("image_token_id"),
        video_token_id=values.get("video_token_id"),
        vision_start_token_id=values.get("vision_start_token_id"),
        vision_end_token_id=values.get("vision_end_token_id"),
    )


def _name(values: Mapping[str, Any]) -> str | None:
    name = values.get("_name_or_path")
    return name if isinstance(name, str) else None


def _text_config(text: _Section, top: _Section) -> TextConfig:
    text.expect("hidden_act", "silu")
    text.expect("attn_output_gate", True)
    text.expect("attention_bias", False)
    text.expect("mtp_use_dedicated_embeddings", False)
    text.expect("output_gate_type", "swish", None)
    head_dim = text.size("head_dim")
    config = TextConfig(
        vocab_size=text.size("vocab_size"),
        hidden_size=text.size("hidden_size"),
        intermediate_size=text.size("intermediate_size"),
        layer_types=_layer_types(text),
        num_attention_heads=text.size("num_attention_heads"),
        num_key_value_heads=text.size("num_key_value_heads"),
        head_dim=head_dim,
        linear_num_key_heads=text.size("linear_num_key_heads"),
        linear_num_value_heads=text.size("linear_num_value_heads"),
        linear_key_head_dim=text.size("linear_key_head_dim"),
        linear_value_head_dim=text.size("linear_value_head_dim"),
        linear_conv_kernel_dim=text.size("linear_conv_kernel_dim", low=2, high=64),
        rms_norm_eps=text.get("rms_norm_eps", float),
        rope=_rope_config(text, head_dim),
        max_position_embeddings=text.size("max_position_embeddings", high=_MAX_POSITIONS),
        tie_word_embeddings=_tied(text, top),
        mtp_num_hidden_layers=text.size("mtp_num_hidden_layers", 0, low=0, high=1),
        eos_token_ids=_eos_token_ids(text, top),
    )
    _check_heads(text, config)
    return config


def _layer_types(text: _Section) -> tuple[LayerKind, ...]:
    count = text.size("num_hidden_layers", high=_MAX_LAYERS)
    kinds = text.values.get("layer_types")
    if kinds is None:
        interval = text.size("full_attention_interval", 4, high=_MAX_LAYERS)
        kinds = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise text.error("layer_types", kinds, f"a list of num_hidden_layers = {count} layer kinds")
    for kind in kinds:
        if kind not in get_args(LayerKind):
            raise text.error("layer_types", kind, " or ".join(map(repr, get_args(LayerKind))))
    return tuple(kinds)


def _rope_config(text: _Section, head_dim: int) -> RopeConfig:
    rope = text.section("rope_parameters")
    rope.expect("rope_type", "default")
    rope.expect("mrope_interleaved", True)
    dim = int(head_dim * rope.get("partial_rotary_factor", float, 1.0))
    sections = rope.ints("mrope_section", rope.values.get("mrope_section"))
    if dim % 2 or not 2 <= dim <= head_dim:
        raise rope.error("partial_rotary_factor", rope.values.get("partial_rotary_factor"), "an even rotary width")
    if len(sections) != 3 or sum(sections) != dim // 2:
        raise rope.error("mrope_section", list(sections), f"three numbers that add up to {dim // 2}")
    theta = rope.get("rope_theta", float)
    if not 1 < theta < 1e12:
        raise rope.error("rope_theta", theta, "a number above 1")
    return RopeConfig(theta, dim, (sections[0], sections[1], sections[2]))


def _tied(text: _Section, top: _Section) -> bool:
    """The top-level flag decides, as in transformers; the text section's is the fallback."""
    section = top if "tie_word_embeddings" in top.values else text
    return section.get("tie_word_embeddings", bool, False)


def _eos_token_ids(text: _Section, top: _Section) -> tuple[int, ...]:
    ids: list[int] = []
    for section in (text, top):
        value = section.values.get("eos_token_id")
        if value is not None:
            ids += section.ints("eos_token_id", value)
    return tuple(dict.fromkeys(ids))


def _check_heads(text: _Section, config: TextConfig) -> None:
    for key, of in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        heads, groups = getattr(config, key), getattr(config, of)
        if heads % groups:
            raise text.error(key, heads, f"a multiple of {of} = {groups}")


def _vision_config(vision: _Section) -> VisionConfig:
    vision.expect("hidden_act", "gelu_pytorch_tanh")
    vision.expect("deepstack_visual_indexes", [])
    return VisionConfig(
        depth=vision.size("depth", high=_MAX_LAYERS),
        hidden_size=vision.size("hidden_size"),
        intermediate_size=vision.size("intermediate_size"),
        num_heads=vision.size("num_heads"),
        in_channels=vision.size("in_channels"),
        patch_size=vision.size("patch_size"),
        temporal_patch_size=vision.size("temporal_patch_size"),
        spatial_merge_size=vision.size("spatial_merge_size"),
        num_position_embeddings=vision.size("num_position_embeddings"),
        out_hidden_size=vision.size("out_hidden_size"),
    )
