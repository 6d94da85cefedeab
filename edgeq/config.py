"""The model's configuration, read from `config.json`. Nothing else in edgeq reads that file's model fields.

Two layouts are understood: the multimodal one of the hub (`model_type` "qwen3_5", text settings under
`text_config`) and the text-only one ("qwen3_5_text", settings at the top). Base and chat checkpoints have the same
configuration. A key that is missing, of the wrong type or of a value edgeq does not implement is an error that
names it; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt, log, nan
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from edgeq.errors import ModelError, UsageError
from edgeq.inputs import TEXT_LIMIT, read_text
from edgeq.numbers import number, whole_number
from edgeq.printable import brief, one_line
from edgeq.processor import ProcessorConfig

__all__ = [
    "LayerKind",
    "Linear",
    "ModelConfig",
    "RopeConfig",
    "TextConfig",
    "VisionConfig",
    "Yarn",
    "parse_config",
    "parse_vision_config",
    "read_config",
    "read_json",
    "stretched",
    "yarn_attention_factor",
]

LayerKind = Literal["linear_attention", "full_attention"]

# No Qwen3.5 comes near these; a larger number is a damaged or hostile file, caught before anything is allocated.
_MAX_SIZE = 1 << 20
_MAX_LAYERS = 1 << 10
_MAX_POSITIONS = 1 << 26
_MAX_HEAD = 1 << 10  # DeltaNet's state is their product, which no tensor of the file has to justify
_MAX_IDS = 1 << 10  # that end a text
_MAX_FACTOR = 1024.0  # by which a context is stretched
_TINY = 1e-9
_MIN_EPS = 1e-20  # less is 0 in float32, or its square root is
_HINT = "download the config.json of a Qwen3.5 checkpoint again"

T = TypeVar("T", bool, str)


@dataclass(frozen=True, slots=True)
class Linear:
    """Rotary positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Yarn:
    """Slow frequencies divided by `factor`, fast ones left as they are, with a ramp between, and attention sharpened
    (Peng et al., arXiv:2309.00071).

    original_context: tokens that the model was trained for.
    attention_factor: by which cosines and sines are multiplied; its square sharpens the scores.
    beta_fast, beta_slow: turns within the original context between which the ramp lies.
    truncate: the ramp begins and ends at whole frequencies.
    """

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Partial, interleaved multimodal rotary embedding (mRoPE).

    The first `dim` of every head's entries rotate; `sections` says how many of the `dim // 2` frequencies follow
    the time, height and width axis. `scaling` stretches them for a longer context.
    """

    theta: float
    dim: int
    sections: tuple[int, int, int]
    scaling: Linear | Yarn | None = None

    @property
    def attention_factor(self) -> float:
        """By which cosines and sines are multiplied."""
        return self.scaling.attention_factor if isinstance(self.scaling, Yarn) else 1.0


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
    def longest_context(self) -> int:
        """Most tokens of a sequence: what the configuration says, or what YaRN stretches it to."""
        scaling = self.rope.scaling
        if not isinstance(scaling, Yarn):
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(scaling.factor * scaling.original_context))

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

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers that a patch is made of: colours * frames * height * width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of the patches that become a token, side by side."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def position_side(self) -> int:
        """Rows, and columns, of the table of positions."""
        return isqrt(self.num_position_embeddings)


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
    read_processor: Callable[[], ProcessorConfig | None] | None = field(default=None, repr=False, compare=False)

    @property
    def processor(self) -> ProcessorConfig | None:
        """How pictures become patches, as the checkpoint's files say; None where there are none."""
        return self.read_processor() if self.read_processor else None


