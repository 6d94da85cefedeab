#!/usr/bin/env python3
"""Write tests/data/prompts.json: what transformers makes of histories with pictures.

tools/make_prompt_fixtures.py            needs transformers 5.23, torch and torchvision

Each case has a history, whose pictures are given by their sizes only, and the ids, positions and rope delta that the
processor and the model make of it, with the demo model's tokenizer and template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoProcessor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "edgeq" / "demo"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def image(height: int, width: int) -> dict[str, Any]:
    return {"type": "image", "shape": [height, width, 3]}


def video(frames: int, height: int, width: int, fps: float) -> dict[str, Any]:
    return {"type": "video", "shape": [frames, height, width, 3], "fps": fps}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def assistant(words: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words, **fields}


CASES: dict[str, dict[str, Any]] = {
    "image": {"messages": [user(image(64, 96), text("What is this?"))]},
    "between": {"messages": [user(text("Look! "), image(300, 500), text("\n\nWhat is it?"))], "thinking": True},
    "last": {"messages": [user(text("  See:  "), image(224, 224))]},
    "nothing said": {"messages": [user(image(100, 700))]},
    "two": {"messages": [user(image(96, 96), image(400, 120), text("Which is larger?"))]},
    "earlier turns": {
        "messages": [
            {"role": "system", "content": [text("Be "), text("brief.")]},
            user(image(96, 160), text("What is this?")), assistant("A circle.", reasoning_content="I see it."),
            user("Sure?"), assistant("<think>\nLooking again.\n</think>\n\nYes."),
            user(text("And this"), image(320, 256), text("?")),
        ]
    },
    "video": {"messages": [user(video(5, 96, 128, 2.0), text("What happens?"))]},
    "video, sampled": {"messages": [user(text("Hm!"), video(24, 128, 96, 8.0), text(" So?"))]},
    "video of two": {"messages": [user(video(2, 160, 64, 25.0), text("What changed?"))]},
    "mixed": {
        "messages": [
            user(image(128, 64), text("first"), video(6, 64, 64, 3.0), image(64, 128), text("then")),
            assistant("I see."), user(video(4, 64, 96, 1.0), text("And now?")),
        ]
    },
    "numbered": {
        "messages": [user(image(96, 96), video(4, 96, 96, 2.0), image(64, 64), text("?")), assistant("Hm."),
                     user(image(96, 96), text("!"))],
        "add_vision_id": True,
    },
    "tools": {
        "messages": [
            {"role": "system", "content": "Use tools."}, user("Look around."),
            assistant("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": {"far": "yes"}}}]),
            {"role": "tool", "content": [image(64, 224), text("done")]},
        ],
        "tools": [TOOL], "thinking": True,
    },
}  # fmt: skip


def main() -> None:
    processor = AutoProcessor.from_pretrained(DEMO)
    processor.image_processor.size = {"shortest_edge": 4096, "longest_edge": 1 << 18}
    processor.video_processor.size = {"shortest_edge": 9216, "longest_edge": 9216}
    processor.video_processor.max_frames = 768
    config = AutoConfig.from_pretrained(DEMO)
    with torch.device("meta"):
        model = Qwen3_5Model(config)
    made = {}
    for name, case in CASES.items():
        for inner in (False, True) if any(p["type"] == "video" for p in _pictures(case)) else (False,):
            made[name + ", vLLM's reading" * inner] = {
                **case,
                "inner": inner,
                **expected(processor, model, case, inner),
            }
    (ROOT / "tests" / "data" / "prompts.json").write_text(json.dumps(made) + "\n")


def _pictures(case: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [m["content"] for m in case["messages"] if isinstance(m["content"], list)]
    return [part for content in contents for part in content if part["type"] != "text"]


def expected(processor: Any, model: Any, case: dict[str, Any], inner: bool) -> dict[str, Any]:
    options = {"enable_thinking": case["thinking"]} if "thinking" in case else {}
    rendered = processor.apply_chat_template(
        case["messages"], tools=case.get("tools"), add_generation_prompt=True, tokenize=False,
        add_vision_id=case.get("add_vision_id", False), **options,
    )  # fmt: skip
    if inner:
        rendered = rendered.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    images = [torch.zeros(p["shape"]).byte().permute(2, 0, 1) for p in _pictures(case) if p["type"] == "image"]
    clips = [p for p in _pictures(case) if p["type"] == "video"]
    metadata = [{"fps": p["fps"], "total_num_frames": p["shape"][0]} for p in clips]
    out = processor(
        text=[rendered], images=images or None, return_tensors="pt", return_metadata=True,
        videos=[np.zeros(p["shape"], np.uint8).transpose(0, 3, 1, 2) for p in clips] or None,
        video_metadata=metadata or None,
    )  # fmt: skip
    grids = {kind: out.get(f"{kind}_grid_thw", torch.zeros(0, 3, dtype=torch.int64)) for kind in ("image", "video")}
    positions, delta = model.get_rope_index(
        out["input_ids"], out["mm_token_type_ids"], grids["image"], grids["video"], out["attention_mask"]
    )
    times = [processor._calculate_timestamps(list(m.frames_indices), m.fps, 2) for m in out.get("video_metadata", [])]
    return {
        "ids": out["input_ids"][0].tolist(), "positions": positions[:, 0].tolist(), "rope_delta": int(delta),
        "grids": {kind: grid.tolist() for kind, grid in grids.items()}, "timestamps": times,
    }  # fmt: skip


if __name__ == "__main__":
    main()
