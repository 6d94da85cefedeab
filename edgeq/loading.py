"""A checkpoint's weights on a backend, part by part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.ops import ArrayLike, Ops
from edgeq.checkpoint import Checkpoint
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array, Float32, all_finite
from edgeq.formats.mapped import Pages, is_mapped
from edgeq.model.text import embed
from edgeq.weights import (
    Matrix,
    MTPWeights,
    Part,
    QMatrix,
    Role,
    StreamedLayers,
    TensorSpec,
    TextWeights,
    Turns,
    VisionWeights,
    declare_mtp,
    declare_text,
    declare_vision,
    map_tree,
)

__all__ = ["LoadedWeights", "checked_matrix"]

EMBEDDED = 16  # tokens that are looked up at a time where the table does not stay: 32 MB of large pages
HEAD_PIECE = 16 << 20  # bytes of the head that are read at a time
ROWS = 64  # of the head: pieces are multiples of it

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")
W = TypeVar("W", bound=Matrix[Any])


class LoadedWeights(Generic[A, M]):
    """The weights of a checkpoint on a backend: a part is loaded when it is first asked for, until it is let go.

    resident: bytes of the language model's mapped matrices that stay in memory; the rest is let go as soon as it has
    been used, and read anew in every pass: layers first to last, then rows of the head. None: all stay. cached: whether
    the system's page cache has room for what is let go.

    Raises ModelError for NaN or infinity where a kernel would hide it. Elsewhere it shows in the logits.
    """

    def __init__(
        self, checkpoint: Checkpoint, ops: Ops[A, M], resident: int | None = None, *, cached: bool = True
    ) -> None:
        self.checkpoint, self.ops, self._resident, self._cached = checkpoint, ops, resident, cached
        self.medium: Pages | None = None
        """Pages of some weights that do not stay; None where all do."""
        self._arrays: dict[str, list[Array]] = {}  # of the language model's matrices, where not all stay
        self._head: list[tuple[slice, M]] = []  # its rows in pieces, those that stay the first
        self.parts = frozenset(spec.part for spec, _ in checkpoint.storage())
        self._trees: dict[Part, Any] = {}
        self._nbytes: dict[Part, dict[bool, int]] = {}  # of every part, mapped and not

    def nbytes(self, *parts: Part, mapped: bool) -> int:
        """Bytes of the weights loaded, of some parts: those used where the file is mapped, or those that are copies."""
        return sum(self._nbytes[part][mapped] for part in parts if part in self._nbytes)

    @property
    def text(self) -> TextWeights[A, M]:
        """The language model."""
        c = self.checkpoint.config.text
        tree: TextWeights[A, M] = self._tree(
            Part.TEXT, lambda: declare_text(c), lambda w: self.ops.ready(self._streamed(w), c)
        )
        return tree

    @property
    def streams(self) -> bool:
        """Whether some of the language model's weights are read anew in every pass."""
        return self._resident is not None

    def embed(self, ids: NDArray[np.int32]) -> A:
        """The vectors of `ids` int32 [T]: [T, hidden]."""
        if self._resident is None:
            return embed(self.ops, self.text, ids)
        parts = list[A]()
        for start in range(0, len(ids), EMBEDDED):
            parts.append(embed(self.ops, self.text, ids[start : start + EMBEDDED]))
            self._embedding.let_go()
        return parts[0] if len(parts) == 1 else self.ops.concat(parts)

    def read_out(self, hidden: A) -> tuple[Float32, bool]:
        """The logits of hidden states [T, hidden], float32 [T, vocabulary], and whether all are finite."""
        if not self._head:
            return self.ops.read_out(hidden, self.text.lm_head)
        logits, whole = np.empty((hidden.shape[0], self.checkpoint.config.text.vocab_size), np.float32), True
        self._head_turns.begin()
        for i, (rows, matrix) in enumerate(self._head):
            logits[:, rows], finite = self.ops.read_out(hidden, matrix)
            whole &= finite
            self._head_turns.done(i)
        return logits, whole

    def _streamed(self, w: TextWeights[A, M]) -> TextWeights[A, M]:
        """The weights of which only some stay; the first ones, as all are used once in a pass."""
        if self._resident is None:
            return w
        c, left = self.checkpoint.config.text, self._resident
        layers = list[Pages | None]()
        for i in range(len(w.layers)):
            arrays = [x for name, some in self._arrays.items() if name.startswith(f"layers.{i}.") for x in some]
            pages = Pages(arrays, cached=self._cached)
            layers.append(None if pages.nbytes <= left else pages)
            left -= min(left, pages.nbytes)
        name = "embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        head = self._arrays[name]
        row = max(1, sum(x.nbytes for x in head) // c.vocab_size)
        kept = min(left // row // ROWS * ROWS, c.vocab_size)
        starts = [0] * (kept > 0) + list(range(kept, c.vocab_size, max(ROWS, HEAD_PIECE // row // ROWS * ROWS)))
        pieces = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], c.vocab_size], strict=True)]
        self._head = [(rows, self.ops.rows(w.lm_head, rows)) for rows in pieces]
        self._head_turns = Turns(
            [None if rows.stop <= kept else Pages([x[rows] for x in head], cached=self._cached) for rows in pieces]
        )
        self._embedding = Pages(
            [x[kept if c.tie_word_embeddings else 0 :] for x in self._arrays["embed_tokens.weight"]],
            cached=self._cached,
        )
        self.medium = next((pages for pages in layers if pages), None) or self._embedding
        self._arrays.clear()
        return w._replace(layers=StreamedLayers.of(w.layers, Turns(layers)))

    @property
    def mtp(self) -> MTPWeights[A, M] | None:
        """The multi-token-prediction head; None for a checkpoint without one."""
        c = self.checkpoint.config.text
        tree: MTPWeights[A, M] | None = self._tree(Part.MTP, lambda: declare_mtp(c))
        return tree

    @property
    def vision(self) -> VisionWeights[A, M] | None:
        """The vision tower; None for a checkpoint without one."""
        v = self.checkpoint.config.vision
        tree: VisionWeights[A, M] | None = self._tree(Part.VISION, lambda: declare_vision(v) if v else None)
        return tree

    def release(self, part: Part) -> None:
        """Let a part go: its memory is free once nobody else holds its weights. It is loaded again when asked for."""
        self._trees.pop(part, None)
        self._nbytes.pop(part, None)

    def _tree(self, part: Part, declare: Callable[[], Any], ready: Callable[[Any], Any] = lambda tree: tree) -> Any:
        if part not in self._trees and part in self.parts:
            self._nbytes[part] = {True: 0, False: 0}
            self._trees[part] = ready(map_tree(self._leaf, declare()))
            if part is not Part.MTP or not self.ops.maps_files:  # the head comes while the others are in use
                self.checkpoint.drop_pages()  # where the backend has copies of its own, the file's pages need not stay
        return self._trees.get(part)

    def _leaf(self, spec: TensorSpec) -> A | M:
        if not spec.is_matrix:
            return self.ops.vector(self._counted(spec, self.checkpoint.dense(spec.name)))
        return self.ops.matrix(self._counted(spec, checked_matrix(self.checkpoint, spec)))

    def _counted(self, spec: TensorSpec, weight: W) -> W:
        arrays = weight.arrays if isinstance(weight, QMatrix) else [weight]
        for x in arrays:
            self._nbytes[spec.part][self.ops.maps_files and is_mapped(x)] += x.nbytes
        if self._resident is not None and spec.part is Part.TEXT and spec.is_matrix:
            self._arrays[spec.name] = list(arrays)
            Pages(arrays).let_go()
        return weight


class _Matrices(Protocol):
    """What is asked of a checkpoint for one."""

    @property
    def path(self) -> Path: ...
    def matrix(self, name: str) -> Matrix[Array]: ...


def checked_matrix(checkpoint: _Matrices, spec: TensorSpec) -> Matrix[Array]:
    """A matrix, if nothing in it is NaN or infinite that would not show in the logits; else ModelError.

    Integer kernels turn NaN in scales or biases into numbers; a gate saturates; a key that is not a number never wins
    the softmax. All that is a tenth of a file at most.
    """
    matrix, where = checkpoint.matrix(spec.name), f"{checkpoint.path}: {spec.name}"
    if isinstance(matrix, QMatrix):
        if not all(map(all_finite, matrix.factors)):
            raise ModelError(f"{where} has NaN or infinity in its scales", hint="download or quantize it again")
    elif (spec.role is Role.GATE or spec.name.endswith("k_proj.weight")) and not all_finite(matrix):
        raise ModelError(f"{where} holds NaN or infinity", hint="download or quantize it again")
    return matrix