class _Section:
    """Typed access to one object of `config.json`; every error names the key's full path."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def error(self, key: str, found: object, expected: str) -> ModelError:
        shown = "missing" if found is None else brief(found)
        return ModelError(f"{self.where}{key} is {shown}, expected {expected}", hint=_HINT)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self._present(key, default, f"a value of type {kind.__name__}")
        if type(value) is not kind:
            raise self.error(key, value, f"a value of type {kind.__name__}")
        return value

    def size(self, key: str, default: int | None = None, *, low: int = 1, high: int = _MAX_SIZE) -> int:
        value = self._present(key, default, f"a whole number from {low} to {high}")
        return whole_number(value, f"{self.where}{key}", low, high, hint=_HINT)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self._present(key, default, f"a number above {low:g} and at most {high:g}")
        return number(value, f"{self.where}{key}", low, high, above=True, hint=_HINT)

    def token_id(self, key: str) -> int | None:
        value = self.values.get(key)
        return None if value is None else whole_number(value, f"{self.where}{key}", 0, _MAX_SIZE, hint=_HINT)

    def _present(self, key: str, default: object, expected: str) -> object:
        value = self.values.get(key)
        if value is None and default is None:
            raise self.error(key, None, expected)
        return default if value is None else value

    def expect(self, key: str, *allowed: object) -> None:
        """A key that may be absent, but if present must have a value that edgeq implements."""
        value = self.values.get(key, allowed[0])
        if not any(type(value) is type(known) and value == known for known in allowed):
            raise self.error(key, value, " or ".join(map(repr, allowed)))

    def section(self, key: str) -> _Section:
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return _Section(value, f"{self.where}{key}.")

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; none if the key is absent."""
        value = self.values.get(key, [])
        found = value if isinstance(value, list) else [] if value is None else [value]
        if len(found) > _MAX_IDS or not all(type(i) is int and 0 <= i < _MAX_SIZE for i in found):
            raise self.error(key, value, f"a token id below {_MAX_SIZE} or a list of them")
        return tuple(found)


def read_json(path: Path, limit: int = TEXT_LIMIT) -> dict[str, Any]:
    """Read a JSON object of at most `limit` bytes from `path`.

    ModelError if it is not there, too large, not JSON or not an object.
    """
    try:
        value = json.loads(read_text(path, limit))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", hint="give the folder of a complete checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        what = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise ModelError(f"{path} cannot be read as JSON: {what}", hint="download or copy the file again") from None
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} holds {type(value).__name__}, expected a JSON object", hint="download or copy the file again"
        )
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
            f"{name}: model_type is {brief(model_type)}, expected 'qwen3_5' or 'qwen3_5_text'",
            hint="use a Qwen3.5 model: 0.8B, 2B or 4B",
        )
    flat = values.get("text_config") is None and "hidden_size" in values  # mlx-lm reads that, too
    text = _text_config(top if flat else top.section("text_config"), top)
    sees = values.get("vision_config") is not None
    return ModelConfig(
        text=text,
        vision=_vision_config(top.section("vision_config"), text.hidden_size) if sees else None,
        name=_name(values),
        image_token_id=top.token_id("image_token_id"),
        video_token_id=top.token_id("video_token_id"),
        vision_start_token_id=top.token_id("vision_start_token_id"),
        vision_end_token_id=top.token_id("vision_end_token_id"),
    )


def parse_vision_config(values: Mapping[str, Any], hidden_size: int, name: str) -> VisionConfig:
    """Turn the fields of a `vision_config` into one for a language model of `hidden_size`; ModelError as above."""
    return _vision_config(_Section(values, f"{name}: "), hidden_size)


def _name(values: Mapping[str, Any]) -> str | None:
    name = values.get("_name_or_path")
    return name if isinstance(name, str) else None


def _text_config(text: _Section, top: _Section) -> TextConfig:
    text.expect("hidden_act", "silu")
    text.expect("attn_output_gate", True)
    text.expect("attention_bias", False, None)
    text.expect("mtp_use_dedicated_embeddings", False, None)
    text.expect("output_gate_type", "swish", None)
    head_dim = text.size("head_dim")
    longest = text.size("max_position_embeddings", high=_MAX_POSITIONS)
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
        linear_key_head_dim=text.size("linear_key_head_dim", high=_MAX_HEAD),
        linear_value_head_dim=text.size("linear_value_head_dim", high=_MAX_HEAD),
        linear_conv_kernel_dim=text.size("linear_conv_kernel_dim", low=2, high=64),
        rms_norm_eps=text.number("rms_norm_eps", _MIN_EPS, 1),
        rope=_rope_config(text, top, head_dim, longest),
        max_position_embeddings=longest,
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


