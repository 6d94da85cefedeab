"""Notices that the output repeats itself: exactly the same tokens, again and again.

Small models fall into such loops while thinking, whatever the sampler does. Only exact repetition is looked for, and a
lot of it, since what people ask for repeats too: rulers, indentation, tables, arrays of zeros, refrains.

The thresholds were raised until 11,600 files of source code, markup, data and prose (36 million words and signs) gave
no alarm; a further random 5,800 gave none. With 128 and 256 tokens, 6 of 7,364 did: matrices, lists of equal calls.
"""

from __future__ import annotations

import numpy as np

__all__ = ["LoopGuard"]

MAX_PERIOD = 128
"""Longest cycle looked for, in tokens: a paragraph."""

MIN_COPIES = 3
"""Said three times over, word for word. Twice happens: a quotation, a refrain, a corrected listing."""

MIN_TOKENS = 256
"""Shortest stretch of repetition. Short rows of a table or a listing may well be equal ten times over."""

MIN_TOKENS_MONOTONOUS = 1024
"""The same, where the cycle has fewer than `VARIED` distinct tokens: blank lines, a ruler, a 16 x 16 grid of zeros, the
empty half of a 256-entry lookup table (128 times `255, `: 640 tokens) are data more often than circles."""

VARIED = 12
"""Distinct tokens that make a cycle language rather than a pattern. A sentence has as many; equal rows of a matrix have
fewer: brackets, comma, blanks and a few digits."""


class LoopGuard:
    """Watches a stream of token ids for a cycle of 1 to `MAX_PERIOD` tokens, 3 copies and 256 or 1024 tokens long.

    For every period p it counts how many of the latest tokens in a row are equal to the one p before. So each token
    costs a few operations on vectors of 128 (some 6 microseconds), and a loop is noticed at once.
    """

    def __init__(self) -> None:
        periods = np.arange(1, MAX_PERIOD + 1)
        self._recent = np.full(MAX_PERIOD, -1, dtype=np.int64)  # [p - 1]: the token p before the next
        self._run = np.zeros(MAX_PERIOD, dtype=np.int64)  # [p - 1]: latest tokens equal to the one p before
        self._needed = np.maximum(MIN_COPIES * periods, MIN_TOKENS) - periods  # the first copy repeats nothing

    def observe(self, token: int) -> bool:
        """Take the next token; True if it is at the end of a cycle that was repeated long enough."""
        self._run += 1
        self._run *= self._recent == token
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token
        return bool((self._run >= self._needed).any()) and self._long_enough()

    def _long_enough(self) -> bool:
        """Whether the shortest cycle is long enough for its variety (its multiples are the same repetition)."""
        period = int(np.argmax(self._run >= self._needed)) + 1
        varied = len(np.unique(self._recent[:period])) >= VARIED
        return varied or int(self._run[period - 1]) + period >= MIN_TOKENS_MONOTONOUS
