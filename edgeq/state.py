"""What a sequence carries from one call to the next.

A state is a *value*: the model takes one and returns another, and the old one stays good. DeltaNet layers have a
constant-size state; attention layers keep the keys and values of every token. Because a DeltaNet state cannot be
cut back, speculation asks for the states after each of the last tokens, too, and picks one (`keep` of
`edgeq.engine.Feed`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

A = TypeVar("A")

__all__ = [
    "BLOCK", "DeltaState", "DraftState", "KVCache", "LayerState", "Piece", "Rows", "State", "held_nbytes", "joined",
    "pieces",
]  # fmt: skip

BLOCK = 256
"""Tokens whose keys and values are stored together."""


class DeltaState(NamedTuple, Generic[A]):
    """State of a Gated DeltaNet layer, of constant size.

    conv: [width - 1, channels], the last raw inputs of the causal convolution, oldest first.
    matrix: float32 [value heads, V, K], the associative memory; a row per value entry.

    A backend's arrays, or what becomes one when it is read (the native backend's kept states are one matrix and what
    each token did to it); such a part tells by `memory` what it holds, as a KVCache does.
    """

    conv: A
    matrix: A


class KVCache(ABC, Generic[A]):
    """Rotated keys and values of the tokens so far: a value of `length` tokens, held however the backend likes."""

    length: int

    @abstractmethod
    def truncated(self, length: int) -> KVCache[A]:
        """The same cache after only its first `length` tokens."""

    @property
    def copies(self) -> bool:
        """Whether the next token has the last page copied: another cache has written there, or nobody can."""
        return False

    def take_back(self, later: KVCache[A]) -> None:
        """`later` grew out of this cache and is used by nobody any more: the next may be written over what it added,
        where a page would be copied otherwise."""

    @abstractmethod
    def arrays(self) -> tuple[A, A]:
        """Keys and values, each [length, KV heads, head dim]."""

    @abstractmethod
    def block(self, i: int) -> NDArray[Any]:
        """The keys and values of tokens `BLOCK * i` and up to `BLOCK - 1` more, exactly as they are held: an array of
        the same shape for every block, zero behind the last token. `Ops.stored_cache` makes a cache of them again."""

    @abstractmethod
    def mark(self, i: int) -> object:
        """What stands for block `i`: the same object is the same content, as far as both have tokens there."""

    @property
    def blocks(self) -> int:
        """Blocks that hold its tokens."""
        return -(-self.length // BLOCK)

    @abstractmethod
    def memory(self) -> Iterator[tuple[int, int]]:
        """What it holds, spare room included: for every piece of memory something that tells it from others, and its
        bytes. Caches that grew out of each other share most of their pieces."""

    @property
    def nbytes(self) -> int:
        """Bytes held, as if it shared none of them."""
        return sum(nbytes for _, nbytes in self.memory())


LayerState: TypeAlias = DeltaState[A] | KVCache[A]


class Joins(Protocol[A]):
    """What can join arrays: the operations of a backend."""

    def concat(self, xs: Sequence[A], axis: int = 0, /) -> A: ...


class Rows(NamedTuple, Generic[A]):
    """Tokens in a row as the MTP head reads them.

    vectors: [T, hidden], what the model was fed: embeddings, or an image's.
    hidden: [T, hidden], the model's hidden states after the final norm.
    positions: int32 [3, T], where they stand.
    """

    vectors: A
    hidden: A
    positions: NDArray[np.int32]


class DraftState(NamedTuple, Generic[A]):
    """What the MTP head remembers of a sequence: the keys and values of the tokens that it has read, and the latest
    ones that it has not.

    It reads a token together with the one that follows. So the last is always unread, and the others are read when
    there is something to draft, or when they have become many: a reply without drafts costs it next to nothing.
    `unread` holds them in pieces, as they came. A head that joins a sequence later knows only what came since.
    """

    cache: KVCache[A]
    unread: tuple[Rows[A], ...] = ()

    @property
    def waiting(self) -> int:
        """How many tokens are unread."""
        return sum(rows.positions.shape[1] for rows in self.unread)

    @property
    def length(self) -> int:
        """Tokens that it knows of."""
        return self.cache.length + self.waiting


def joined(ops: Joins[A], draft: DraftState[A]) -> Rows[A]:
    """The unread tokens in one piece; there is at least one."""
    if len(draft.unread) == 1:
        return draft.unread[0]
    vectors, hidden, positions = zip(*draft.unread, strict=True)
    return Rows(ops.concat(vectors), ops.concat(hidden), np.concatenate(positions, axis=1))


class State(NamedTuple, Generic[A]):
    """A sequence: one LayerState per layer, the number of tokens, and where the next token stands.

    `next_position` differs from `length` after an image, whose tokens share positions (mRoPE).
    `origin` names the model and backend that made it (`Engine.fingerprint`), which alone can go on from it; empty where
    nobody has said.
    `draft` is the MTP head's part; None where nobody drafts.
    """

    layers: tuple[LayerState[A], ...]
    length: int
    next_position: int
    origin: str = ""
    draft: DraftState[A] | None = None


class Piece(NamedTuple):
    """A piece of memory that a state holds: what it is for, what tells it from others while it lives, its bytes."""

    what: str
    key: int
    nbytes: int


def pieces(state: State[Any]) -> Iterator[Piece]:
    """The memory that a state holds: "KV cache", "DeltaNet states", and "draft" for what an MTP head has yet to read.
    States that grew out of each other have pieces in common."""
    caches = [layer for layer in state.layers if isinstance(layer, KVCache)]
    if state.draft is not None:
        caches.append(state.draft.cache)
        yield from (Piece("draft", id(x), x.nbytes) for rows in state.draft.unread for x in rows)
    for cache in caches:
        yield from (Piece("KV cache", *piece) for piece in cache.memory())
    for layer in state.layers:
        if not isinstance(layer, KVCache):
            for part in layer:
                memory = part.memory() if hasattr(part, "memory") else [(id(part), part.nbytes)]
                yield from (Piece("DeltaNet states", *piece) for piece in memory)


def held_nbytes(states: Iterable[State[Any]]) -> int:
    """Bytes that some states hold together, each piece of memory once however many of them share it."""
    return sum({piece.key: piece.nbytes for state in states for piece in pieces(state)}.values())
