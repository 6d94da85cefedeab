#!/usr/bin/env python3
"""Make tests/data/vision: what Hugging Face transformers computes with pictures and videos.

    python tools/make_vision_fixtures.py     # needs torch, torchvision and transformers; the tests do not

For each of SHAPES a tiny random checkpoint (bfloat16), and prompts as ids with pixel values, in golden.safetensors. For
the demo model (edgeq/demo) conversations through transformers' processor: demo.json says what was asked, with names of
the pictures in demo.safetensors. Everything was computed in float32 with eager attention:

    CASE.ids, CASE.positions [3, n], CASE.rope_delta   what the processor and the model make of the prompt
    CASE.grids [visuals, 3], CASE.kinds                1 for an image, 2 for a video
    CASE.pixels [patches, values]                      of all visuals; where left out, of the pictures without resizing
    CASE.features [tokens, hidden]                     the tower's output
    CASE.logits [vocabulary]                           after the prompt
    CASE.greedy, CASE.gaps                             tokens that follow, and how far the second best logits are
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import (
    AutoTokenizer,
    Qwen2VLImageProcessor,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.video_utils import VideoMetadata

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from vision_cases import patches  # noqa: E402

from edgeq.testing import config_values, write_checkpoint  # noqa: E402

DATA = ROOT / "tests" / "data" / "vision"
GREEDY = 8  # tokens at most, fewer where the best logit is not CLEAR of the second
CLEAR = 0.01
IMAGE, VIDEO, START, END = 150, 151, 152, 153
TEXT = {"vocab_size": 160, "intermediate_size": 96, "layer_types": ["linear_attention", "full_attention"]}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # overrides of text_config and of vision_config
    "narrow": ({}, {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48}),
    "wide": ({"hidden_size": 48}, {"hidden_size": 96, "num_heads": 3}),
    "table-up": ({}, {"num_position_embeddings": 9}),
    "table-down": ({}, {"num_position_embeddings": 400, "num_heads": 1}),
    "untied": ({"tie_word_embeddings": False}, {"hidden_size": 72, "num_heads": 6, "depth": 1}),
}
GRIDS = {  # of the visuals of a prompt, in order; more than one frame is a video
    "image": [(1, 6, 10)],
    "two": [(1, 2, 14), (1, 10, 2)],
    "smallest": [(1, 2, 2)],
    "video": [(3, 4, 6)],
    "mixed": [(1, 6, 2), (2, 2, 4), (1, 4, 4)],
}


def load(folder: Path) -> Qwen3_5ForConditionalGeneration:
    """transformers' model, float32."""
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def golden(model: Any, inputs: dict[str, Any], kinds: list[int]) -> dict[str, np.ndarray]:
    """Everything the tests compare with; `inputs` as the processor returns them."""
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    grids: dict[str, Any] = {key: inputs[key] for key in ("image_grid_thw", "video_grid_thw") if key in inputs}
    pixels: dict[str, Any] = {key: inputs[key] for key in ("pixel_values", "pixel_values_videos") if key in inputs}
    positions, delta = model.model.get_rope_index(ids, types, **grids)
    seen = []
    hook = model.model.visual.register_forward_hook(lambda _m, _i, output: seen.append(output.pooler_output.numpy()))
    logits = model(input_ids=ids, mm_token_type_ids=types, **pixels, **grids).logits[0, -1]
    hook.remove()
    out = {"logits": logits.numpy(), "features": in_order(seen, kinds, grids, model)}
    greedy, gaps = list[int](), list[float]()
    pads = model.config.image_token_id, model.config.video_token_id  # which only a prompt may have
    while len(greedy) < GREEDY:
        best = torch.topk(logits, 2)
        gap = float(best.values[0] - best.values[1])
        if int(best.indices[0]) in pads or gap < CLEAR:
            break
        greedy.append(int(best.indices[0]))
        gaps.append(gap)
        ids = torch.cat([ids, torch.tensor([[greedy[-1]]])], dim=1)
        types = torch.cat([types, torch.zeros((1, 1), dtype=types.dtype)], dim=1)
        logits = model(input_ids=ids, mm_token_type_ids=types, **pixels, **grids).logits[0, -1]
    of_kind = {1: iter(grids.get("image_grid_thw", ())), 2: iter(grids.get("video_grid_thw", ()))}
    return out | {
        "ids": inputs["input_ids"][0].numpy().astype(np.int32),
        "positions": positions[:, 0].numpy().astype(np.int32),
        "rope_delta": delta[0].numpy().astype(np.int32),
        "grids": np.array([next(of_kind[kind]).tolist() for kind in kinds], np.int32),
        "kinds": np.array(kinds, np.int32),
        "greedy": np.array(greedy, np.int32),
        "gaps": np.array(gaps, np.float32),
    }


