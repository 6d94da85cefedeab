"""Markdown documents: their blocks of code and their links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Block(NamedTuple):
    """A fenced block. `reason` says why it is not run; empty if it is."""

    page: Path
    line: int
    language: str
    code: str
    reason: str


def pages() -> list[Path]:
    """README and every document."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order; a comment `<!-- not run: REASON -->` right above belongs to one."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start, language, reason = -1, "", ""
    for i, line in enumerate(lines):
        if start < 0 and (opening := re.fullmatch(r"```(\w*)", line)):
            start, language = i, opening[1]
            marked = re.fullmatch(r"<!-- not run: (.+) -->", lines[i - 1]) if i else None
            reason = marked[1] if marked else ""
        elif start >= 0 and line == "```":
            yield Block(page, start + 2, language, "\n".join(lines[start + 1 : i]), reason)
            start = -1
    assert start < 0, f"{page}: a block that does not end"


def commands(code: str) -> Iterator[list[str]]:
    """The words of every edgeq command of a shell block, wherever it stands in a line."""
    import shlex

    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[|&;]+", word):
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]  # variables in front
                if words and words[0] == "edgeq":
                    yield _without_redirections(words)
                words = []
            else:
                words.append(word)


def _without_redirections(words: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or re.fullmatch(r"[<>]+", word):
            skip = not skip
        else:
            kept.append(word)
    return kept


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Relative links as (file, anchor), outside of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors(page: Path) -> set[str]:
    """What headings can be linked as."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
