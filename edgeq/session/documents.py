"""Documents that a conversation is about: what of them the model is given.

They stand at the beginning of the system message, before the system prompt, as

    # Documents

    <document name="report.txt">
    ...
    </document>

one after another, in the order in which they are given. So whatever is asked, and whatever the system prompt says,
comes behind them, and what was read of them once is the beginning of every later conversation about them. Nothing in
them is changed; what spells special tokens stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgeq.errors import UsageError
from edgeq.inputs import expand_user, open_file
from edgeq.printable import brief, printable
from edgeq.text.template import Content

__all__ = ["Document", "open_document", "with_documents"]


class Document(NamedTuple):
    """A text and what it is called."""

    name: str
    text: str


def open_document(source: Any) -> Document:
    """A document: a path of a text file in UTF-8, or (name, text). UsageError for what is none."""
    if isinstance(source, tuple) and len(source) == 2 and all(isinstance(each, str) for each in source):
        document = Document(*source)
    elif isinstance(source, str | Path):
        document = _read(expand_user(Path(source)))
    else:
        raise UsageError(f"a document must be a path or (name, text), got {brief(source)}")
    if not document.text.strip():
        raise UsageError(f"the document {printable(document.name)} is empty", hint="give a file with text")
    return document


def with_documents(documents: Sequence[Any], system: Content | None) -> Content | None:
    """A system message's content: documents (see `open_document`), and behind them the system prompt."""
    if isinstance(documents, str | Path):
        raise UsageError(f"documents must be a list of them, got {brief(documents)}", hint="put it into a list")
    opened = [open_document(each) for each in documents]
    if not opened:
        return system
    texts = [f'<document name="{_quoted(name)}">\n{text.rstrip()}\n</document>\n\n' for name, text in opened]
    behind = [{"type": "text", "text": system}] if isinstance(system, str) and system else list(system or ())
    return [*({"type": "text", "text": text} for text in ("# Documents\n\n" + texts[0], *texts[1:])), *behind]


def _read(path: Path) -> Document:
    try:
        with open_file(path) as file:
            content = file.read()
    except OSError as error:
        raise UsageError(
            f"the document {printable(str(path))} cannot be read: {error.strerror}", hint="give a text file"
        ) from None
    if b"\0" in content[: 1 << 16]:
        raise UsageError(f"the document {printable(path.name)} is not text", hint="convert it to plain text first")
    return Document(path.name, content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n"))


def _quoted(name: str) -> str:
    return printable(name).replace('"', "'")
