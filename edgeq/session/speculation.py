"""Speculative decoding: drafts for a sequence, verified by the model in one pass, several tokens at a time.

The model's own choice is made after every token as without drafts, from the same logits; a draft only says which tokens
are worth computing logits for ahead of time. So whatever shapes that choice (penalties, top-k, masks, a seed) holds as
it is: a draft is accepted if it is the token that was chosen. With sampling this is speculative sampling for a draft
that is certain of its token: accepted with the target's probability, and otherwise the target's distribution without it
(Leviathan et al., arXiv:2211.17192, section 2.3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from edgeq.engine import Engine, Feed, Ids
from edgeq.formats.bf16 import Float32
from edgeq.generate import Tally, look_up
from edgeq.state import KVCache, State

__all__ = ["Speculation"]

_MOST = {"mtp": 4, "ngram": 7}
"""Drafts of a pass that chooses by itself. With the token before them they stay well below the 16 rows that give the
bits of single tokens (edgeq.backends.ops)."""


class _Ahead(NamedTuple):
    """A draft that was run: its token, the logits after it and the state after it."""

    token: int
    logits: Float32
    state: State[Any]


class Speculation:
    """Drafts for one sequence on an engine.

    draft: "auto", "mtp", "ngram", or a number of drafts for every pass (of the MTP head, or of n-grams without one).
    tokens: how many ids exist. always: ids that the MTP head may draft whatever the text.

    Raises UsageError for "mtp" where there is no head.
    """

    def __init__(
        self, engine: Engine[Any, Any], draft: str | int, *, tokens: int, always: Collection[int] = ()
    ) -> None:
        self.engine = engine
        self.with_head = draft != "ngram" and (draft == "mtp" or engine.drafts)
        if self.with_head:
            engine.need_head()
        self._fixed = draft if isinstance(draft, int) else None
        sources = [name for name in _MOST if draft in (name, "auto") or self._fixed]
        if self._fixed and self.with_head:
            sources.remove("ngram")
        self._most = {name: self._fixed or _MOST[name] for name in sources if name == "ngram" or self.with_head}
        self._vocabulary = engine.draft_vocabulary(tokens, always) if self.with_head else None
        self._ids = np.full(256, -1, np.int32)  # of the sequence by place, -1 where they are not known
        self._included = 0  # so many of them are in the vocabulary
        self._state: State[Any] | None = None
        self._ahead = deque[_Ahead]()
        self._pass: tuple[str, int, float] | None = None
        self._accepted = 0
        self._rest, self._rested = 0, 0  # plain passes to come that need no look at anything, and those that were
        self.bend: Callable[[int, list[int]], list[int]] | None = None
        """For measurements: what stands in for the drafts made of the tokens from a place on."""

    def observe(self, place: int, ids: Sequence[int] | Ids) -> None:
        """The sequence's tokens from `place` on, those known before at these places and behind them being gone."""
        end = place + len(ids)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.full(max(end, len(self._ids)), -1, np.int32)])
        self._ids[place:end] = ids
        self._included = min(self._included, place)

    def advance(self, state: State[Any], token: int, remaining: int, tally: Tally) -> tuple[Float32, State[Any]]:
        """The logits after `token`, which follows `state`, and the state after it.

        remaining: tokens that can still be wanted after it.
        """
        self.observe(state.length, [token])
        if self._ahead and state is self._state and self._ahead[0].token == token:
            _, logits, self._state = self._ahead.popleft()
            self._accepted += 1
            tally.accepted += 1
            return logits, self._state
        tally.passes += 1
        if self._rest:
            self._rest -= 1
            self._rested += 1
            (output,) = self.engine.run([Feed(state, np.array([token], np.int32))], checked=True)
            return output.logits[0], output.state
        self.settle()
        started = perf_counter()
        source, drafts, state = self._draft(state, token, remaining - 1)
        ids = np.array([token, *drafts], np.int32)
        (output,) = self.engine.run([Feed(state, ids, keep=len(drafts), rows=len(ids))], checked=True)
        self._pass = source, len(drafts), perf_counter() - started
        self._state, *others = output.states
        self._ahead.extend(map(_Ahead, drafts, output.logits[1:], others))
        tally.drafted += len(drafts)
        return output.logits[0], self._state

    def settle(self) -> None:
        """The drafts of the last pass that were not taken up by now never will be."""
        if self._pass is not None:
            self.engine.pace.record(*self._pass, self._accepted, chosen=self._fixed is None)
        if self._ahead and self._state is not None:  # nobody else has seen what is dropped here
            for now, later in zip(self._state.layers, self._ahead[-1].state.layers, strict=True):
                if isinstance(now, KVCache) and isinstance(later, KVCache):
                    now.take_back(later)
        if self._rested:
            self.engine.pace.rested(self._rested)
        self._rest, self._rested = 0, 0
        self._pass, self._accepted, self._state = None, 0, None
        self._ahead.clear()

    def _draft(self, state: State[Any], token: int, room: int) -> tuple[str, list[int], State[Any]]:
        """Where the next drafts come from, the drafts, and the state with the MTP head caught up if it made them."""
        rest = 0 if self._fixed else self.engine.pace.rest(self._most)
        if rest or room < 1:
            self._rest = max(0, rest - 1)  # this one is timed
            return "", [], state
        most = {source: min(high, room) for source, high in self._most.items()}
        known, found = self._ids[: state.length + 1], list[int]()
        if "ngram" in most:
            found = look_up(known, most["ngram"])
            most["ngram"] = len(found)
        if "mtp" in most and (state.draft is None or not state.draft.waiting):
            del most["mtp"]
        source, n = max(most.items(), default=("", 0)) if self._fixed else self.engine.pace.choose(most)
        drafts = found[:n] if source == "ngram" else []
        if source == "mtp" and n:
            assert self._vocabulary is not None
            self._vocabulary.include(known[self._included :])
            self._included = len(known)
            drafts, state = self.engine.need_head().draft(state, token, n, self._vocabulary.choose)
        if self.bend is not None and drafts:
            drafts = self.bend(len(known), drafts)
        return source if drafts else "", drafts, state