def _rope_config(text: _Section, top: _Section, head_dim: int, longest: int) -> RopeConfig:
    rope = _rope_section(text, top)
    rope.expect("mrope_interleaved", True)
    dim = int(head_dim * rope.number("partial_rotary_factor", 0, 1, 0.25))
    if dim % 2 or dim < 2:
        raise rope.error("partial_rotary_factor", rope.values.get("partial_rotary_factor"), "an even rotary width")
    theta = rope.number("rope_theta", 1, 1e12)
    return RopeConfig(theta, dim, _rope_sections(rope, dim // 2), _rope_scaling(rope, longest))


def _rope_section(text: _Section, top: _Section) -> _Section:
    """Everything said of the rotary embedding, wherever it stands: `rope_parameters` (transformers 5), over it
    `rope_scaling` (4), under both the keys that stood beside that."""
    places = (text,) if text is top else (top, text)
    beside = {key: place.values[key] for place in places for key in _ROPE_BESIDE if place.values.get(key) is not None}
    keys = ((place, key) for key in ("rope_parameters", "rope_scaling") for place in places)
    sections = [
        _with_rope_type(_of_attention(place.section(key))) for place, key in keys if place.values.get(key) is not None
    ]
    if not sections and not beside:
        text.section("rope_parameters")  # says that it is missing
    values = dict(beside)
    for section in sections:
        values |= section.values
    stretching = [section for section in sections if section.values.get("rope_type") not in _NOT_STRETCHED]
    if stretching:
        values["rope_type"] = _only_way(stretching).values["rope_type"]
    if values.get("rope_type") == "yarn":  # beside the object it comes first, as in transformers
        for place in places:
            values |= {key: value for key, value in place.values.items() if key == _ORIGINAL and value is not None}
    where = sections[-1].where if sections else text.where
    for key in values.keys() - _ROPE_KEYS:
        raise ModelError(f"{where}{key} is not known to edgeq, and may change what positions mean", hint=_HINT)
    return _Section(values, where)


def _of_attention(section: _Section) -> _Section:
    """Of parameters by kind of layer, as transformers 5 may have them, those of the layers that rotate."""
    by_kind = section.values and set(section.values) <= set(get_args(LayerKind))
    return section.section("full_attention") if by_kind else section


def _with_rope_type(section: _Section) -> _Section:
    """Without what is null, and with `type` by its present name."""
    values = {key: value for key, value in section.values.items() if value is not None}
    if "type" in values:
        values.setdefault("rope_type", values.pop("type"))
    return _Section(values, section.where)


def _only_way(stretching: Sequence[_Section]) -> _Section:
    """The section that stretches the context; ModelError if another does so in another way."""
    first, *others = stretching
    for other in others:
        if any(first.values.get(key) != other.values.get(key) for key in ("rope_type", "factor")):
            raise ModelError(
                f"{first.where}rope_type and {other.where}rope_type stretch the context in two ways",
                hint="remove one of them from the file",
            )
    return first


_ORIGINAL = "original_max_position_embeddings"
_NOT_STRETCHED = (None, "default", "mrope")
# Of the rotary embedding: what may stand beside its object, and what in it.
_ROPE_BESIDE = ("rope_theta", "partial_rotary_factor")
_YARN_KEYS = {
    _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"
}  # fmt: skip
_ROPE_KEYS = {
    *_ROPE_BESIDE,
    *_YARN_KEYS,
    "rope_type",
    "type",
    "mrope_section",
    "mrope_interleaved",
    "factor",
    "finetuned",
}


def _rope_scaling(rope: _Section, longest: int) -> Linear | Yarn | None:
    kind = rope.values.get("rope_type", "default")
    if kind == "linear":
        return Linear(rope.number("factor", 1 - _TINY, _MAX_FACTOR))
    if kind == "yarn":
        return _yarn(rope, longest)
    if kind not in _NOT_STRETCHED:
        raise rope.error("rope_type", kind, "'default', 'linear' or 'yarn'")
    if rope.values.get("factor", 1) != 1:
        raise ModelError(
            f"{rope.where}factor is {brief(rope.values['factor'])}, but no rope_type says what it scales",
            hint="add a rope_type of 'yarn' or 'linear', or remove the factor",
        )
    return None


def _yarn(rope: _Section, longest: int) -> Yarn:
    """As transformers reads it: what is not given follows from the factor."""
    original = rope.size(_ORIGINAL, longest, high=_MAX_POSITIONS)
    implied = longest / original if _ORIGINAL in rope.values else None
    factor = rope.number("factor", 1 - _TINY, _MAX_FACTOR, implied)
    mscale, mscale_all = (rope.number(key, -_TINY, 100, 0) for key in ("mscale", "mscale_all_dim"))
    attention = (
        yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all)
        if mscale and mscale_all
        else None
    )
    fast, slow = rope.number("beta_fast", 0, 1e6, 32), rope.number("beta_slow", 0, 1e6, 1)
    if fast < slow:
        raise rope.error("beta_fast", fast, f"at least beta_slow = {slow:g}")
    sharpening = rope.number("attention_factor", 0, 100, attention or yarn_attention_factor(factor))
    return Yarn(factor, original, sharpening, fast, slow, rope.get("truncate", bool, True))


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """By which YaRN multiplies cosines and sines, unless a file says otherwise (arXiv:2309.00071, 3.4)."""
    return 0.1 * weight * log(factor) + 1 if factor > 1 else 1.0


def stretched(config: ModelConfig, scaling: str) -> ModelConfig:
    """The same model with its context stretched in another way than the file says: "yarn:4", "linear:2", or "none".

    UsageError for anything else.
    """
    kind, _, amount = scaling.partition(":")
    text, hint = config.text, "for example --rope-scaling yarn:4"
    try:
        factor = float(amount) if amount else 1.0
    except ValueError:
        factor = nan
    if kind not in ("yarn", "linear", "none") or not 1 <= factor <= _MAX_FACTOR or (kind == "none") == bool(amount):
        raise UsageError(
            f"a rope scaling is yarn:FACTOR, linear:FACTOR or none, with a factor from 1 to {_MAX_FACTOR:g}, "
            f"got {brief(scaling)}", hint=hint,
        )  # fmt: skip
    before = text.rope.scaling
    way: Linear | Yarn | None = None
    original = longest = before.original_context if isinstance(before, Yarn) else text.max_position_embeddings
    if kind == "linear":
        way, longest = Linear(factor), min(int(original * factor), _MAX_POSITIONS)
    elif kind == "yarn":
        way = Yarn(factor, original, yarn_attention_factor(factor))
    rope = replace(text.rope, scaling=way)
    return replace(config, text=replace(text, rope=rope, max_position_embeddings=longest))


def _rope_sections(rope: _Section, frequencies: int) -> tuple[int, int, int]:
    sections = rope.values.get("mrope_section", [11, 11, 10])
    expected = f"three numbers that add up to {frequencies}"
    if not isinstance(sections, list) or len(sections) != 3:
        raise rope.error("mrope_section", sections, expected)
    time, height, width = (whole_number(n, f"{rope.where}mrope_section", 0, frequencies) for n in sections)
    if time + height + width != frequencies:
        raise rope.error("mrope_section", sections, expected)
    return time, height, width


def _tied(text: _Section, top: _Section) -> bool:
    """The top-level flag decides, as in transformers; the text section's is the fallback."""
    section = top if top.values.get("tie_word_embeddings") is not None else text
    return section.get("tie_word_embeddings", bool, False)


def _eos_token_ids(text: _Section, top: _Section) -> tuple[int, ...]:
    return tuple(dict.fromkeys(text.ids("eos_token_id") + top.ids("eos_token_id")))


def _check_heads(text: _Section, config: TextConfig) -> None:
    for key, of in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        heads, groups = getattr(config, key), getattr(config, of)
        if heads % groups:
            raise text.error(key, heads, f"a multiple of {of} = {groups}")


def _vision_config(vision: _Section, hidden_size: int) -> VisionConfig:
    vision.expect("hidden_act", "gelu_pytorch_tanh")
    vision.expect("deepstack_visual_indexes", [], None)
    if isinstance(rope := vision.values.get("rope_parameters"), Mapping):  # transformers 5 spells out what is fixed
        axial = _Section(rope, f"{vision.where}rope_parameters.")
        axial.expect("rope_type", "axial", "default")
        axial.expect("rope_theta", 10000.0, 10000)
    config = VisionConfig(
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
    if config.hidden_size % config.num_heads or config.head_dim % 4:  # a quarter for each of two axes' pairs
        expected = f"a number of heads of 4, 8, 12, ... entries each in hidden_size = {config.hidden_size}"
        raise vision.error("num_heads", config.num_heads, expected)
    if config.position_side**2 != config.num_position_embeddings:
        raise vision.error("num_position_embeddings", config.num_position_embeddings, "a square number")
    if config.out_hidden_size != hidden_size:
        raise vision.error("out_hidden_size", config.out_hidden_size, f"the text's hidden_size = {hidden_size}")
    return config
