#!/usr/bin/env python3
"""Make tests/data/models: tiny random models and what Hugging Face transformers computes with them.

    python tools/make_fixtures.py [SHAPE...]   # needs torch and transformers; the tests that use the result do not

For each shape: config.json and model.safetensors (bfloat16), and golden.safetensors with, in float32 and eager
attention, the logits of a 257-token text, the last logits of shorter ones, the hidden states after every layer, and
64 greedy tokens with the gap between the two best logits at every step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from edgeq.checkpoint import open_checkpoint  # noqa: E402
from edgeq.checkpoint.folder import FolderCheckpoint  # noqa: E402
from edgeq.formats.bf16 import to_float32  # noqa: E402
from edgeq.testing import config_values, write_checkpoint  # noqa: E402
from edgeq.weights import text_tensors  # noqa: E402

LENGTHS = (1, 2, 63, 64, 65, 257)
GREEDY_PROMPT, GREEDY = 17, 64
LINEAR, FULL = "linear_attention", "full_attention"
SHAPES: dict[str, dict[str, Any]] = {
    "value-heads-2x": {},
    "value-heads-1x": {"linear_num_value_heads": 2, "num_key_value_heads": 1},
    "value-heads-4x": {"linear_num_value_heads": 8, "num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False, "layer_types": [LINEAR, FULL]},
    "all-linear": {"layer_types": [LINEAR] * 3},
    "all-attention": {"layer_types": [FULL] * 3},
    "wide-conv": {"linear_conv_kernel_dim": 7, "layer_types": [LINEAR, LINEAR, FULL]},
    "odd-dims": {
        "linear_key_head_dim": 24, "linear_value_head_dim": 40, "head_dim": 48, "hidden_size": 96,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
                            "mrope_interleaved": True, "mrope_section": [5, 4, 3]},
    },
    "yarn": {
        "max_position_embeddings": 64, "layer_types": [LINEAR, FULL, FULL], "head_dim": 48,
        "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 48,
                            "rope_theta": 1e4, "partial_rotary_factor": 1.0,
                            "mrope_interleaved": True, "mrope_section": [8, 8, 8]},
    },
    "yarn-spelled-out": {
        "max_position_embeddings": 384, "layer_types": [FULL, FULL],
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96,
                            "rope_theta": 1e3, "partial_rotary_factor": 1.0, "beta_fast": 4.0, "beta_slow": 0.5,
                            "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False,
                            "mrope_interleaved": True, "mrope_section": [8, 4, 4]},
    },
    "linear-scaling": {
        "layer_types": [LINEAR, FULL],
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                            "mrope_interleaved": True, "mrope_section": [2, 1, 1]},
    },
}  # fmt: skip
SMALL = {"vocab_size": 160, "intermediate_size": 96}


def reference_model(folder: Path) -> Qwen3_5ForCausalLM:
    """transformers' model with the weights of `folder`, float32."""
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    import json

    values = json.loads((folder / "config.json").read_text())
    config = Qwen3_5TextConfig(**{**values["text_config"], "tie_word_embeddings": values["tie_word_embeddings"]})
    config._attn_implementation = "eager"
    model = Qwen3_5ForCausalLM(config).eval()
    state = {}
    for spec in text_tensors(checkpoint.config.text):
        name = spec.name if spec.name.startswith("lm_head.") else f"model.{spec.name}"
        state[name] = torch.from_numpy(np.array(to_float32(checkpoint.raw(spec.name))))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


@torch.no_grad()
def golden(model: Qwen3_5ForCausalLM, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Everything the tests compare with."""

    def run(tokens: list[int], **options: Any) -> Any:
        return model(torch.tensor([tokens]), use_cache=False, **options)

    out = {"ids": ids.astype(np.int32)}
    full = run(ids.tolist(), output_hidden_states=True)
    out["logits"] = full.logits[0].numpy()
    out |= last_logits(run, ids)
    out |= trace(model, ids)
    tokens, gaps = ids[:GREEDY_PROMPT].tolist(), []
    for _ in range(GREEDY):
        logits = run(tokens).logits[0, -1]
        best = torch.topk(logits, 2)
        gaps.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    out["greedy"] = np.array(tokens[GREEDY_PROMPT:], np.int32)
    out["gaps"] = np.array(gaps, np.float32)
    return out


def last_logits(run: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Logits after texts of odd lengths, each run by itself."""
    return {f"last.{n}": run(ids[:n].tolist()).logits[0, -1].numpy() for n in LENGTHS}


@torch.no_grad()
def trace(model: Qwen3_5ForCausalLM, ids: np.ndarray, length: int = 65) -> dict[str, np.ndarray]:
    """The hidden states after the embedding, every layer and the final norm, of the first `length` tokens."""
    seen: dict[str, np.ndarray] = {}

    def hook(name: str) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output)[0].numpy()

        return keep

    text = model.model
    modules = {"embed": text.embed_tokens, "norm": text.norm, "logits": model.lm_head}
    modules |= {f"layer.{i}": layer for i, layer in enumerate(text.layers)}
    handles = [module.register_forward_hook(hook(f"trace.{name}")) for name, module in modules.items()]
    model(torch.tensor([ids[:length].tolist()]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def main() -> None:
    torch.manual_seed(0)
    for seed, (name, overrides) in enumerate(SHAPES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        folder = ROOT / "tests" / "data" / "models" / name
        config = write_checkpoint(folder, config_values(**{**SMALL, **overrides}), seed=seed)
        ids = np.random.default_rng(seed).integers(0, config.text.vocab_size, max(LENGTHS))
        values = golden(reference_model(folder), ids)
        save_file({key: np.ascontiguousarray(value) for key, value in values.items()}, folder / "golden.safetensors")
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name:16} {size / 1000:6.0f} kB  smallest greedy gap {values['gaps'].min():.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
