"""Held-out cases for every skill, and their score for anything that can continue a list of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from . import conversations as conv
from . import pictures
from .skills import SKILLS, draw
from .text import render

DISTANCES = (100, 500, 2000, 4000)


class Runner(Protocol):
    """Greedy continuation of prompts. `images` are the patch vectors [n, 36, 1536] of the prompt's images, or of the
    temporal patches of its video."""

    sees: bool

    def __call__(self, prompts: list[list[int]], images: list[np.ndarray], max_tokens: int) -> list[list[int]]: ...


@dataclass(frozen=True)
class Task:
    """One row of the table: a name, whether the model thinks first, and a generator of cases."""

    name: str
    thinking: bool
    make: Callable[[Random], conv.Conversation]
    max_tokens: int = 160
    visual: bool = False


def tasks(cost: Callable[[str], int]) -> Iterator[Task]:
    for thinking in (False, True):
        for skill in SKILLS:
            yield Task(skill, thinking, _single(skill, thinking))
        for index, name in enumerate(("tool call", "tool answer")):
            yield Task(name, thinking, _tool(index, thinking))
    for distance in DISTANCES:
        yield Task(f"recall at {distance}", False, _recall(distance, cost), 40)
    for kind in pictures.KINDS:
        yield Task(f"see {kind}", False, _looking(kind), 40, visual=True)
    yield Task("see difference in a video", False, _looking("difference", video=True), 40, visual=True)


def _single(skill: str, thinking: bool) -> Callable[[Random], conv.Conversation]:
    return lambda rng: conv.single(draw(skill, rng, evaluation=True), thinking)


def _tool(index: int, thinking: bool) -> Callable[[Random], conv.Conversation]:
    return lambda rng: conv.tool_cases(rng, thinking)[index]


def _recall(distance: int, cost: Callable[[str], int]) -> Callable[[Random], conv.Conversation]:
    return lambda rng: conv.recall(rng, distance, cost, facts_told=2, evaluation=True)


def _looking(kind: str, *, video: bool = False) -> Callable[[Random], conv.Conversation]:
    return lambda rng: conv.seen(rng, kind, video=video)


@dataclass(frozen=True)
class Score:
    task: Task
    right: int
    cases: int
    wrong: list[tuple[str, str]]  # (prompt, what the model said)


def score(task: Task, run: Runner, tok: Tokenizer, cases: int, seed: int = 1) -> Score:
    """Right answers among `cases` held-out cases; the thought, if any, is not judged."""
    rng = Random(f"{seed}/{task.name}")
    made = [task.make(rng) for _ in range(cases)]
    prompts, images = zip(*(prompt_of(c, tok) for c in made), strict=True)
    texts = [tok.decode(ids, skip_special_tokens=False) for ids in run(list(prompts), list(images), task.max_tokens)]
    answers = [t.split("<|im_end|>")[0].rpartition("</think>")[2].strip() for t in texts]
    wrong = [
        (str(c.messages[-2]["content"]), t) for c, t, a in zip(made, texts, answers, strict=True) if not c.right(a)
    ]
    return Score(task, cases - len(wrong), cases, wrong)


def prompt_of(c: conv.Conversation, tok: Tokenizer) -> tuple[list[int], np.ndarray]:
    """Token ids up to the generation prompt, image tokens expanded, and the patches of the images."""
    text = render(c.prompt, c.tools, c.thinking, prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * pictures.MERGED)
    text = text.replace("<|video_pad|>", "".join(map(_temporal_patch, range(len(c.images)))))
    patches = pictures.patches(np.stack([np.asarray(i) for i in c.images])) if c.images else np.zeros((0, 36, 1536))
    return tok.encode(text, add_special_tokens=False).ids, patches.astype(np.float32)


def _temporal_patch(index: int) -> str:
    """That of the processor, for a video of two frames a second that shows every picture twice."""
    pads = "<|video_pad|>" * pictures.MERGED
    return f"<{index + 0.25:.1f} seconds><|vision_start|>{pads}<|vision_end|>"
