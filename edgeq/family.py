"""The configurations of the family, so that nothing has to be downloaded to tell what a size will take.

Facts from the config.json files of Qwen/Qwen3.5-0.8B, -2B and -4B; their Base variants have the same.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from edgeq.config import ModelConfig, parse_config

__all__ = ["SIZES", "family_config", "size_of"]

_NAME = re.compile(r"(?:qwen/)?qwen3\.5[:-](0\.8b|2b|4b)(?:-base)?", re.IGNORECASE)


class _Size(NamedTuple):
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    delta_heads: int
    tower_layers: int
    tower_hidden: int
    tower_heads: int


_TABLE = {
    "0.8b": _Size(1024, 3584, 24, 8, 2, 16, 12, 768, 12),
    "2b": _Size(2048, 6144, 24, 8, 2, 16, 24, 1024, 16),
    "4b": _Size(2560, 9216, 32, 16, 4, 32, 24, 1024, 16),
}
SIZES = tuple(_TABLE)
"""The sizes' names, in lower case."""


def size_of(model: str) -> str | None:
    """The size that a name means ("qwen3.5:4b", "Qwen/Qwen3.5-4B", "4b"); None for anything else."""
    if model.lower() in _TABLE:
        return model.lower()
    name = _NAME.fullmatch(model)
    return name[1].lower() if name else None


def family_config(size: str) -> ModelConfig:
    """The configuration of a size of `SIZES`."""
    return parse_config(_values(_TABLE[size]), f"Qwen3.5-{size.upper()}")


def _values(size: _Size) -> dict[str, Any]:
    """Its config.json."""
    return {
        "model_type": "qwen3_5",
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 248320,
            "hidden_size": size.hidden,
            "intermediate_size": size.feed_forward,
            "num_hidden_layers": size.layers,
            "full_attention_interval": 4,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": size.delta_heads,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "mtp_num_hidden_layers": 1,
            "eos_token_id": 248044,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
                "mrope_interleaved": True, "mrope_section": [11, 11, 10],
            },
        },
        "vision_config": {
            "depth": size.tower_layers,
            "hidden_size": size.tower_hidden,
            "intermediate_size": 4 * size.tower_hidden,
            "num_heads": size.tower_heads,
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 2304,
            "out_hidden_size": size.hidden,
            "hidden_act": "gelu_pytorch_tanh",
            "deepstack_visual_indexes": [],
        },
    }  # fmt: skip
