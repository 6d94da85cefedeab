"""The vision tower: patches of images and of video frames in, vectors of the language model out.

`see` reads like the model: a patch embedding, a learned table of positions stretched over the picture, blocks of full
attention within a frame, and a merger that makes one vector out of every square of patches. Patches come in the order
of those squares ("block order", see `patch_places`), so that a square's patches are neighbours.

The arithmetic is that of Qwen3-VL (Bai et al., arXiv:2511.21631) without its deepstack, after the ViT of Dosovitskiy et
al. (arXiv:2010.11929) with a rotary embedding over rows and columns (Heo et al., arXiv:2403.13298).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.ops import Angles, ArrayLike, Ops
from edgeq.config import VisionConfig
from edgeq.formats.bf16 import Float32
from edgeq.vision.visual import Grid, Pixels
from edgeq.weights import MergerWeights, VisionBlockWeights, VisionWeights

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")
Index = NDArray[np.int32]

__all__ = [
    "BAND",
    "EPS",
    "largest_band",
    "patch_places",
    "position_taps",
    "see",
    "vision_angles",
    "vision_blocks",
]

BAND = 4096  # patches that go through the tower together; through its blocks a whole frame has to

EPS = 1e-6  # of every layer norm; fixed by the architecture, not by the configuration
_THETA = 10000.0  # likewise, of the rotary embedding


class _Frames(NamedTuple):
    """Some frames of one grid, one after another, and which of all patches is their first."""

    grid: Grid
    first: int

    @property
    def lengths(self) -> list[int]:
        """Patches of each frame."""
        frames, height, width = self.grid
        return [height * width] * frames

    @property
    def patches(self) -> int:
        """Patches of all of them."""
        return math.prod(self.grid)


def see(ops: Ops[A, M], c: VisionConfig, w: VisionWeights[A, M], pixels: Pixels, grids: Sequence[Grid]) -> A:
    """What the language model sees of some images and videos.

    pixels: float32 [patches, colours * 2 frames * height * width of a patch], in block order, all grids one after
    another. Returns [tokens, out_hidden_size], a token for every square of spatial_merge_size^2 patches.

    Frames do not attend to one another: they go through the tower some at a time, about BAND patches.
    """
    features = []
    for frames in _bands(grids):
        x = _embed_patches(ops, c, w, pixels, frames)
        x = ops.vision_blocks(x, w.blocks, c, vision_angles(ops, c, frames.grid), frames.lengths)
        x = ops.concat([_merge(ops, c, w.merger, x[rows]) for rows in _pieces(frames.patches)])
        ops.start(x, [])
        features.append(x)
    return ops.concat(features)


def _bands(grids: Sequence[Grid]) -> Iterator[_Frames]:
    """The frames of each grid, as many together as fit into a band."""
    first = 0
    for frames, height, width in grids:
        at_a_time = max(1, BAND // (height * width))
        for done in range(0, frames, at_a_time):
            band = _Frames((min(at_a_time, frames - done), height, width), first)
            yield band
            first += band.patches


def largest_band(grids: Sequence[Grid]) -> int:
    """The most patches that go through the blocks together: what the memory depends on."""
    return max(frames.patches for frames in _bands(grids))


def _pieces(patches: int) -> Iterator[slice]:
    """Rows of `patches` patches, some at a time: where each is by itself, the work of all at once would be large."""
    return (slice(start, min(start + BAND, patches)) for start in range(0, patches, BAND))


def _embed_patches(ops: Ops[A, M], c: VisionConfig, w: VisionWeights[A, M], pixels: Pixels, frames: _Frames) -> A:
    """Each patch's projection and its place: [patches, hidden]."""
    taps, weights = position_taps(c, frames.grid)
    embedded = []
    for rows in _pieces(frames.patches):
        values = ops.array(pixels[frames.first + rows.start : frames.first + rows.stop])
        place = ops.embedding_bag(w.pos_embed, taps[rows], weights[rows])
        embedded.append(ops.add(ops.affine(values, *w.patch_embed), place))
    return ops.concat(embedded)


