"""How many tokens to draft: what a pass costs on this machine, and how often drafts are right.

A pass with n drafts gives 1 + a_1 + a_1 a_2 + ... tokens, where a_i is the chance that draft i is right if those before
it were (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192), and takes the
time that such passes took here. The choice is the n with the most tokens a second. Both sides are running averages over
all replies of a model, so that they follow the text and the machine.

An estimate can be wrong, so drafts are paid out of an allowance. It begins with `START` plain passes and grows by
`LOSS` of their time; what drafting gains is added, up to `BANK` passes, and what it loses is taken away. A pass is
chosen only if the allowance stands its loss should all its drafts be wrong. So what is lost in all stays below `START`
passes and `LOSS` of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil

__all__ = ["Pace"]

START = 0.6
"""Plain passes that may be lost to find out what drafts are worth."""

LOSS = 0.004
"""Time that may be lost on top, in looking whether they have become worth it, as a part of the time of plain passes."""

BANK = 6.0
"""Plain passes gained that are saved up."""

_FORGET = 0.96
"""Weight of an acceptance one draft later: about the last 25 count."""

_LEAST_WEIGHT = 0.06
"""Weight of the latest time of a kind of pass, once there are some."""

_FADE, _LEAST_RECENT = 0.98, 1.5
"""How fast a time grows old, by passes, and as how many new ones some have to count to be believed as they are."""

_FIRST = 4
"""Times of a kind of pass that are few: one of them may be long because the machine had something else to do."""

_REST = 16
"""Most passes in a row that are plain without looking at a clock or at the text: small models feel both."""

_PRIOR, _PRIOR_WEIGHT = 0.6, 2.0
"""Chance that a draft is right, before anything is known, and as how many drafts that counts."""

_STEP = {"mtp": 0.2, "ngram": 0.1}
"""What another draft costs, in plain passes, before it is known."""


class _Mean:
    """A running average, whose first values count alike and later ones less and less; none of the first by much more
    than the least of them."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0
        self.recent = 0.0  # how many were added lately

    def add(self, value: float) -> None:
        self.count += 1
        self.recent += 1
        if 1 < self.count <= _FIRST:
            self.value = min(self.value, 1.1 * value)
            value = min(value, 1.1 * self.value)
        self.value += (value - self.value) * max(1 / self.count, _LEAST_WEIGHT)


class Pace:
    """Running averages of one model on this machine, and the choice that follows from them.

    A source of drafts is "mtp" or "ngram"; a pass of `drafts` 0 is plain and has none ("").
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], _Mean] = {}
        self._right: dict[str, list[list[float]]] = {}  # by source and place: drafts that were right, and all
        self._begun: set[str] = set()
        self._credit = START

    @property
    def plain(self) -> float | None:
        """Seconds of a pass without drafts, once that is known: the first tokens of a process have none."""
        mean = self._seconds.get(("", 0))
        return mean.value if mean is not None and mean.count >= _FIRST else None

    def rest(self, sources: Iterable[str]) -> int:
        """How many plain passes come next, because drafts of none of `sources` can be afforded before; 0 for none."""
        if self.plain is None:
            return 1
        missing = min((self.cost(source, 1) - 1 for source in sources), default=BANK) - self._credit
        return min(_REST, max(0, ceil(missing / LOSS)))

    def rested(self, passes: int) -> None:
        """So many plain passes were not timed."""
        self._credit = min(self._credit + LOSS * passes, BANK)

    def choose(self, most: Mapping[str, int]) -> tuple[str, int]:
        """The source and number of drafts for the next pass, given how many each source may have: ("", 0) for none."""
        rated = [
            (self.gain(source, n), source, n)
            for source, high in most.items()
            for n in range(1, min(high, self._deepest(source) + 1) + 1)  # of more nobody knows what they cost
            if self.plain is not None and self.cost(source, n) - 1 <= self._credit
        ]
        gain, source, n = max(rated, default=(0.0, "", 0))
        if gain > 1:
            return source, n
        return source, min(n, 1)  # which may have become worth it: a look from time to time

    def _deepest(self, source: str) -> int:
        """Most drafts of a pass whose time is known."""
        return max((n for name, n in self._seconds if name == source), default=0)

    def gain(self, source: str, drafts: int) -> float:
        """Tokens a second of passes with so many drafts, as a multiple of plain ones."""
        chance = tokens = 1.0
        for place in range(drafts):
            chance *= self.acceptance(source, place)
            tokens += chance
        return tokens / self.cost(source, drafts)

    def acceptance(self, source: str, place: int) -> float:
        """The chance that the draft at `place` is right if those before it were."""
        chance = _PRIOR
        for right, tried in self._right.get(source, [])[: place + 1]:
            chance = (right + _PRIOR_WEIGHT * chance) / (tried + _PRIOR_WEIGHT)
        return chance

    def cost(self, source: str, drafts: int) -> float:
        """What a pass with so many drafts takes, making them included, in plain passes.

        A time that is old, or the only one, may have been an accident: better ones of the nearest kind of pass are then
        believed instead, so that it is tried again.
        """
        own, expected = self._seconds.get((source, drafts)), self._expected(source, drafts)
        if own is None:
            return expected if expected is not None else 1 + drafts * _STEP[source]
        measured = own.value / (self.plain or 1.0)
        return measured if own.recent >= _LEAST_RECENT or expected is None else min(measured, expected)

    def _expected(self, source: str, drafts: int) -> float | None:
        """The same from the nearest other kind of pass; None where there is none."""
        others = [n for name, n in self._seconds if name == source and n != drafts]
        if not others:
            return None
        nearest = min(others, key=lambda n: (abs(n - drafts), n))
        there = self._seconds[source, nearest].value / (self.plain or 1.0)
        each = max(0.0, there - 1) / nearest
        return there + (drafts - nearest) * each

    def record(self, source: str, drafts: int, seconds: float, accepted: int, *, chosen: bool = True) -> None:
        """A pass took so long, and so many of its drafts were right. Only what was chosen here is paid out of the
        allowance."""
        if drafts:
            self._judge(source, drafts, accepted)
        if self.plain is not None and chosen:
            spent = min(seconds / self.plain, 2 * self.cost(source, drafts)) if drafts else 1.0
            self._credit = min(self._credit + (1 + LOSS) * (1 + accepted) - spent, BANK)
        if not drafts or source in self._begun:  # the first finds its weights cold
            self._time(source, drafts, seconds)
        self._begun.add(source)

    def _judge(self, source: str, drafts: int, accepted: int) -> None:
        places = self._right.setdefault(source, [])
        for place in range(min(drafts, accepted + 1)):
            if place == len(places):
                places.append([0.0, 0.0])
            right, tried = places[place]
            places[place] = [_FORGET * right + (place < accepted), _FORGET * tried + 1]

    def _time(self, source: str, drafts: int, seconds: float) -> None:
        """Take a time into its average; where the machine has become faster or slower, the others follow slowly."""
        for other in self._seconds.values():
            other.recent *= _FADE
        mean = self._seconds.setdefault((source, drafts), _Mean())
        if mean.count >= _FIRST:
            seconds = min(1.5 * mean.value, max(seconds, mean.value / 1.5))  # the machine had something else to do
            drift = (seconds / mean.value) ** (_LEAST_WEIGHT / 2)
            for key, other in self._seconds.items():
                if key != (source, drafts):
                    other.value *= drift
        mean.add(seconds)
