"""What tests of edgeq and of backends for it need: tiny checkpoints with random weights, and the measure of an error.

Nothing that runs a model imports this module.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.backends.ops import Ops
from edgeq.checkpoint import Checkpoint
from edgeq.config import ModelConfig, TextConfig, parse_config
from edgeq.formats.bf16 import Array, round_to
from edgeq.formats.names import hub_name
from edgeq.formats.safetensors import DTYPES, SafetensorsWriter
from edgeq.quality.error import nmse
from edgeq.weights import (
    Matrix,
    Part,
    Role,
    TensorSpec,
    TextWeights,
    all_tensors,
    declare_text,
    leaves,
    map_tree,
)

__all__ = ["config_values", "file_weights", "nmse", "on_backend", "random_values", "write_checkpoint"]


def config_values(*, vision: bool = False, mtp: bool = False, **text: Any) -> dict[str, Any]:
    """A config.json of the multimodal layout; `text` overrides fields of text_config."""
    layers = text.pop("layer_types", ["linear_attention"] * 3 + ["full_attention"])
    text.setdefault("tie_word_embeddings", True)
    values: dict[str, Any] = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "image_token_id": 1036,
        "video_token_id": 1037,
        "vision_start_token_id": 1033,
        "vision_end_token_id": 1034,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {
            "model_type": "qwen3_5_text",
            "vocab_size": 288,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": len(layers),
            "layer_types": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "attn_output_gate": True,
            "mtp_num_hidden_layers": int(mtp),
            "eos_token_id": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [2, 1, 1],
            },
            **text,
        },
    }
    if vision:
        values["vision_config"] = {
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_channels": 3,
            "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 16,
            "out_hidden_size": values["text_config"]["hidden_size"], "hidden_act": "gelu_pytorch_tanh",
            "deepstack_visual_indexes": [], "model_type": "qwen3_5",
        }  # fmt: skip
    return values


def random_values(spec: TensorSpec, rng: np.random.Generator) -> Array:
    """Values of the kind a trained model has, so that every operation matters: float32."""
    x = rng.standard_normal(spec.shape).astype(np.float32)
    match spec.role:
        case Role.NORM:
            return x * np.float32(0.2)
        case Role.GATED_NORM:
            return 1 + x * np.float32(0.2)
        case Role.DECAY:
            return np.log(rng.uniform(0.5, 16, spec.shape)).astype(np.float32)
        case Role.CONV:
            return x * np.float32(0.5)
        case Role.LAYER_NORM:
            return 1 + x * np.float32(0.2)
        case Role.VECTOR:
            return x * np.float32(0.1) if spec.part is Part.VISION else x
        case Role.PATCH:
            return x * np.float32(1 / np.sqrt(spec.size / spec.shape[0]))
        case _:
            return x * np.float32(1 / np.sqrt(spec.shape[-1]))  # larger amplifies float noise from layer to layer


def write_checkpoint(
    folder: Path, values: dict[str, Any] | None = None, *, seed: int = 0, dtype: str = "BF16"
) -> ModelConfig:
    """Write config.json and model.safetensors in the hub's layout: F32 for A_log and the gated norm, else `dtype`."""
    values = values or config_values()
    config = parse_config(values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    rng = np.random.default_rng(seed)
    specs = list(all_tensors(config))
    dtypes = {s.name: "F32" if s.role in (Role.DECAY, Role.GATED_NORM) else dtype for s in specs}
    specs.sort(key=lambda s: dtypes[s.name] != "F32")
    entries = {hub_name(s.name): (dtypes[s.name], s.shape) for s in specs}
    with SafetensorsWriter(folder / "model.safetensors", entries) as file:
        for spec in specs:
            file.write(hub_name(spec.name), round_to(random_values(spec, rng), DTYPES[dtypes[spec.name]]))
    return config


def file_weights(checkpoint: Checkpoint) -> TextWeights[Array, Matrix[Array]]:
    """The language model's weights as the file has them: vectors float32, matrices in their storage."""

    def leaf(spec: TensorSpec) -> Matrix[Array]:
        return checkpoint.matrix(spec.name) if spec.is_matrix else checkpoint.dense(spec.name)

    weights: TextWeights[Array, Matrix[Array]] = map_tree(leaf, declare_text(checkpoint.config.text))
    return weights


def on_backend(ops: Ops[Any, Any], c: TextConfig, weights: TextWeights[Array, Matrix[Array]]) -> TextWeights[Any, Any]:
    """Weights as a file has them, on a backend."""
    pairs = zip(leaves(declare_text(c)), leaves(weights), strict=True)
    matrices = {id(leaf) for spec, leaf in pairs if spec.is_matrix}

    def leaf(x: Any) -> Any:
        return ops.matrix(x) if id(x) in matrices else ops.vector(x)

    loaded: TextWeights[Any, Any] = map_tree(leaf, weights)
    return loaded
