"""Where a sequence is cut into calls of the model, and where its state is worth keeping.

Whatever states are at hand, a sequence is to give the bits that it gives when it is run from its beginning. So where it
is cut follows from the sequence alone. It consists of runs: what is *read* (prompts) and what was *said* (tokens that
were generated; the last of a reply is read together with what follows it). What was said is run again as it was: in
calls of so few rows that each token has the bits of a call of its own. What is read is cut at absolute multiples of the
chunk and, for the states there, where messages begin and pictures end. On a backend whose prompts may be cut at
multiples of some number without changing a bit (`Ops.grain`), those places are moved back to such multiples, and all of
these are as good as the beginning. On others they are cut where they are, always; so are prompts without messages after
64, 128 and 256 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from edgeq.engine import Engine, Ids
from edgeq.session.places import Place

__all__ = ["Cut", "Cuts", "Messages", "Said", "Span", "no_messages"]

Span = tuple[int, int]
"""Tokens of a sequence, from the first to the one after the last."""

Said = tuple[Span, ...]
"""How a beginning of a sequence was run: the spans that were generated, also those of none, where what is read begins
anew."""

LADDER = (64, 128, 256)  # tokens, after which a prompt without messages is cut
WORTH = 64  # tokens that are read at once, from which on a state before their end is kept


class Cut(NamedTuple):
    """The end of a call. why: what the state there is kept for; empty where it is not."""

    stop: int
    why: str = ""


class Messages(NamedTuple):
    """How messages show among the ids. begin: the token that begins one, -1 where there is none; user: the ids after it
    that make it a user's."""

    begin: int
    user: tuple[int, ...] = ()

    def starts(self, ids: Ids) -> list[tuple[int, bool]]:
        """Where messages begin, and whether it is a user's."""
        n = len(self.user)
        return [
            (int(at), tuple(ids[at + 1 : at + 1 + n].tolist()) == self.user) for at in np.flatnonzero(ids == self.begin)
        ]


no_messages = Messages(-1)


class Cuts:
    """The cuts of one sequence.

    ids: all of it, as far as it is known. spoken: the spans of generated replies, in order; the last may be going on.
    """

    def __init__(
        self, engine: Engine[Any, Any], ids: Ids, places: Sequence[Place] = (), spoken: Sequence[Span] = (),
        messages: Messages = no_messages,
    ) -> None:  # fmt: skip
        self._chunk, self._grain, self._few = engine.chunk, engine.ops.grain, engine.ops.few or engine.chunk
        self._total = len(ids)
        self._runs = list(_runs(spoken, len(ids)))
        self._kept = dict[int, str]()
        for start, stop, said in self._runs:
            if not said:
                self._kept |= self._worth_keeping(ids, places, messages, start, stop)

    def allows(self, place: int) -> bool:
        """Whether a run of the sequence from its beginning would have a call that ends there, or as good as that."""
        for start, stop, said in self._runs:
            if start < place < stop:
                return said or self._splits(place, start, stop)
        return True

    def said(self, stop: int) -> Said:
        """What was said of the first `stop` tokens: those behind all that is known are."""
        found = [(start, min(end, stop)) for start, end, said in self._runs if said and start < stop]
        if stop > self._total:
            start = found.pop()[0] if found and found[-1][1] == self._total else self._total
            found.append((start, stop))
        return tuple(found)

    @property
    def last_kept(self) -> int:
        """The last place where its state is worth keeping; 0 without one."""
        multiple = (self._total - 1) // self._chunk * self._chunk
        return max([0, *self._kept, *([multiple] if multiple > 0 and not self.said(self._total) else [])])

    def calls(self, start: int, stop: int) -> Iterator[Cut]:
        """The calls that run tokens `start`..`stop`; those behind all that is known are said."""
        for begin, end, said in self._runs:
            first, last = max(begin, start), min(end, stop)
            if first < last:
                yield from self._said(first, last) if said else self._read(first, last)
        if stop > (known := max(start, self._total)):
            yield from self._said(known, stop)

    def _said(self, start: int, stop: int) -> Iterator[Cut]:
        for end in range(start + self._few, stop, self._few):
            yield Cut(end)
        yield Cut(stop)

    def _read(self, start: int, stop: int) -> Iterator[Cut]:
        multiples = range(start // self._chunk * self._chunk + self._chunk, stop, self._chunk)
        whys = dict.fromkeys(multiples, "chunk") | ({multiples[-1]: "last chunk"} if len(multiples) > 1 else {})
        whys |= {at: why for at, why in self._kept.items() if start < at < stop}
        for at in sorted(whys):
            yield Cut(at, whys[at])
        yield Cut(stop)

    def _splits(self, place: int, start: int, stop: int) -> bool:
        """Whether tokens `start`..`stop`, which are read, may be cut at a place among them."""
        if place % self._chunk == 0 or place in self._kept:
            return True
        return self._grain is not None and self._floor(place, start, stop) == place

    def _worth_keeping(
        self, ids: Ids, places: Sequence[Place], messages: Messages, start: int, stop: int
    ) -> dict[int, str]:
        """The places among tokens `start`..`stop`, which are read, where they are cut for the state's sake."""
        begun = [(start + at, user) for at, user in messages.starts(ids[start:stop])]
        wanted = dict[int, str]()
        if self._grain is None:
            if not begun:
                wanted |= dict.fromkeys(LADDER, "end")
            wanted |= dict.fromkeys((at for at, _ in begun), "turn")
        else:
            if stop - start >= WORTH:
                wanted[begun[-1][0] if begun else stop - 1] = "end"
            wanted |= {at: "turn" for at, user in begun if user}
        wanted |= {place.stop: "picture" for place in places}
        found = dict[int, str]()
        for at, why in wanted.items():
            if start < at < stop:
                at = at if self._grain is None else self._floor(at, start, stop)
                if at > start:
                    found[at] = why
        return found

    def _floor(self, place: int, start: int, stop: int) -> int:
        """The last place up to `place` where a prompt may be cut; `start` if there is none before."""
        assert self._grain is not None
        base = max(start, place // self._chunk * self._chunk)
        end = min(stop, base // self._chunk * self._chunk + self._chunk)
        grains = (place - base) // self._grain
        if end - base - grains * self._grain <= self._few:  # the rest would become a call of few rows
            grains -= 1
        return base + max(0, grains) * self._grain


def _runs(spoken: Sequence[Span], total: int) -> Iterator[tuple[int, int, bool]]:
    """The runs of `total` tokens: start, stop, and whether they were said."""
    done = 0
    for i, (start, stop) in enumerate(spoken):
        if i + 1 < len(spoken) and spoken[i + 1][0] == stop:
            raise AssertionError("a reply that goes on is one span")
        end = stop if stop >= total else max(start, stop - 1)
        yield done, start, False
        yield start, min(end, total), True
        done = min(end, total)
    yield done, total, False
