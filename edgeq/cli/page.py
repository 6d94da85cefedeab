"""Where a reply appears: as it is in a file or pipe; wrapped at words, and without control characters, on a terminal.

A page is written to piece by piece and shows what it can at once. What is piped or copied with /copy is what the model
wrote: wrapping is for the eye alone.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from edgeq.cli.console import Visible

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

__all__ = ["Hidden", "Markdown", "Page", "Plain", "Wrapped", "cells", "page_on"]


class Page(Protocol):
    """Takes a text piece by piece."""

    def write(self, text: str) -> None:
        """Show the next piece, or as much of it as is certain to stay."""

    def end(self, last: str = "\n") -> None:
        """Show what was held back, and then `last`: the text ends here."""


def page_on(
    stream: TextIO, *, wrap: bool = True, markdown: bool = False, style: Callable[[str], str] | None = None
) -> Page:
    """A page on a stream. `style` colours text, `wrap` and `markdown` change it: on a terminal alone."""
    if not stream.isatty():
        return Plain(stream)
    if markdown:
        return Markdown(stream)
    return Wrapped(stream, (lambda: _width_of(stream)) if wrap else lambda: 0, style or (lambda text: text))


def _width_of(stream: TextIO) -> int:
    """Columns of the terminal behind a stream; 0 where that is not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


class Hidden:
    """A page that nobody sees."""

    def write(self, text: str) -> None:
        pass

    def end(self, last: str = "\n") -> None:
        pass


class Plain:
    """Every character as it is, as soon as it is there."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def end(self, last: str = "\n") -> None:
        self.write(last)


class Wrapped:
    """A terminal: lines break between words, and control characters are shown instead of obeyed.

    A word is held back until it is whole, since one that does not fit begins the next line. Between wide characters, as
    Chinese and Japanese have them, a line may break anywhere, but not before a closing mark. Code between ``` fences is
    not wrapped: what is copied from there has to work. Nothing is sent but text and newlines, so any terminal will do.

    width: the columns now, 0 for no wrapping; asked for at every word, since windows are resized.
    """

    def __init__(self, stream: TextIO, width: Callable[[], int], style: Callable[[str], str]) -> None:
        self._stream, self._width, self._style = stream, width, style
        self._visible = Visible()
        self._column = 0
        self._gap = self._word = ""  # held back: white space, and the word behind it
        self._glued = False  # the word goes on with what is already shown of it
        self._code = False
        self._out: list[str] = []

    def write(self, text: str) -> None:
        for char in self._visible.push(text):
            self._take(char)
        self._send()

    def end(self, last: str = "\n") -> None:
        for char in self._visible.flush() + last:
            self._take(char)
        self._place()
        self._send()

    def _take(self, char: str) -> None:
        if char == "\n":
            self._place()
            if self._code or not (width := self._width()) or self._column + cells(self._gap, self._column) <= width:
                self._out.append(self._gap)
            self._new_line()
        elif char in " \t":
            self._place()
            self._gap += char
        else:
            if self._word and _may_break(self._word, char):
                self._place()
            self._word += char
            if len(self._word) > 80 and len(self._word) > self._width():  # one that fits no line is shown as it comes
                self._place(glue=True)

    def _place(self, *, glue: bool = False) -> None:
        """Show the word held back, at the beginning of a line if it does not fit the rest of this one."""
        if not self._word:
            self._glued = self._glued and glue
            return
        if self._column == 0 and not self._glued and _is_fence(self._word):
            self._code = not self._code
        width = self._width()
        gap, word = cells(self._gap, self._column), cells(self._word)
        if width and self._column and not self._glued and not self._code and self._column + gap + word > width:
            self._new_line()
            gap = 0
        self._out += self._gap, self._word
        self._column += gap + word
        if width and self._column > width:  # the terminal itself began a line
            self._column = (self._column - 1) % width + 1
        self._gap, self._word, self._glued = "", "", glue

    def _new_line(self) -> None:
        self._out.append("\n")
        self._column, self._gap, self._glued = 0, "", False

    def _send(self) -> None:
        if text := "".join(self._out):
            self._stream.write("\n".join(line and self._style(line) for line in text.split("\n")))
            self._out.clear()
        self._stream.flush()


class Markdown:
    """A terminal on which Markdown is rendered, a block at a time: a paragraph, a list, a piece of code."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._visible = Visible()
        self._lines = [""]
        self._fence = ""

    def write(self, text: str) -> None:
        first, *rest = self._visible.push(text).split("\n")
        self._lines[-1] += first
        for line in rest:
            self._end_line()
            self._lines.append(line)

    def end(self, last: str = "\n") -> None:
        self._lines[-1] += self._visible.flush()
        self._show()
        self._lines, self._fence = [""], ""
        self._stream.write(last.removeprefix("\n"))  # a block that is rendered ends its line
        self._stream.flush()

    def _end_line(self) -> None:
        line = self._lines[-1].strip()
        if self._fence:
            if line.startswith(self._fence) and not line.strip(self._fence[0]):
                self._fence = ""
        elif line.startswith(("```", "~~~")):
            self._fence = line[: len(line) - len(line.lstrip(line[0]))]
        elif not line:
            self._show()

    def _show(self) -> None:
        text, self._lines = "\n".join(self._lines), []
        if not text.strip():
            return
        from rich.console import Console
        from rich.markdown import Markdown as Rendered

        rendered = Rendered("", hyperlinks=False)
        rendered.parsed = _markdown_parser().parse(text)
        Console(file=self._stream, highlight=False).print(rendered)


def _markdown_parser() -> MarkdownIt:
    """One that knows no HTML: rich would leave out what looks like a tag, as in List<int>."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def _is_fence(word: str) -> bool:
    """Whether a line that begins with `word` begins or ends a piece of code."""
    return word.startswith(("```", "~~~")) and "`" not in word.lstrip("`")


def cells(text: str, column: int = 0) -> int:
    """Columns that `text` takes from `column` on: two for wide characters, none for marks that combine.

    Emoji that are joined to one are counted one by one, as older terminals show them: a line then ends early, not late.
    """
    start = column
    for char in text:
        if char == "\t":
            column += 8 - column % 8
        elif char == "\ufe0f":  # the sign before it becomes an emoji, which is wide
            column += 1
        elif unicodedata.category(char) not in ("Mn", "Me", "Cf"):
            column += 1 + _is_wide(char)
    return column - start


def _is_wide(char: str) -> bool:
    return char > "\u10ff" and unicodedata.east_asian_width(char) in "WF"


def _may_break(word: str, char: str) -> bool:
    """Whether a line may break between a word that is not yet over and the character behind it."""
    last = word[-1]
    if last == "\u200d" or unicodedata.category(char) in ("Mn", "Me", "Cf", "Sk"):  # parts of one sign
        return False
    if not _is_wide(last) and not _is_wide(char):
        return False
    return unicodedata.category(char) not in ("Pe", "Pf", "Po") and unicodedata.category(last) not in ("Ps", "Pi")
