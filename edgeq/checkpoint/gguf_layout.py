"""How a Qwen3.5 lies in GGUF files: names of tensors, order of value heads, hyperparameters.

The language model and its MTP head are llama.cpp's architecture `qwen35`, the vision tower is a second file of
architecture `clip` ("mmproj"). The reader and the exporter share what is here; it was checked against files that
llama.cpp's own converter wrote.

ollama's converter writes the same architecture with differences of its own, by version: key-value heads for each layer,
with 0 where DeltaNet is; three rope sections, under other keys, too; `ssm_dt` without `.bias`; the MTP head as `mtp.*`,
its norms not all with 1 added; padding tokens as if they were the user's. All of it is read
(https://github.com/ollama/ollama/blob/main/convert/convert_qwen3next.go, and llama/compat in the same place).
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint.generation import Recommended, recommended
from edgeq.config import Linear, RopeConfig, TextConfig, VisionConfig, yarn_attention_factor
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array
from edgeq.formats.gguf import GGUFFile
from edgeq.identify import ARCH, VISION_ARCH
from edgeq.printable import brief
from edgeq.weights import Role, TensorSpec

__all__ = [
    "ARCH",
    "PROJECTOR",
    "VISION_ARCH",
    "HeadOrder",
    "file_names",
    "file_shape",
    "head_order",
    "names_in",
    "recommended_sampling",
    "sampling_metadata",
    "shortest",
    "text_metadata",
    "text_values",
    "vision_metadata",
]

PROJECTOR = "qwen3vl_merger"

_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_MTP = {
    "fc.weight": "nextn.eh_proj.weight",
    "pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}
_VISION = {  # modules; weight and bias keep their names
    "pos_embed": "v.position_embd",
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
    "merger.norm": "v.post_ln",
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
}
_SAMPLING = {  # fields of GenerationSettings, and what follows general.sampling.
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
    "presence_penalty": "penalty_present",  # this and the next in llama.cpp's words; its converter writes neither
    "frequency_penalty": "penalty_freq",
}


# --- tensors ---------------------------------------------------------------------------------------------------------


def file_names(name: str, layers: int) -> tuple[str, ...]:
    """A neutral tensor's name in the file: one, or two for the patch embedding, which is split by frame.

    `layers` counts the language model's; the MTP head follows them as one more block.
    """
    if name in _TOP:
        return (_TOP[name],)
    if name.startswith("visual."):
        return _vision_names(name.removeprefix("visual."))
    part, _, rest = name.partition(".")
    if part == "mtp" and rest in _MTP:
        return (f"blk.{layers}.{_MTP[rest]}",)
    if part == "mtp":
        return (f"blk.{layers}.{_LAYER[rest.removeprefix('layers.0.')]}",)
    number, _, rest = rest.partition(".")
    return (f"blk.{number}.{_LAYER[rest]}",)


def names_in(tensors: Container[str], name: str, layers: int) -> tuple[str, ...]:
    """A neutral tensor's name, or names, among a file's `tensors`; llama.cpp's if it is not there."""
    theirs = file_names(name, layers)
    ollamas = f"mtp.layers.0.{_LAYER[name[13:]]}" if name.startswith("mtp.layers.0.") else name
    choices = [theirs, (theirs[0].removesuffix(".bias"),), (ollamas,)]
    return next((choice for choice in choices if all(part in tensors for part in choice)), theirs)


def _vision_names(name: str) -> tuple[str, ...]:
    if name == "patch_embed.proj.weight":
        return "v.patch_embd.weight", "v.patch_embd.weight.1"
    if name == "patch_embed.proj.bias":
        return ("v.patch_embd.bias",)
    module, _, kind = name.rpartition(".")
    if module.startswith("blocks."):
        _, number, module = module.split(".", 2)
        return (f"v.blk.{number}.{_VISION[module]}.{kind}",)
    return (f"{_VISION[module]}.{kind}",)


def file_shape(spec: TensorSpec) -> tuple[int, ...]:
    """A tensor's shape in the file, in NumPy's order (for the patch embedding: of each half)."""
    if spec.role is Role.CONV:
        return spec.shape[0], spec.shape[2]
    return spec.shape[:2] + spec.shape[3:] if spec.role is Role.PATCH else spec.shape


class HeadOrder(NamedTuple):
    """A permutation of one axis of a tensor: neutral position i lies at `positions[i]` of the file."""

    axis: int
    positions: NDArray[np.intp]

    def from_file(self, x: Array) -> Array:
        return np.take(x, self.positions, self.axis)

    def to_file(self, x: Array) -> Array:
        return np.take(x, np.argsort(self.positions), self.axis)


