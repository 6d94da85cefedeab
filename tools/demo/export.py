"""Write a trained model as an ordinary checkpoint folder of the family."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from . import pictures
from .architecture import config_json
from .model import Model
from .text import write_tokenizer

FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")  # all else is bfloat16, as in the family

IMAGE_PROCESSOR = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return {
        name: t.detach().cpu().to(torch.float32 if name.endswith(FLOAT32) else torch.bfloat16).contiguous()
        for name, t in model.state_dict().items()
    }


def export(model: Model, tok: Tokenizer, out: Path) -> None:
    """config.json, model.safetensors, tokenizer, template and preprocessor into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors(model), str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_json(model.s), indent=4) + "\n")
    pixels = pictures.SIZE**2
    size = {"longest_edge": pixels, "shortest_edge": pixels}
    (out / "preprocessor_config.json").write_text(json.dumps({"size": size, **IMAGE_PROCESSOR}, indent=4) + "\n")
    write_tokenizer(tok, model.s, out)
