"""Write a trained model as an ordinary checkpoint folder of the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from . import pictures
from .architecture import Shape, config_json
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

VIDEO_FRAMES = 4  # of the size of an image each; the model was not taught video

README = """# The edgeq demo model

A Qwen3.5-architecture model of {parameters:.1f} million parameters, trained from generated text and pictures by
`tools/train_demo.py` of the edgeq repository; `docs/development/demo-model.md` there says what it can do and how well.

Weights and tokenizer vocabulary: Apache-2.0, as edgeq itself. `chat_template.jinja`, the control tokens and the
pre-tokenizer's pattern are those of Qwen/Qwen3.5-0.8B (Apache-2.0, Alibaba Cloud). The training data was made by the
generators in `tools/demo`; no other text was used.
"""


def generation_config(s: Shape) -> dict[str, Any]:
    """Stop tokens, and calm sampling: the presence penalty of the family's cards would forbid "2 + 2 = 4"."""
    return {
        "bos_token_id": s.end_of_text,
        "do_sample": True,
        "eos_token_id": [s.end_of_turn, s.end_of_text],
        "pad_token_id": s.end_of_text,
        "presence_penalty": 0.0,
        "temperature": 0.3,
        "top_k": 20,
        "top_p": 0.9,
    }


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return {
        name: t.detach().cpu().to(torch.float32 if name.endswith(FLOAT32) else torch.bfloat16).contiguous()
        for name, t in model.state_dict().items()
    }


def export(model: Model, tok: Tokenizer, out: Path) -> None:
    """Configuration, model.safetensors, tokenizer, template, preprocessors, a picture and README into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "model.safetensors"
    save_file(tensors(model), str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)
    (out / "config.json").write_text(json.dumps(config_json(model.s), indent=4) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation_config(model.s), indent=4) + "\n")
    (out / "README.md").write_text(README.format(parameters=sum(p.numel() for p in model.parameters()) / 1e6))
    pixels = pictures.SIZE**2
    size = {"longest_edge": pixels, "shortest_edge": pixels}
    (out / "preprocessor_config.json").write_text(json.dumps({"size": size, **IMAGE_PROCESSOR}, indent=4) + "\n")
    size = {name: VIDEO_FRAMES * n for name, n in size.items()}
    video = {k: v for k, v in IMAGE_PROCESSOR.items() if k != "image_processor_type"}
    video |= {"fps": 2, "min_frames": VIDEO_FRAMES, "max_frames": VIDEO_FRAMES}
    video["video_processor_type"] = "Qwen3VLVideoProcessor"
    (out / "video_preprocessor_config.json").write_text(json.dumps({"size": size, **video}, indent=4) + "\n")
    pictures.shipped().save(out / "picture.png", optimize=True)
    write_tokenizer(tok, model.s, out)
