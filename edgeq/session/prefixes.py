"""States of a sequence that are kept, so that another with the same beginning goes on from there.

A recurrent state cannot be cut back: undoing a turn, answering it again or forgetting a stop string needs a state from
before. Whoever begins a reply asks for the longest prefix of its ids that is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from edgeq.engine import Engine, Ids
from edgeq.formats.bf16 import Float32
from edgeq.session.places import Place
from edgeq.state import State

__all__ = ["Prefix", "Prefixes"]

MOST = 16
KEPT = 1 << 25  # bytes of DeltaNet states that are kept beside a sequence's own, or two states


class Prefix(NamedTuple):
    """What was read and the state after it.

    ids: int32 [tokens]; places: of the pictures among them. logits: those after the last, float32 [vocabulary], where
    they are known.
    """

    ids: Ids
    places: tuple[Place, ...]
    state: State[Any]
    logits: Float32 | None = None

    def begins(self, ids: Ids, places: Sequence[Place]) -> bool:
        """Whether a sequence begins like this, and something is known, or left to be run, of what follows."""
        n = len(self.ids)
        if n > len(ids) - (self.logits is None) or not np.array_equal(self.ids, ids[:n]):
            return False
        return _shown(self.places, n) == _shown(places, n)


class Prefixes:
    """The prefixes of one sequence: `most` of them, the latest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept = list[Prefix]()

    @classmethod
    def of(cls, engine: Engine[Any, Any]) -> Self:
        """For a sequence on an engine: as many as `KEPT` bytes hold, but two at least, to undo and to answer again."""
        return cls(max(2, min(MOST, KEPT // max(1, engine.ops.state_nbytes(engine.config)))))

    def keep(self, prefix: Prefix) -> None:
        """Remember one, in place of the one with logits, which is the end of a prompt that was replied to."""
        n = len(prefix.ids)
        others = [kept for kept in self._kept if len(kept.ids) != n and kept.logits is None]
        self._kept = [*others, prefix][-self._most :]

    def longest(self, ids: Ids, places: Sequence[Place]) -> Prefix | None:
        """The longest that a sequence begins with; those that it does not begin with are forgotten."""
        self._kept = [kept for kept in self._kept if kept.begins(ids, places)]
        return max(self._kept, key=lambda kept: len(kept.ids), default=None)


def _shown(places: Sequence[Place], stop: int) -> list[tuple[int, int, bytes, int]]:
    """What tells apart what stands in the places before token `stop`."""
    return [(p.start, p.position, p.visual.digest, p.frame) for p in places if p.start < stop]
