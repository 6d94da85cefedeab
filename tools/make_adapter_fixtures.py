#!/usr/bin/env python
"""Make tests/data/adapters: tiny LoRA adapters as PEFT writes them, and what its merge_and_unload makes of the weights.

    PYTHONPATH=. PYTHON tools/make_adapter_fixtures.py     # needs torch, transformers and peft, which edgeq does not

The base is `edgeq.testing.write_checkpoint` with the configuration that is in tests/data/adapters/base.json, which the
tests write again. merged.safetensors of each adapter holds the tensors that merging changed, in bfloat16 as the base
has them; logits.npy are those of the model with the adapter, not merged, in float32.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

from edgeq.testing import config_values, write_checkpoint

OUT = Path(__file__).parent.parent / "tests" / "data" / "adapters"
IDS = [5, 17, 33, 2, 250, 99, 7, 7, 120, 64, 31]

ATTENTION = ["q_proj", "v_proj", "in_proj_qkv", "out_proj", "in_proj_a"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Qwen3_5ForConditionalGeneration, {
        "target_modules": r".*language_model.*\.(q_proj|v_proj|in_proj_qkv|out_proj|in_proj_a)", "r": 4,
        "lora_alpha": 6, "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"^model\.language_model.*in_proj_qkv": 3},
        "alpha_pattern": {"q_proj": 10, "layers.0.linear_attn.(out_proj|in_proj_a)": 1.5},
    }),
    "rslora": (Qwen3_5ForCausalLM, {
        "target_modules": ["gate_proj", "down_proj", "k_proj"], "r": 4, "lora_alpha": 3, "use_rslora": True,
        "fan_in_fan_out": True,
    }),
    "dora": (Qwen3_5ForCausalLM, {
        "target_modules": ["o_proj", "in_proj_z", "up_proj"], "r": 2, "lora_alpha": 4, "use_dora": True,
    }),
    "vision": (Qwen3_5ForConditionalGeneration, {
        "target_modules": ["qkv", "linear_fc1", "v_proj"], "r": 2, "lora_alpha": 4, "bias": "lora_only",
    }),
    "head": (Qwen3_5ForCausalLM, {"target_modules": ["lm_head", "q_proj"], "r": 2, "lora_alpha": 4}),
    "embedding": (Qwen3_5ForCausalLM, {"target_modules": ["embed_tokens"], "r": 2, "lora_alpha": 4}),
    "tied": (Qwen3_5ForCausalLM, {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "r": 2, "lora_alpha": 4,
        "ensure_weight_tying": True,
    }),
    "saved": (Qwen3_5ForCausalLM, {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "q_norm"], "r": 2, "lora_alpha": 4,
    }),
}  # fmt: skip


def base_values() -> dict[str, Any]:
    return config_values(
        layer_types=["linear_attention", "full_attention"], full_attention_interval=2, vision=True, vocab_size=256,
        intermediate_size=96, linear_key_head_dim=32, linear_value_head_dim=32,
    )  # fmt: skip


def load(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


def randomize(model: Any) -> None:
    """Nothing trained them: A and B, the lengths and the whole tensors get values like those of training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * noise)
            elif "lora_" in name:
                parameter.copy_(noise * 0.1)
            elif "modules_to_save" in name or (parameter.requires_grad and name.endswith("bias")):
                parameter.add_(noise * 0.1)


def make(name: str, kind: Any, options: dict[str, Any], base: Path) -> None:
    folder = OUT / name
    torch.manual_seed(0)
    model = get_peft_model(load(kind, base, torch.bfloat16), LoraConfig(task_type="CAUSAL_LM", **options))
    randomize(model)
    before = {key: value.clone() for key, value in load(kind, base, torch.bfloat16).state_dict().items()}
    model.peft_config["default"].base_model_name_or_path = "someone/tiny-qwen3.5"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)

    from peft import PeftModel

    exact = PeftModel.from_pretrained(load(kind, base, torch.float32), folder).eval()
    with torch.no_grad():
        logits = exact(input_ids=torch.tensor([IDS])).logits[0].float().numpy()
    np.save(folder / "logits.npy", logits)
    if name in ("head", "embedding"):
        return  # PEFT merges the adapter of one into both, and warns of it
    merged = PeftModel.from_pretrained(load(kind, base, torch.bfloat16), folder).merge_and_unload().state_dict()
    changed = {k: v.contiguous().clone() for k, v in merged.items() if k not in before or not torch.equal(v, before[k])}
    save_file(changed, folder / "merged.safetensors")
    print(name, len(changed), sum(f.stat().st_size for f in folder.iterdir()), sorted(changed)[:3])


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    values = base_values()
    (OUT / "base.json").write_text(json.dumps(values, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        write_checkpoint(base, values)
        for name, (kind, options) in CASES.items():
            make(name, kind, options, base)


if __name__ == "__main__":
    main()
