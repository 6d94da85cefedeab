"""Training batches as a pure function of (seed, step): what makes the training deterministic and resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from tokenizers import Tokenizer

from . import conversations as conv
from . import pictures
from .architecture import Shape
from .text import answer_spans, render

PROMPT_WEIGHT = 0.05  # what the user says is learnt a little too: it shapes the embedding
THIN = 8  # .. on one token in eight, eight times as much


@dataclass(frozen=True)
class Kind:
    """One kind of batch: `rows` conversations of at most `length` tokens."""

    name: str
    rows: int
    length: int
    share: float


KINDS = (
    Kind("direct", 16, 256, 0.3),
    Kind("think", 32, 128, 0.32),
    Kind("tools", 6, 640, 0.12),
    Kind("long", 2, 2048, 0.03),
    Kind("longer", 1, 4096, 0.01),
    Kind("looking", 32, 128, 0.22),
)

# Copying from the context is the ability that all list and recall skills rest on, and it appears late; once the forms
# of the answers are known, long lists to copy bring it about. After that, sums and lists are what is learnt slowest.
DRILLS = {name: Kind(name, 16, 256, 0.0) for name in ("copying", "small sums", "sums", "lists", "counting")}
THOUGHT = {name: Kind(name, 32, 128, 0.0) for name in ("thought lists", "thought counts")}
EXTRA = {**DRILLS, **THOUGHT, "middle": Kind("middle", 8, 512, 0.0), **{k.name: k for k in KINDS}}
PHASES: tuple[tuple[int, dict[str, float]], ...] = (  # (first step, shares of extra batches)
    (0, {}),
    (400, {"copying": 0.4}),
    (800, {"copying": 0.04, "lists": 0.12, "small sums": 0.12, "sums": 0.14}),
    (2200, {"copying": 0.02, "lists": 0.14, "small sums": 0.04, "sums": 0.1}),
    (3000, {"lists": 0.12, "sums": 0.07, "tools": 0.15, "thought lists": 0.06, "longer": 0.015}),
    (4700, {"lists": 0.1, "sums": 0.1, "small sums": 0.03, "tools": 0.13, "thought lists": 0.09, "longer": 0.015}),
    (5600, {"lists": 0.1, "sums": 0.08, "tools": 0.22, "thought lists": 0.09, "middle": 0.05, "longer": 0.015}),
    (6500, {"counting": 0.15, "thought counts": 0.18, "sums": 0.05, "tools": 0.16, "middle": 0.03, "longer": 0.015}),
)


def kind_at(step: int, rng: Random) -> Kind:
    point = rng.random()
    for name, share in [extra for first, extra in PHASES if first <= step][-1].items():
        if point < share:
            return EXTRA[name]
        point -= share
    return rng.choices(KINDS, [k.share for k in KINDS])[0]


@dataclass
class Batch:
    """ids, weights [B, T + 1] (weight of each token as a target), positions [3, B, T + 1], images [N, 96, 96, 3]."""

    kind: str
    ids: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    images: np.ndarray


def converse(kind: str, rng: Random, room: int, cost: Callable[[str], int]) -> conv.Conversation:
    thinking = rng.random() < 0.3
    if kind == "think":
        return conv.mixed(rng, rng.choice((room // 2, room, room, room)), cost, conv.THINKING)
    if kind in THOUGHT:
        return conv.mixed(rng, rng.choice((room // 2, room)), cost, conv.THOUGHT[kind])
    if kind == "tools":
        return conv.tool_use(rng, room, cost, thinking)
    if kind == "middle":
        return conv.recall(rng, rng.randint(room // 3, room - 40), cost, thinking)
    if kind in ("long", "longer"):
        return conv.recall(rng, room - 40, cost, thinking)
    if kind in DRILLS:
        return conv.drill(kind, rng, room, cost)
    if kind == "looking":
        return conv.looking(rng, room, cost)
    if rng.random() < 0.3:
        return conv.recall(rng, rng.randint(40, room - 16), cost, thinking)
    return conv.mixed(rng, room, cost)


def encode(c: conv.Conversation, tok: Tokenizer, s: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [T], target weights [T], positions [3, T] of a whole conversation, its images expanded."""
    text = render(c.messages, c.tools, c.thinking)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * pictures.MERGED)
    encoded = tok.encode(text, add_special_tokens=False)
    ids = np.array(encoded.ids)
    starts = np.array([a for a, _ in encoded.offsets])
    weights = np.full(len(ids), PROMPT_WEIGHT, np.float32)
    for begin, end in answer_spans(text):
        weights[(starts >= begin) & (starts < end)] = 1
    weights[ids == s.image_token] = 0
    return ids, weights, positions_of(ids, s)


def positions_of(ids: np.ndarray, s: Shape) -> np.ndarray:
    """mRoPE positions [3, T]; all images have the training size."""
    side = pictures.SIZE // 32
    out, at, i = np.zeros((3, len(ids)), np.int64), 0, 0
    while i < len(ids):
        if ids[i] == s.image_token:
            out[:, i : i + side * side], at = pictures.grid_positions(side, side, at)
            i += side * side
        else:
            out[:, i] = at
            at, i = at + 1, i + 1
    return out


def make_batch(seed: int, step: int, tok: Tokenizer, s: Shape) -> Batch:
    rng = Random(f"{seed}/{step}")
    kind = kind_at(step, rng)
    ids = np.full((kind.rows, kind.length + 1), s.end_of_text)
    weights = np.zeros(ids.shape, np.float32)
    positions = np.broadcast_to(np.arange(kind.length + 1), (3, *ids.shape)).copy()
    images = []

    def cost(text: str) -> int:
        return len(tok.encode(text, add_special_tokens=False).ids)

    for row in range(kind.rows):
        while True:
            c = converse(kind.name, rng, kind.length, cost)
            row_ids, row_weights, row_positions = encode(c, tok, s)
            if len(row_ids) <= kind.length + 1:
                break
        n = len(row_ids)
        ids[row, :n], weights[row, :n], positions[:, row, :n] = row_ids, row_weights, row_positions
        images += [np.asarray(image) for image in c.images]
    thinned(weights, step)
    pixels = np.stack(images) if images else np.zeros((0, pictures.SIZE, pictures.SIZE, 3), np.uint8)
    return Batch(kind.name, ids, weights, positions, pixels)


def thinned(weights: np.ndarray, step: int) -> None:
    """One prompt token in THIN keeps its weight, THIN times as large: the same on average for fewer logits."""
    column = np.arange(weights.shape[1])
    prompt = weights < 1
    weights[prompt & (column % THIN != step % THIN)] = 0
    weights[prompt] *= THIN


def sample_texts(seed: int, count: int) -> list[str]:
    """Rendered conversations of every kind, to train the tokenizer on."""
    rng = Random(f"{seed}/tokenizer")

    def words(text: str) -> int:
        return len(text) // 4

    out = []
    for _ in range(count):
        kind = rng.choices(KINDS, [k.share * k.rows for k in KINDS])[0]
        c = converse(kind.name, rng, kind.length, words)
        out.append(render(c.messages, c.tools, c.thinking))
    return out