def in_order(seen: list[np.ndarray], kinds: list[int], grids: dict[str, Any], model: Any) -> np.ndarray:
    """The tower sees all images, then all videos: its outputs in the order of the prompt."""
    square = model.config.vision_config.spatial_merge_size**2
    rest = dict(zip(sorted(set(kinds)), seen, strict=True))
    sizes = {
        kind: [int(g.prod()) // square for g in grids[key]]
        for kind, key in ((1, "image_grid_thw"), (2, "video_grid_thw"))
        if key in grids
    }
    parts = []
    for kind in kinds:
        size = sizes[kind].pop(0)
        parts.append(rest[kind][:size])
        rest[kind] = rest[kind][size:]
    return np.concatenate(parts)


# --- tiny checkpoints ------------------------------------------------------------------------------------------------


def make_shape(name: str, text: dict[str, Any], vision: dict[str, Any], seed: int) -> None:
    folder = DATA / name
    values = config_values(vision=True, **{**TEXT, **text})
    values["vision_config"] |= {"patch_size": 4, "hidden_size": 64, "num_heads": 4, "depth": 2, **vision}
    values |= {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    }  # fmt: skip
    write_checkpoint(folder, values, seed=seed)
    model, rng, tensors = load(folder), np.random.default_rng(seed), dict[str, np.ndarray]()
    for case, grids in GRIDS.items():
        # float16 keeps the fixture small; the values are what patches of a picture may be
        pixels = [rng.uniform(-2, 2, (int(np.prod(g)), 3 * 2 * 4 * 4)).astype(np.float16) for g in grids]
        kinds = [1 if grid[0] == 1 else 2 for grid in grids]
        inputs = {"input_ids": torch.tensor([random_prompt(rng, grids)])}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE) + 2 * (inputs["input_ids"] == VIDEO)
        for kind, (of_grid, of_pixels) in enumerate(
            [("image_grid_thw", "pixel_values"), ("video_grid_thw", "pixel_values_videos")], 1
        ):
            mine = [i for i, k in enumerate(kinds) if k == kind]
            if mine:
                inputs[of_grid] = torch.tensor([grids[i] for i in mine])
                inputs[of_pixels] = torch.from_numpy(np.concatenate([pixels[i] for i in mine])).float()
        found = golden(model, inputs, kinds) | {"pixels": np.concatenate(pixels)}
        tensors |= {f"{case}.{key}": np.ascontiguousarray(value) for key, value in found.items()}
    save_file(tensors, folder / "golden.safetensors")
    report(name, folder, tensors)