def head_order(name: str, c: TextConfig) -> HeadOrder | None:
    """How the file orders whatever belongs to DeltaNet's value heads; None if as everywhere else.

    With r value heads to a key head, edgeq and the hub keep those of a key head together: head h reads key head
    h // r. llama.cpp tiles them: head h reads key head h % key heads. It is the same where r is 1.
    """
    key_heads, width = c.linear_num_key_heads, c.linear_value_head_dim
    if c.linear_num_value_heads == key_heads or ".linear_attn." not in name:
        return None
    tiled = np.arange(c.linear_num_value_heads).reshape(-1, key_heads).T.ravel()  # by neutral head
    match name.rpartition(".linear_attn.")[2]:
        case "in_proj_qkv.weight" | "conv1d.weight":
            values = 2 * c.key_dim + _spread(tiled, width)
            return HeadOrder(0, np.concatenate([np.arange(2 * c.key_dim), values]))
        case "in_proj_z.weight":
            return HeadOrder(0, _spread(tiled, width))
        case "in_proj_a.weight" | "in_proj_b.weight" | "A_log" | "dt_bias":
            return HeadOrder(0, tiled)
        case "out_proj.weight":
            return HeadOrder(1, _spread(tiled, width))
    return None


def _spread(heads: NDArray[np.intp], width: int) -> NDArray[np.intp]:
    """Positions of heads -> positions of all their entries."""
    return (heads[:, None] * width + np.arange(width)).ravel()


# --- hyperparameters -------------------------------------------------------------------------------------------------


def text_values(file: GGUFFile) -> dict[str, Any]:
    """The fields of a config.json, out of a language model's metadata."""

    def get(key: str, default: int | None = None) -> int:
        return file.get(f"{ARCH}.{key}", int, default)

    blocks = get("nextn_predict_layers", 0)  # of the MTP head, counted with the others; not so where it is `mtp.*`
    mtp = blocks or len({name.split(".")[2] for name in file.tensors if name.startswith("mtp.layers.")})
    layers, heads = get("block_count") - blocks, _of_all(file, "attention.head_count")
    value_heads = get("ssm.time_step_rank")
    tied = "output.weight" not in file.tensors
    if get("attention.key_length") != get("attention.value_length") or get("ssm.inner_size") % max(value_heads, 1):
        raise ModelError(f"{file.path}: keys and values of different widths are not supported")
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_5_text",
            "vocab_size": _embedding_rows(file),
            "hidden_size": get("embedding_length"),
            "intermediate_size": _of_all(file, "feed_forward_length"),
            "num_hidden_layers": layers,
            "layer_types": _layer_types(file, layers),
            "full_attention_interval": get("full_attention_interval", 4),
            "num_attention_heads": heads,
            "num_key_value_heads": _of_all(file, "attention.head_count_kv"),
            "head_dim": get("attention.key_length"),
            "attention_bias": False,
            "attn_output_gate": True,
            "linear_num_key_heads": get("ssm.group_count"),
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": get("ssm.state_size"),
            "linear_value_head_dim": get("ssm.inner_size") // max(value_heads, 1),
            "linear_conv_kernel_dim": get("ssm.conv_kernel"),
            "mamba_ssm_dtype": "float32",
            "hidden_act": "silu",
            "rms_norm_eps": shortest(file.get(f"{ARCH}.attention.layer_norm_rms_epsilon", float)),
            "max_position_embeddings": get("context_length"),
            "mtp_num_hidden_layers": mtp,
            "mtp_use_dedicated_embeddings": False,
            "tie_word_embeddings": tied,
            "eos_token_id": _stop_ids(file),
            "rope_parameters": _rope_scaling(file)
            | {
                "rope_theta": shortest(file.get(f"{ARCH}.rope.freq_base", float)),
                "partial_rotary_factor": get("rope.dimension_count") / max(get("attention.key_length"), 1),
                "mrope_interleaved": True,
                "mrope_section": _rope_sections(file),
            },
        },
    }


def _of_all(file: GGUFFile, name: str) -> int:
    """A number that may stand there for each layer, with 0 for layers that it does not concern."""
    key = f"{ARCH}.{name}"
    if not file.has_list(key):
        return file.get(key, int)
    numbers = sorted(set(file.integers(key)) - {0})
    if len(numbers) != 1:
        raise ModelError(
            f"{file.path}: {key} is {' and '.join(map(str, numbers[:3])) or 'empty'} by layer, expected one number",
            hint="use another file of the model",
        )
    return numbers[0]


