"""The MTP head at work: what it remembers of a sequence, and the tokens it drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from edgeq.backends.ops import ArrayLike, Ops
from edgeq.config import TextConfig
from edgeq.loading import LoadedWeights
from edgeq.model import mtp, text
from edgeq.state import DraftState, Rows, State
from edgeq.weights import MTPWeights

__all__ = ["FEW", "DraftHead"]

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")

FEW = 16  # tokens that may wait unread: they go through the whole layer when something is drafted


class DraftHead(Generic[A, M]):
    """A model's MTP head. It holds no sequence: `DraftState`s are values, like all states."""

    def __init__(self, ops: Ops[A, M], c: TextConfig, weights: LoadedWeights[A, M]) -> None:
        self.ops, self.config, self._loaded = ops, c, weights

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
        unread = self._unread(draft)
        cache = mtp.remember(self.ops, self.config, self._weights, _pairs(unread), draft.cache)
        return DraftState(cache, (_last(unread),))

    def read(self, draft: DraftState[A]) -> tuple[A, DraftState[A]]:
        """The same by the whole layer: what it says after each token read, [waiting - 1, hidden]; at least one."""
        unread = self._unread(draft)
        hidden, cache = mtp.predict(self.ops, self.config, self._weights, _pairs(unread), draft.cache)
        return hidden, DraftState(cache, (_last(unread),))

    def draft(self, state: State[A], token: int, n: int, choose: Callable[[A], int]) -> tuple[list[int], State[A]]:
        """n tokens that may follow `token`, which follows `state`; and `state` with the head caught up.

        choose: the token for what the head says, [1, hidden].
        """
        assert state.draft is not None
        draft = state.draft if state.draft.waiting <= FEW else self.caught_up(state.draft)
        unread = self._unread(draft)
        vectors = self._embed(token)
        if draft.waiting > 1:
            vectors = self.ops.concat([unread.vectors[1:], vectors])
        hidden, cache = mtp.predict(
            self.ops, self.config, self._weights, unread._replace(vectors=vectors), draft.cache
        )  # fmt: skip
        caught_up = DraftState(cache.truncated(cache.length - 1), (_last(unread),))
        hidden = hidden[-1:]
        ids = [choose(hidden)]
        for i in range(n - 1):
            stands = np.full((3, 1), state.next_position + i, np.int32)
            rows = Rows(self._embed(ids[-1]), hidden, stands)
            hidden, cache = mtp.predict(self.ops, self.config, self._weights, rows, cache)
            ids.append(choose(hidden))
        return ids, state._replace(draft=caught_up)

    def _embed(self, token: int) -> A:
        return text.embed(self.ops, self._loaded.text, np.array([token], np.int32))

    def _unread(self, draft: DraftState[A]) -> Rows[A]:
        """The unread tokens in one piece."""
        if len(draft.unread) == 1:
            return draft.unread[0]
        vectors, hidden, positions = zip(*draft.unread, strict=True)
        return Rows(self.ops.concat(vectors), self.ops.concat(hidden), np.concatenate(positions, axis=1))


def _pairs(rows: Rows[A]) -> Rows[A]:
    """All tokens but the last, with the vectors of those that follow them."""
    return Rows(rows.vectors[1:], rows.hidden[:-1], rows.positions[:, :-1])


def _last(rows: Rows[A]) -> Rows[A]:
    return Rows(rows.vectors[-1:], rows.hidden[-1:], rows.positions[:, -1:])
