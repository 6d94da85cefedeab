"""Prompts with pictures and videos, and what transformers made of them: tools/make_vision_fixtures.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.safetensors import SafetensorsFile

DATA = Path(__file__).parent / "data" / "vision"
DEMO = Path(__file__).parent.parent / "edgeq" / "demo"


@dataclass(frozen=True)
class Case:
    """A prompt: ids int32 [n], positions int32 [3, n], for every visual 1 (image) or 2 (video) and its grid, the pixel
    values of all [patches, values]; and its features [tokens, hidden], logits [vocabulary] and greedy tokens."""

    ids: Array
    positions: Array
    rope_delta: int
    kinds: list[int]
    grids: list[tuple[int, int, int]]
    pixels: Float32
    features: Float32
    logits: Float32
    greedy: list[int]


@cache
def golden(path: Path) -> dict[str, Array]:
    """The tensors of a file by name."""
    file = SafetensorsFile(path)
    return {name: np.array(file.array(name)) for name in file.tensors}


def case(path: Path, name: str, pixels: Float32 | None = None) -> Case:
    """A case of a golden file; `pixels` where the file does not have them."""
    g = {key.partition(".")[2]: value for key, value in golden(path).items() if key.startswith(f"{name}.")}
    return Case(
        ids=g["ids"], positions=g["positions"], rope_delta=int(g["rope_delta"][0]), kinds=g["kinds"].tolist(),
        grids=[(int(t), int(h), int(w)) for t, h, w in g["grids"]],
        pixels=g["pixels"].astype(np.float32) if pixels is None else pixels,
        features=g["features"], logits=g["logits"], greedy=g["greedy"].tolist(),
    )  # fmt: skip


def patches(
    picture: Array,
    mean: Sequence[float] = (0.5,) * 3,
    std: Sequence[float] = (0.5,) * 3,
    size: int = 16,
    merge: int = 2,
) -> Float32:
    """The patches of a picture uint8 [h, w, 3], or of an even number of frames [n, h, w, 3], as transformers orders
    them: float32 [patches, 3 * 2 * size * size], frame pair after frame pair, square of patches after square."""
    frames = picture if picture.ndim == 4 else np.stack([picture, picture])
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    x = ((frames / 255 - np.array(mean)) / np.array(std)).astype(np.float32)
    n, height, width, _ = x.shape
    rows, columns = height // (merge * size), width // (merge * size)
    x = x.reshape(n // 2, 2, rows, merge, size, columns, merge, size, 3)
    return np.asarray(x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 6 * size * size), np.float32)
