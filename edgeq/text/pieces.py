"""A long text in pieces of bounded size, each of which encodes as it would within the whole.

The splitting regex of a `tokenizers` pre-tokenizer keeps a stack over what it matches and gives up (a panic) after ten
million steps, and every text passes through copies twenty times its size. So neither normalizing nor splitting ever
sees more than a piece.

Where a piece may end follows from the patterns that `edgeq.text.components` lets through: they look ahead over one run
of equal characters, over white space and the character behind it, or over three characters of an English contraction,
and never behind. A word is settled if the piece goes on for a few characters after it, not all of them white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from edgeq.errors import MemoryBudgetError

__all__ = ["MAX_TEXT", "check_length", "normalized", "pieces"]

MAX_TEXT = 1 << 24  # characters that are encoded at once: sixteen times what fills the family's context
PIECE = 1 << 15  # characters that the library sees at a time, unless a single word is longer
LONGEST_WORD = 1 << 18  # characters; merging a longer one takes seconds
_AHEAD = 8  # characters, more than a contraction has

# Characters before which a text can be cut without changing its normalized form: each begins a new combining sequence,
# and none ever joins what stands before it. ASCII, kana, CJK ideographs, Hangul syllables.
_BEGINS = re.compile("[\x00-\x7f\u3041-\u3096\u30a1-\u30fa\u3400-\u9fff\uac00-\ud7a3]")

Words = Sequence[tuple[str, tuple[int, int]]]
"""What a pre-tokenizer gives: words in the byte alphabet, and where they begin and end in the text."""


def check_length(text: str) -> None:
    """MemoryBudgetError for a text that is too long to encode at once."""
    if len(text) > MAX_TEXT:
        raise MemoryBudgetError(
            f"the text has more than {MAX_TEXT:,} characters, the most that can be encoded at once",
            hint="shorten the text: it is longer than any context window",
        )


def normalized(text: str, normalizer: Any) -> str:
    """`text` as the normalizer has it; None leaves it as it is, and all of Unicode's forms leave ASCII as it is."""
    if normalizer is None or text.isascii():
        return text
    return "".join(normalizer.normalize_str(part) for part in _stretches(text))


def pieces(text: str, splitter: Any) -> Iterator[tuple[str, list[str]]]:
    """The pieces of a normalized text, each with its words as `splitter` (a pre-tokenizer) cuts the whole text."""
    start, size = 0, PIECE
    while start < len(text):
        window = text[start : start + size]
        words = splitter.pre_tokenize_str(window)
        last = start + size >= len(text)
        kept = len(words) if last else _settled(window, words)
        if last or kept:
            end = len(window) if last else words[kept][1][0]
            yield window[:end], [word for word, _ in words[:kept]]
            start, size = start + end, PIECE
        else:
            size = _doubled(size)


def _settled(window: str, words: Words) -> int:
    """How many words, from the first, no text after the window can change."""
    latest = min(len(window.rstrip()) - 1, len(window) - _AHEAD)
    return next((k for k in range(len(words) - 1, 0, -1) if words[k][1][0] <= latest), 0)


def _doubled(size: int) -> int:
    if size >= LONGEST_WORD:
        raise _too_long()
    return 2 * size


def _stretches(text: str) -> Iterator[str]:
    """`text` cut where a new combining sequence begins."""
    start = 0
    while start < len(text):
        begin = _BEGINS.search(text, start + PIECE)
        end = begin.start() if begin else len(text)
        if end - start > LONGEST_WORD:
            raise _too_long()
        yield text[start:end]
        start = end


def _too_long() -> MemoryBudgetError:
    return MemoryBudgetError(
        f"the text has a word, or a run of spaces, of more than {LONGEST_WORD:,} characters",
        hint="break it up with spaces or line ends",
    )
