"""The family's architecture at a size that can be trained on a laptop: shapes, and the `config.json` they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CONTROL_TOKENS = 33  # the family's added tokens, <|endoftext|> .. <|audio_pad|>


@dataclass(frozen=True)
class Shape:
    """Sizes of one model. Every in_features of the language model is a multiple of 256: every format applies."""

    vocab: int = 2048  # rows of the embedding: base_vocab + control tokens + padding
    base_vocab: int = 2000  # byte-level BPE tokens; the control tokens follow
    hidden: int = 256
    layers: int = 4
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    linear_k_heads: int = 2
    linear_v_heads: int = 4
    linear_head_dim: int = 64
    rope_theta: float = 10000.0
    mrope_section: tuple[int, int, int] = (3, 3, 2)
    vision_depth: int = 2
    vision_hidden: int = 64
    vision_intermediate: int = 128
    vision_heads: int = 4
    vision_positions: int = 64  # 8 x 8

    @property
    def layer_types(self) -> list[str]:
        return ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(self.layers)]

    def control(self, offset: int) -> int:
        """Id of the control token `offset` places after <|endoftext|>."""
        return self.base_vocab + offset

    @property
    def end_of_text(self) -> int:
        return self.control(0)

    @property
    def end_of_turn(self) -> int:
        return self.control(2)

    @property
    def image_token(self) -> int:
        return self.control(12)


DEMO = Shape()
TESTBED = Shape(
    hidden=512, layers=12, intermediate=768, heads=8, linear_k_heads=4, linear_v_heads=8, vocab=2048,
)  # fmt: skip


def config_json(s: Shape) -> dict[str, Any]:
    """`config.json` with the family's fields in the family's order."""
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": s.end_of_text,
        "full_attention_interval": 4,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        "initializer_range": 0.02,
        "intermediate_size": s.intermediate,
        "layer_types": s.layer_types,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": s.linear_head_dim,
        "linear_num_key_heads": s.linear_k_heads,
        "linear_num_value_heads": s.linear_v_heads,
        "linear_value_head_dim": s.linear_head_dim,
        "max_position_embeddings": 32768,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": s.vocab,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": list(s.mrope_section),
            "rope_type": "default",
            "rope_theta": s.rope_theta,
            "partial_rotary_factor": 0.25,
        },
    }
    vision = {
        "deepstack_visual_indexes": [],
        "depth": s.vision_depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": s.vision_hidden,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": s.vision_intermediate,
        "model_type": "qwen3_5",
        "num_heads": s.vision_heads,
        "num_position_embeddings": s.vision_positions,
        "out_hidden_size": s.hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "_name_or_path": "edgeq/demo",  # survives quantization, so that `edgeq chat` can say what it is talking to
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": s.image_token,
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": s.control(13),
        "vision_config": vision,
        "vision_end_token_id": s.control(10),
        "vision_start_token_id": s.control(9),
    }
