"""Text from elsewhere, made safe to show: names of tensors, paths, what a library said.

A name can hold a newline, an escape sequence that clears the screen, marks that turn the direction of writing, or
bytes that are no text at all. Shown as it is it could hide an error or pretend to be one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from reprlib import Repr

__all__ = ["brief", "first_of", "one_line", "printable"]

# Control characters, invisible formatting, lone surrogates, separators of lines and paragraphs.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_LONGEST = 2000  # characters of a message; a name of a megabyte is not worth the screens it takes

_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlevel = 3


def printable(text: str, *, keep: str = "", longest: int | None = _LONGEST) -> str:
    """`text` on one line, with everything that a terminal would act on written as an escape (\\n, \\x1b, \\u202e).

    Characters in `keep` stay; of more than `longest` characters, the middle is left out.
    """
    if longest is not None and len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _UNSAFE else _escape(c) for c in text)


def one_line(error: BaseException, longest: int = 300) -> str:
    """What an exception from elsewhere says, in one line; its type if it says nothing."""
    text = " ".join((str(error) or type(error).__name__).split())
    return printable(text, longest=longest)


def brief(value: object) -> str:
    """A value from a file as Python writes it, cut to some sixty characters; safe for values of any size and depth."""
    return _repr.repr(value)


def first_of(lines: Sequence[str], most: int = 12) -> list[str]:
    """The first `most` lines of a list, and how many more there are: for the details of an error."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def _escape(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # a byte of a path that is not UTF-8, as Python carries it
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