def patch_places(c: VisionConfig, grid: Grid) -> tuple[Index, Index]:
    """Row and column of every patch, int32 [patches] each, in block order: square after square, frame after frame."""
    frames, height, width = grid
    m = c.spatial_merge_size
    places = np.indices((height, width), np.int32).reshape(2, height // m, m, width // m, m)
    rows, columns = np.tile(places.swapaxes(2, 3).reshape(2, -1), frames)
    return rows, columns


def position_taps(c: VisionConfig, grid: Grid) -> tuple[Index, Float32]:
    """How the table of positions [side, side] is stretched over a picture, corner on corner, linearly between.

    Returns the entries that a patch's place is made of, int32 [patches, 4], and their weights, float32 [patches, 4].
    """
    side = c.position_side
    _, height, width = grid
    rows, columns = patch_places(c, grid)
    (top, bottom), (above, below) = _axis_taps(rows, height, side)
    (left, right), (before, after) = _axis_taps(columns, width, side)
    taps = [top * side + left, top * side + right, bottom * side + left, bottom * side + right]
    weights = [above * before, above * after, below * before, below * after]
    return np.stack(taps, axis=1), np.stack(weights, axis=1)


def _axis_taps(place: Index, size: int, side: int) -> tuple[tuple[Index, Index], tuple[Float32, Float32]]:
    """The two entries around each place of an axis of `size` on one of `side`, and their weights."""
    at = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(at).astype(np.int32)
    part = at - low.astype(np.float32)
    return (low, np.minimum(low + 1, side - 1)), (1 - part, part)


def vision_angles(ops: Ops[A, M], c: VisionConfig, grid: Grid) -> Angles[A]:
    """Angles of the rotary embedding: half of a head's pairs turn with the patch's row, half with its column.

    Cosine and sine, each [patches, head_dim / 2].
    """
    pairs = c.head_dim // 4  # of an axis
    frequency = (1.0 / _THETA ** (np.arange(pairs) * 2 / (2 * pairs))).astype(np.float32)
    angles = np.concatenate([place[:, None].astype(np.float32) * frequency for place in patch_places(c, grid)], axis=1)
    return ops.array(np.cos(angles)), ops.array(np.sin(angles))


def vision_blocks(
    ops: Ops[A, M], x: A, ws: Sequence[VisionBlockWeights[A, M]], c: VisionConfig, angles: Angles[A],
    lengths: Sequence[int],
) -> A:  # fmt: skip
    """Block after block: [patches, hidden]."""
    for w in ws:
        x = vision_block(ops, x, w, c, angles, lengths)
    return x


def vision_block(
    ops: Ops[A, M], x: A, w: VisionBlockWeights[A, M], c: VisionConfig, angles: Angles[A], lengths: Sequence[int]
) -> A:
    """x + attention(norm(x)), then x + mlp(norm(x)): [patches, hidden]."""
    x = ops.add(x, _attention(ops, ops.layer_norm(x, *w.norm1, EPS), w, c, angles, lengths))
    return ops.add(x, _mlp(ops, ops.layer_norm(x, *w.norm2, EPS), w))


def _attention(
    ops: Ops[A, M], h: A, w: VisionBlockWeights[A, M], c: VisionConfig, angles: Angles[A], lengths: Sequence[int]
) -> A:
    """Every patch attends to all patches of its frame."""
    qkv = ops.affine(h, *w.qkv).reshape(-1, 3, c.num_heads, c.head_dim)
    q, k, v = ops.rope(qkv[:, 0], angles), ops.rope(qkv[:, 1], angles), qkv[:, 2]
    o = ops.full_attention(q, k, v, lengths)
    return ops.affine(o.reshape(-1, c.hidden_size), *w.proj)


def _mlp(ops: Ops[A, M], h: A, w: VisionBlockWeights[A, M]) -> A:
    return ops.affine(ops.gelu(ops.affine(h, *w.fc1), exact=False), *w.fc2)


def _merge(ops: Ops[A, M], c: VisionConfig, w: MergerWeights[A, M], x: A) -> A:
    """Norm each patch, lay the patches of a square side by side, and project: [tokens, out_hidden_size]."""
    squares = ops.layer_norm(x, *w.norm, EPS).reshape(-1, c.merged_size)
    return ops.affine(ops.gelu(ops.affine(squares, *w.fc1), exact=True), *w.fc2)
