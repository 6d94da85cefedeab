"""A model of any size over a text, with the weights of one layer in memory at a time.

    stream = Stream(open_checkpoint(path), ops, floats=True)
    for name, x in stream.steps(chunks): ...      # "embed", "layer.0", ..., "norm": float32 [n * T, hidden]
    for read in stream.head(4096): ...            # the vocabulary in pieces: read(x) are its logits

All chunks go through a layer before the next one is read, each from an empty state, so what is held is a layer, a piece
of the vocabulary and the chunks' hidden states, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.ops import ArrayLike, Ops
from edgeq.config import ModelConfig
from edgeq.errors import MemoryBudgetError, ModelError
from edgeq.formats.bf16 import Array, Float32
from edgeq.loading import checked_matrix
from edgeq.model import text
from edgeq.weights import Matrix, QMatrix, TensorSpec, declare_text, map_tree

__all__ = ["Chunks", "Stream", "Weights"]

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")
Chunks = NDArray[np.int32]
"""Token ids [n, T] of n texts of one length."""

CALL = 2048  # tokens in a call of a layer: what it works in stays below 0.4 GB for the 4B


class Weights(Protocol):
    """What is asked of a checkpoint here (`edgeq.checkpoint.Checkpoint`, or what stands in for one)."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    def matrix(self, name: str) -> Matrix[Array]: ...
    def rows(self, name: str, rows: slice | Array) -> Float32: ...
    def dense(self, name: str) -> Float32: ...
    def drop_pages(self) -> None: ...
    def find_non_finite(self) -> str | None: ...


class Stream(Generic[A, M]):
    """A checkpoint on a backend, a layer at a time.

    floats: write quantized matrices out in float32. A backend multiplies those by activations as they are, so what is
    left of a difference between two models is due to their weights. Otherwise matrices, and the cache of keys and
    values, are what they are when the model runs, and so are its activations (8 bits on the native backend).
    """

    def __init__(self, checkpoint: Weights, ops: Ops[A, M], *, floats: bool = False) -> None:
        self.checkpoint, self.ops, self.floats = checkpoint, ops, floats
        self.config = checkpoint.config.text
        self._declared = declare_text(self.config)

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self._declared.layers)

    def steps(self, chunks: Chunks) -> Iterator[tuple[str, Float32]]:
        """What comes out of each step, [n * T, hidden]: "embed", "layer.0", ..., "norm". The array is the next step's
        to write to.

        Raises MemoryBudgetError for chunks longer than the context window.
        """
        count, length = chunks.shape
        if length > self.config.longest_context:
            raise MemoryBudgetError(
                f"chunks of {length} tokens exceed the context window of {self.config.longest_context}",
                hint="use shorter chunks",
            )
        x = self._embedded(chunks)
        yield "embed", x
        state, together = text.initial_state(self.ops, self.config), max(1, CALL // length)
        for i, (declared, before) in enumerate(zip(self._declared.layers, state.layers, strict=True)):
            layer = map_tree(self._leaf, declared)
            for first in range(0, count, together):
                some = min(together, count - first)
                rows = slice(first * length, (first + some) * length)
                angles = self.ops.rope_angles(self.ops.array(_positions(some, length)), self.config.rope)
                with np.errstate(all="ignore"):  # what is not a number shows in the logits
                    y, _ = self.ops.decoder_layers(
                        self.ops.array(x[rows]), [layer], self.config, angles, [[before] * some], [length] * some,
                        [0] * some,
                    )  # fmt: skip
                x[rows] = self.ops.numpy(y)
            del layer
            self.checkpoint.drop_pages()
            yield f"layer.{i}", x
        gain = self._leaf(self._declared.norm)
        for start in range(0, len(x), CALL):
            rows = slice(start, start + CALL)
            x[rows] = self.ops.numpy(self.ops.rms_norm(self.ops.array(x[rows]), gain, self.config.rms_norm_eps))
        yield "norm", x

    def head(self, step: int) -> Iterator[Callable[[Float32], Float32]]:
        """For every `step` rows of the vocabulary what reads hidden states [T, hidden] out through them: logits
        [T, rows]."""
        spec, ops = self._declared.lm_head, self.ops
        whole = checked_matrix(self.checkpoint, spec)
        for start in range(0, spec.shape[0], step):
            rows = slice(start, start + step)
            piece = self._chosen(_piece(whole, rows))

            def read(hidden: Float32, piece: M = piece) -> Float32:
                return ops.numpy(ops.linear(ops.array(hidden), piece))

            yield read
            self.checkpoint.drop_pages()

    def _embedded(self, chunks: Chunks) -> Float32:
        """The vectors of all tokens, each row of the table looked up once."""
        ids, places = np.unique(chunks, return_inverse=True)
        if ids.size and not 0 <= ids[0] <= ids[-1] < self.config.vocab_size:
            raise ModelError(
                f"{self.checkpoint.path}: the text has token {ids[-1]}, the vocabulary is {self.config.vocab_size}",
                hint="its tokenizer belongs to another model",
            )
        rows = self.checkpoint.rows(self._declared.embed_tokens.name, ids)
        self.checkpoint.drop_pages()
        return np.ascontiguousarray(rows[places.reshape(-1)])

    def _leaf(self, spec: TensorSpec) -> Any:
        if not spec.is_matrix:
            return self.ops.vector(self.checkpoint.dense(spec.name))
        return self._chosen(checked_matrix(self.checkpoint, spec))

    def _chosen(self, matrix: Matrix[Array]) -> M:
        """A matrix, or a piece of one, as the backend multiplies by it."""
        chosen = self.ops.matrix(matrix)
        if not self.floats or not isinstance(matrix, QMatrix):
            return chosen
        every = np.arange(matrix.codes.shape[0], dtype=np.int32)
        return self.ops.matrix(self.ops.numpy(self.ops.embed(chosen, self.ops.array(every))))


def _piece(matrix: Matrix[Array], rows: slice) -> Matrix[Array]:
    return matrix.map(lambda x: x[rows]) if isinstance(matrix, QMatrix) else matrix[rows]


def _positions(count: int, length: int) -> NDArray[np.int32]:
    """Of `count` texts one after another: int32 [3, count * length]."""
    return np.tile(np.arange(length, dtype=np.int32), (3, count))
