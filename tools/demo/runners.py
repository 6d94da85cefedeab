"""What can be evaluated: the folder through transformers, or through edgeq on any of its backends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def end_tokens(path: Path) -> list[int]:
    """<|endoftext|> and <|im_end|>."""
    end_of_text = json.loads((path / "config.json").read_text())["text_config"]["eos_token_id"]
    return [end_of_text, end_of_text + 2]


class TransformersRunner:
    """float32, batches of prompts padded on the left."""

    sees = True

    def __init__(self, path: Path, batch: int = 16) -> None:
        import torch
        from transformers import Qwen3_5ForConditionalGeneration

        self.torch, self.batch, self.ends = torch, batch, end_tokens(path)
        self.model = Qwen3_5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()

    def __call__(self, prompts: list[list[int]], images: list[np.ndarray], max_tokens: int) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            answers = self.generate([prompts[i] for i in rows], [images[i] for i in rows], max_tokens)
            for i, answer in zip(rows, answers, strict=True):
                out[i] = answer
        return out

    def generate(self, prompts: list[list[int]], images: list[np.ndarray], max_tokens: int) -> list[list[int]]:
        torch, pad = self.torch, self.ends[0]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        extra = {}
        patches = [p for p in images if len(p)]
        if patches:
            pixels = torch.from_numpy(np.concatenate(patches))
            shown, clips = ids == self.model.config.image_token_id, ids == self.model.config.video_token_id
            if clips.any():
                extra["pixel_values_videos"] = pixels.flatten(0, 1)
                extra["video_grid_thw"] = torch.tensor([[len(p), 6, 6] for p in patches])
            else:
                extra["pixel_values"] = pixels.flatten(0, 1)
                extra["image_grid_thw"] = torch.tensor([[1, 6, 6]] * len(pixels))
            extra["mm_token_type_ids"] = shown.int() + 2 * clips.int()
        with torch.inference_mode():
            done = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False,
                eos_token_id=self.ends, pad_token_id=pad, **extra,
            )  # fmt: skip
        return [self.cut(row.tolist()) for row in done[:, longest:]]

    def cut(self, ids: list[int]) -> list[int]:
        ends = [i for i, t in enumerate(ids) if t in self.ends]
        return ids[: ends[0]] if ends else ids


class EdgeqRunner:
    """Any edgeq folder (bf16 or quantized) on any backend, one prompt at a time; `tally` counts its drafts."""

    sees = True

    def __init__(self, path: Path, backend: str, draft: str | int = "auto") -> None:
        import edgeq
        from edgeq.generate import Tally

        self.model, self.draft, self.tally = edgeq.load(path, backend=backend), draft, Tally()

    def __call__(self, prompts: list[list[int]], images: list[np.ndarray], max_tokens: int) -> list[list[int]]:
        return [self.continue_greedily(ids, shown, max_tokens) for ids, shown in zip(prompts, images, strict=True)]

    def continue_greedily(self, ids: list[int], images: np.ndarray, max_tokens: int) -> list[int]:
        from edgeq.session.prompt import Prompt

        if self.model.config.video_token_id in ids:
            visuals = [("video", images.reshape(-1, 1536), (len(images), 6, 6))]
        else:
            visuals = [("image", patches, (1, 6, 6)) for patches in images]
        prompt = Prompt.of(ids, self.model.sight.places(ids, visuals))
        reply = self.model.generate(prompt, draft=self.draft, max_tokens=max_tokens, temperature=0.0)
        said, usage = [p.token for p in reply if p.token is not None], reply.usage
        self.tally.passes += usage.passes
        self.tally.drafted += usage.drafted_tokens
        self.tally.accepted += usage.accepted_tokens
        return said