def _stop_ids(file: GGUFFile) -> list[int]:
    """The tokens that end a text, a turn and a message, as far as the file names them; -1 is none."""
    given = [file.value(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    if file.has_list(listed := "tokenizer.ggml.eos_token_ids"):  # ollama's
        given += file.integers(listed)
    rows = _embedding_rows(file)
    return list(dict.fromkeys(i for i in given if type(i) is int and 0 <= i < rows))


def _rope_sections(file: GGUFFile) -> list[int]:
    """How many frequencies turn with time, height and width: three numbers, and perhaps a 0."""
    for key in ("rope.mrope_interleaved", "mrope_interleaved"):
        if not file.get(f"{ARCH}.{key}", bool, True):
            raise ModelError(
                f"{file.path}: {ARCH}.{key} is false, expected true: Qwen3.5 interleaves its sections",
                hint="convert the original checkpoint again",
            )
    keys = [f"{ARCH}.{key}" for key in ("rope.dimension_sections", "rope.mrope_section", "mrope_sections")]
    key = next((key for key in keys if key in file), keys[0])
    sections = file.integers(key)
    if len(sections) < 3 or sections[3:] not in ([], [0]):
        raise ModelError(
            f"{file.path}: {key} is {brief(sections)}, expected three numbers, or three and a 0",
            hint="convert the original checkpoint again",
        )
    return sections[:3]


def _rope_scaling(file: GGUFFile) -> dict[str, Any]:
    """How the file stretches the context, in config.json's terms. What no reader here implements is refused.

    As llama.cpp reads it: a factor without a type is linear, `rope.scale_linear` is the factor's old name, a factor of
    0 and a negative `yarn_ext_factor` are not set.
    """
    prefix = f"{ARCH}.rope.scaling"
    kind = file.get(f"{prefix}.type", str, "linear")
    factors = (f"{prefix}.factor", f"{ARCH}.rope.scale_linear")
    factor = next((shortest(file.get(key, float)) for key in factors if key in file), 0.0) or 1.0
    if kind == "linear" and factor == 1:
        kind = "none"
    _refuse_other_scaling(file, prefix, kind)
    if kind == "none":
        return {"rope_type": "default"}
    values: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if (original := f"{prefix}.original_context_length") in file:
        values["original_max_position_embeddings"] = file.get(original, int)
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            if (name := f"{prefix}.yarn_{key}") in file:
                values[key] = shortest(file.get(name, float))
        sharper = 1.0
        for key in ("attn_factor", "yarn_attn_factor"):
            sharper *= file.get(f"{prefix}.{key}", float, 1.0)
        if sharper != 1:  # a further factor beside YaRN's own
            values["attention_factor"] = shortest(sharper) * yarn_attention_factor(max(values["factor"], 1.0))
    return values


def _refuse_other_scaling(file: GGUFFile, prefix: str, kind: str) -> None:
    """ModelError for a key that changes the arithmetic in a way that there is no place for in a configuration."""
    plain = {"yarn_log_multiplier": 0.0, "yarn_ext_factor": 1.0} if kind == "yarn" else {"yarn_ext_factor": 0.0}
    if kind == "none":
        plain = {}
    if kind != "yarn":
        plain |= {"attn_factor": 1.0, "yarn_attn_factor": 1.0}
    for name, value in plain.items():
        found = file.get(f"{prefix}.{name}", float, value)
        if found != value and not (name == "yarn_ext_factor" and found < 0):
            raise ModelError(
                f"{file.path}: {prefix}.{name} is {shortest(found):g}, which edgeq does not support with "
                f"{prefix}.type {brief(kind)}",
                hint="convert the original checkpoint again",
            )


def _scaling_metadata(rope: RopeConfig) -> dict[str, Any]:
    """The inverse of `_rope_scaling`."""
    scaling = rope.scaling
    if scaling is None:
        return {}
    if isinstance(scaling, Linear):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    metadata = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_context,
        "rope.scaling.yarn_beta_fast": scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow,
    }
    own = yarn_attention_factor(scaling.factor)
    if scaling.attention_factor != own:
        metadata["rope.scaling.yarn_attn_factor"] = scaling.attention_factor / own
    if not scaling.truncate:
        raise ModelError(
            "rope_parameters.truncate is False, for which GGUF has no place",
            hint="quantize to a folder instead, or remove it from config.json",
        )
    return metadata


def _embedding_rows(file: GGUFFile) -> int:
    info = file.tensors.get("token_embd.weight")
    if not file.tensors:
        raise ModelError(f"{file.path} holds a vocabulary, and no weights", hint="name the model's own .gguf file")
    if info is None and all(name.startswith("blk.") for name in file.tensors):
        raise ModelError(
            f"{file.path} holds some layers of a model, as an MTP head is published", hint="name the model's own file"
        )
    if info is None:
        raise ModelError(
            f"{file.path} holds no token_embd.weight",
            hint="download it again, or give the file of the whole model",
        )
    return info.shape[0]


def _layer_types(file: GGUFFile, layers: int) -> list[str]:
    """From the list of recurrent layers, which old files do not have, else from the layers without key-value heads,
    else from the interval."""
    heads = f"{ARCH}.attention.head_count_kv"
    if (key := f"{ARCH}.attention.recurrent_layers") in file:
        recurrent = [bool(flag) for flag in file.integers(key)[: max(layers, 0)]]
    elif file.has_list(heads):
        recurrent = [not number for number in file.integers(heads)[: max(layers, 0)]]
    else:
        interval = max(file.get(f"{ARCH}.full_attention_interval", int, 4), 1)
        recurrent = [(i + 1) % interval != 0 for i in range(min(layers, 1 << 10))]
    return ["linear_attention" if flag else "full_attention" for flag in recurrent]


def shortest(value: float) -> float:
    """A float32 as the decimal number it was written from: 1e-6, not 9.99999997e-07."""
    return float(str(np.float32(value))) if math.isfinite(value) else value


def text_metadata(c: TextConfig, *, mtp: bool) -> dict[str, Any]:
    """What the metadata of a language model says of its shape, without the prefix: the inverse of `text_values`."""
    heads = [kind == "linear_attention" for kind in c.layer_types] + [False] * mtp
    metadata = {
        "block_count": len(heads),
        "context_length": c.longest_context,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.recurrent_layers": heads,
        "full_attention_interval": _interval(c),
        "rope.dimension_count": c.rope.dim,
        "rope.dimension_sections": [*c.rope.sections, 0],
        "rope.freq_base": c.rope.theta,
        **_scaling_metadata(c.rope),
        "ssm.conv_kernel": c.linear_conv_kernel_dim,
        "ssm.state_size": c.linear_key_head_dim,
        "ssm.group_count": c.linear_num_key_heads,
        "ssm.time_step_rank": c.linear_num_value_heads,
        "ssm.inner_size": c.value_dim,
    }
    return metadata | ({"nextn_predict_layers": 1} if mtp else {})


def _interval(c: TextConfig) -> int:
    """How often a full-attention layer comes; `attention.recurrent_layers` is what counts."""
    return c.layer_types.index("full_attention") + 1 if "full_attention" in c.layer_types else len(c.layer_types) + 1


def vision_metadata(v: VisionConfig, processor: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a vision tower, and of how its pictures are made ready (as preprocessor_config.json has it)."""
    size = processor.get("size") or {}
    limits = {"image_min_pixels": size.get("shortest_edge"), "image_max_pixels": size.get("longest_edge")}
    values = {
        "projection_dim": v.out_hidden_size,
        "image_size": v.position_side * v.patch_size,
        "patch_size": v.patch_size,
        "embedding_length": v.hidden_size,
        "feed_forward_length": v.intermediate_size,
        "block_count": v.depth,
        "attention.head_count": v.num_heads,
        "attention.layer_norm_epsilon": 1e-6,
        "image_mean": [float(x) for x in processor.get("image_mean") or [0.5] * 3],
        "image_std": [float(x) for x in processor.get("image_std") or [0.5] * 3],
        "spatial_merge_size": v.spatial_merge_size,
        "is_deepstack_layers": [False] * v.depth,
        **{key: value for key, value in limits.items() if value},  # llama.cpp has limits of its own
    }
    top = {"has_vision_encoder": True, "projector_type": PROJECTOR, "use_gelu": True}
    return {
        f"clip.{key}": value for key, value in (top | {f"vision.{key}": value for key, value in values.items()}).items()
    }


# --- recommended sampling --------------------------------------------------------------------------------------------


def recommended_sampling(file: GGUFFile) -> Recommended:
    """The sampling that the file recommends."""
    keys = {name: f"general.sampling.{key}" for name, key in _SAMPLING.items()}
    given = {name: file.value(key) for name, key in keys.items()}
    plain = {name: shortest(value) if type(value) is float else value for name, value in given.items()}
    return recommended(plain, str(file.path), keys)


def sampling_metadata(sampling: Mapping[str, float]) -> dict[str, float]:
    """The inverse."""
    return {
        f"general.sampling.{key}": sampling[name] if name == "top_k" else float(sampling[name])
        for name, key in _SAMPLING.items()
        if name in sampling
    }
