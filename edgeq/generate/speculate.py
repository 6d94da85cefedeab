"""Drafts from the text itself, and what is counted of drafts.

The n-gram drafter looks for the last few tokens earlier in the context and proposes what followed them there ("prompt
lookup", Saxena 2023; the same in spirit as LLMA, Yang et al., arXiv:2304.04487). It costs next to nothing, needs no
head, and is right where a text repeats itself: quotations, edited code, JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import UsageError
from edgeq.printable import brief

__all__ = ["DRAFT_HINT", "MOST_DRAFTS", "Tally", "check_draft", "look_up"]

MOST_DRAFTS = 8
"""Drafts of a pass, where a number is asked for: a pass of up to 16 rows gives the bits of single tokens."""

_ALIASES = {"none": "off", "draft-mtp": "mtp", "ngram-simple": "ngram"}  # of llama.cpp's --spec-type

DRAFT_HINT = f"use auto, off, mtp, ngram or a number of drafts from 1 to {MOST_DRAFTS}"

SHORTEST = 3
"""Tokens that have to be repeated before what follows them is taken for a draft."""

LONGEST = 8
"""Tokens that are compared: of several earlier places, the one that agrees longest wins, of equals the latest."""


@dataclass(slots=True)
class Tally:
    """What a reply's drafts came to.

    passes: calls of the model after the prompt's. drafted: tokens drafted. accepted: those that the model said too.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass gave on average; 1 without drafts."""
        return 1 + self.accepted / self.passes if self.passes else 1.0


def check_draft(draft: str | int) -> str | int:
    """`draft` as one of "auto", "off", "mtp", "ngram" and the numbers 1 to MOST_DRAFTS; 0 is "off"."""
    if isinstance(draft, str):
        draft = int(draft) if draft.isascii() and draft.isdecimal() else _ALIASES.get(draft, draft)
    if draft in ("auto", "off", "mtp", "ngram") and isinstance(draft, str):
        return draft
    if type(draft) is not int or not 0 <= draft <= MOST_DRAFTS:
        raise UsageError(f"draft must be a way or a number of drafts, got {brief(draft)}", hint=DRAFT_HINT)
    return draft or "off"


def look_up(ids: NDArray[np.int32], most: int) -> list[int]:
    """Up to `most` tokens that followed the last ones of `ids` where they stood before; none if they are new."""
    end = len(ids)
    if end <= SHORTEST or most < 1:
        return []
    last = SHORTEST - 1  # where the earliest copy of the last ones may end
    found = np.flatnonzero(np.logical_and.reduce([ids[last - i : end - 1 - i] == ids[-1 - i] for i in range(SHORTEST)]))
    found += last
    for length in range(SHORTEST + 1, LONGEST + 1):
        longer = found[found >= length - 1]
        longer = longer[ids[longer - (length - 1)] == ids[-length]] if len(longer) else longer
        if not len(longer):
            break
        found = longer
    if not len(found):
        return []
    start = int(found[-1]) + 1
    drafts: list[int] = ids[start : start + most].tolist()
    return drafts