def random_prompt(rng: np.random.Generator, grids: list[tuple[int, int, int]]) -> list[int]:
    """Some text, and between it each frame's place, as a tokenizer would give them."""
    ids: list[int] = rng.integers(0, 140, 7).tolist()
    for frames, height, width in grids:
        for _ in range(frames):
            pad = IMAGE if frames == 1 else VIDEO
            ids += [START, *[pad] * (height * width // 4), END, *rng.integers(0, 140, 3).tolist()]
    return ids


# --- conversations with the demo model -------------------------------------------------------------------------------


def pictures() -> dict[str, np.ndarray]:
    """uint8 [height, width, 3], videos [frames, height, width, 3], of sizes that need no resizing."""
    rng = np.random.default_rng(5)
    sizes = {"square": (96, 96), "broad": (64, 160), "tall": (96, 32), "odd": (5, 64, 96), "two": (2, 64, 64)}
    sizes["one"] = (1, 64, 32)
    return {name: rng.integers(0, 256, (*size, 3)).astype(np.uint8) for name, size in sizes.items()}


def image(name: str) -> dict[str, str]:
    return {"type": "image", "image": name}


def video(name: str) -> dict[str, str]:
    return {"type": "video", "video": name}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


ANSWER = {"role": "assistant", "content": [words("A red circle.")]}
PLAIN = {"mean": [0.5] * 3, "std": [0.5] * 3}
OTHER = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "image": ([user(image("square"), words("What colour is it?"))], PLAIN),
    "two_images": ([user(words("One "), image("broad"), words(" and two "), image("tall"), words(": alike?"))], PLAIN),
    "earlier_turns": (
        [user(image("tall"), words("What is this?")), ANSWER, user(words("And this?"), image("square"))], PLAIN,
    ),
    "video_odd": ([user(video("odd"), words("What happens?"))], PLAIN),
    "video_two": ([user(video("two"), words("What happens?"))], PLAIN),
    "video_one": ([user(video("one"), words("What is this?"))], PLAIN),
    "image_and_video": (
        [user(image("broad"), words("Then "), video("odd")), ANSWER, user(words("And "), image("square"))], PLAIN,
    ),
    "other_mean": ([user(image("broad"), words("What is this?")), ANSWER, user(video("two"))], OTHER),
}  # fmt: skip
FPS = 2.0  # of the frames, all of which are taken


def make_demo() -> None:
    demo, held, tensors = ROOT / "edgeq" / "demo", pictures(), dict[str, np.ndarray]()
    model = load(demo)
    for case, (messages, settings) in CASES.items():
        inputs, kinds = processed(demo, messages, held, settings)
        found = golden(model, inputs, kinds)
        tensors |= {f"{case}.{key}": np.ascontiguousarray(value) for key, value in found.items()}
    tensors |= {f"picture.{name}": value for name, value in held.items()}
    cases = {case: {"messages": messages, **settings, "fps": FPS} for case, (messages, settings) in CASES.items()}
    (DATA / "demo.json").write_text(json.dumps(cases, indent=1) + "\n")
    save_file(tensors, DATA / "demo.safetensors")
    report("demo", DATA / "demo.safetensors", tensors)


def processed(
    demo: Path, messages: list[dict[str, Any]], held: dict[str, np.ndarray], settings: dict[str, Any]
) -> tuple[dict[str, Any], list[int]]:
    """The processor's inputs for the model, and the kinds of the visuals."""
    common = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": settings["mean"],
        "image_std": settings["std"],
    }  # fmt: skip
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 1024, "longest_edge": 1 << 20}, **common),
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 1024, "longest_edge": 1 << 20}, cap_pixels_per_frame=False, **common
        ),
        tokenizer=AutoTokenizer.from_pretrained(demo),
        chat_template=(demo / "chat_template.jinja").read_text(),
    )
    parts = [p for m in messages for p in m["content"] if p["type"] != "text"]
    names = {kind: [p[kind] for p in parts if p["type"] == kind] for kind in ("image", "video")}
    frames = {name: held[name].repeat(2 // min(2, len(held[name])), axis=0) for name in names["video"]}
    visuals = dict[str, Any]()
    if names["image"]:
        visuals["images"] = [torch.from_numpy(held[name]).permute(2, 0, 1) for name in names["image"]]
    if names["video"]:
        visuals |= {
            "videos": [torch.from_numpy(x).permute(0, 3, 1, 2) for x in frames.values()],
            "video_metadata": [metadata(held[name]) for name in names["video"]],
            "do_sample_frames": False,
        }
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = dict(processor(text=[text], return_tensors="pt", **visuals))
    for key, pixels in (
        ("pixel_values", [patches(held[name], settings["mean"], settings["std"]) for name in names["image"]]),
        ("pixel_values_videos", [patches(x, settings["mean"], settings["std"]) for x in frames.values()]),
    ):
        assert not pixels or np.abs(np.concatenate(pixels) - inputs[key].numpy()).max() <= 1e-6
    return inputs, [1 if p["type"] == "image" else 2 for p in parts]


def metadata(frames: np.ndarray) -> VideoMetadata:
    """All frames, at FPS; transformers does not take one frame: it is given twice, both times at 0.0 s."""
    indices = list(range(len(frames))) if len(frames) > 1 else [0, 0]
    return VideoMetadata(
        total_num_frames=len(indices), fps=FPS, frames_indices=indices, duration=len(frames) / FPS,
        height=frames.shape[1], width=frames.shape[2],
    )  # fmt: skip


def report(name: str, path: Path, tensors: dict[str, np.ndarray]) -> None:
    files = list(path.iterdir()) if path.is_dir() else [path]
    gaps = np.concatenate([value for key, value in tensors.items() if key.endswith(".gaps")])
    size = sum(file.stat().st_size for file in files)
    print(f"{name:16} {size / 1000:6.0f} kB  {len(gaps)} greedy tokens, smallest gap {gaps.min():.4f}", file=sys.stderr)


def main() -> None:
    shutil.rmtree(DATA, ignore_errors=True)
    torch.manual_seed(0)
    for seed, (name, (text, vision)) in enumerate(SHAPES.items()):
        make_shape(name, text, vision, seed)
    make_demo()


if __name__ == "__main__":
    main()
