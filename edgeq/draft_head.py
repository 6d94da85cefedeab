"""The MTP head at work: what it remembers of a sequence, and the tokens it drafts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.ops import ArrayLike, Ops
from edgeq.config import TextConfig
from edgeq.loading import LoadedWeights
from edgeq.model import mtp, text
from edgeq.state import DraftState, Rows, State, joined
from edgeq.weights import MTPWeights

__all__ = ["MANY", "PIECES", "DraftHead", "DraftVocabulary", "draft_prefix"]

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")
Ids = NDArray[np.int32]

PREFIXES = (1 << 16, 1 << 15, 1 << 14, 1 << 13)
PREFIX_SHARE = 0.05  # of the language model's bytes; the head of a draft may read no more
MANY = 256
"""Tokens that may wait: a short prompt with a short reply never needs the head. 2 MB for each 1024 of hidden size."""

PIECES = 16
"""Pieces of unread tokens, which are then joined: every pass adds one, and looks at all."""


class DraftHead(Generic[A, M]):
    """A model's MTP head. It holds no sequence: `DraftState`s are values, like all states."""

    def __init__(self, ops: Ops[A, M], c: TextConfig, weights: LoadedWeights[A, M]) -> None:
        self.ops, self.config, self._loaded = ops, c, weights

    def load(self) -> None:
        """Have its weights, which otherwise come with the first draft."""
        assert self._weights

    @property
    def _weights(self) -> MTPWeights[A, M]:
        weights = self._loaded.mtp
        assert weights is not None, "only a model with a head has one"
        return weights

    def state(self) -> DraftState[A]:
        """What it remembers at first: nothing."""
        empty = np.zeros((0, self.config.num_key_value_heads, self.config.head_dim), np.float32)
        return DraftState(self.ops.kv_cache(empty, empty))

    def caught_up(self, draft: DraftState[A]) -> DraftState[A]:
        """With all tokens read but the last, which has to wait for the one that follows."""
        if draft.waiting < 2:
            return draft
        unread, cache = joined(self.ops, draft), draft.cache
        vectors, hidden, positions = _pairs(unread)
        for start in range(0, positions.shape[1], MANY):  # what it works in is for so many
            rows = slice(start, start + MANY)
            piece = Rows(vectors[rows], hidden[rows], positions[:, rows])
            cache = mtp.remember(self.ops, self.config, self._weights, piece, cache)
        return DraftState(cache, (self._last(unread),))

    def read(self, draft: DraftState[A]) -> tuple[A, DraftState[A]]:
        """The same by the whole layer: what it says after each token read, [waiting - 1, hidden]; at least one."""
        unread = joined(self.ops, draft)
        hidden, cache = mtp.predict(self.ops, self.config, self._weights, _pairs(unread), draft.cache)
        return hidden, DraftState(cache, (self._last(unread),))

    def draft(self, state: State[A], token: int, n: int, choose: Callable[[A], int]) -> tuple[list[int], State[A]]:
        """n tokens that may follow `token`, which follows `state`; and `state` with the head caught up.

        choose: the token for what the head says, [1, hidden].
        """
        assert state.draft is not None
        draft = self.caught_up(state.draft)
        (last,), cache, ids = draft.unread, draft.cache, [token]
        hidden, stands = last.hidden, last.positions
        for i in range(n):
            rows = Rows(self._embed(ids[-1]), hidden, stands)
            hidden, cache = mtp.predict(self.ops, self.config, self._weights, rows, cache)
            ids.append(choose(hidden))
            stands = np.full((3, 1), state.next_position + i, np.int32)
        draft.cache.take_back(cache)
        return ids[1:], state._replace(draft=draft)

    def _last(self, rows: Rows[A]) -> Rows[A]:
        """The last of some tokens, in memory of its own: a view would keep all of a prompt's chunk with every state."""
        vectors, hidden = (self.ops.concat([x[-1:], x[:0]]) for x in (rows.vectors, rows.hidden))  # two: joined anew
        return Rows(vectors, hidden, rows.positions[:, -1:].copy())

    def _embed(self, token: int) -> A:
        return text.embed(self.ops, self._loaded.text, np.array([token], np.int32))


class DraftVocabulary(Generic[A, M]):
    """The tokens that a sequence's drafts are chosen among, so that a draft need not read the whole head.

    They are the first `prefix` ids, whose rows of the head are used where they are (ids of a byte-level BPE are in the
    order of its merges, roughly the most frequent first), and others whose rows are gathered: `always` (control tokens)
    and all that the sequence holds.

    tokens: how many ids exist; the rows behind them are padding. fits: whether there is room for so many bytes of rows
    that are gathered; where there is none, tokens that are new wait.
    """

    alive: ClassVar[WeakSet[DraftVocabulary[Any, Any]]] = WeakSet()

    def __init__(
        self, ops: Ops[A, M], head: M, tokens: int, row_nbytes: int, prefix: int, always: Collection[int] = (),
        fits: Callable[[int], bool] = lambda _: True,
    ) -> None:  # fmt: skip
        self._fits = fits
        self._ops, self._head, self._tokens, self._row_nbytes = ops, head, tokens, row_nbytes
        self._prefix = min(prefix, tokens)
        self._others = dict.fromkeys(sorted(i for i in always if self._prefix <= i < tokens))
        self._matrices = [ops.rows(head, slice(0, self._prefix))]
        self._gathered = np.empty(0, np.int32)
        self.alive.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that were gathered."""
        return len(self._gathered) * self._row_nbytes

    def include(self, ids: Ids) -> None:
        """Tokens of the sequence, which from now on can be drafted."""
        self._others.update(dict.fromkeys(ids[(ids >= self._prefix) & (ids < self._tokens)].tolist()))

    def choose(self, hidden: A) -> int:
        """The likeliest of them for what the MTP head says, [1, hidden]."""
        new = len(self._others) - len(self._gathered)
        many = new > len(self._gathered) // 64  # so that a text of many rare words does not gather them for each
        if many and self._fits(len(self._others) * self._row_nbytes):
            self._gathered = np.fromiter(self._others, np.int32)
            self._matrices[1:] = [self._ops.rows(self._head, self._gathered)]
        first, *others = (self._ops.numpy(y)[0] for y in self._ops.linears(hidden, self._matrices))
        best = int(first.argmax())
        if others and others[0].max() > first[best]:
            return int(self._gathered[others[0].argmax()])
        return best


def draft_prefix(row_nbytes: int, model_nbytes: int) -> int:
    """Rows of the head that a draft weighs: as many as it can read in a twentieth of what a token reads.

    Twice as many find 1 to 2 % more of the tokens of prose and code (docs/concepts/drafts.md), so it is a wide optimum.
    """
    fitting = (rows for rows in PREFIXES if rows * row_nbytes <= PREFIX_SHARE * model_nbytes)
    return next(fitting, PREFIXES[-1])


def _pairs(rows: Rows[A]) -> Rows[A]:
    """All tokens but the last, with the vectors of those that follow them."""
    return Rows(rows.vectors[1:], rows.hidden[:-1], rows.positions[:, :-1])
