"""`--document`: texts that are read before the conversation begins, once."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from edgeq.cli.console import say
from edgeq.printable import printable

if TYPE_CHECKING:
    from edgeq.session.chat import Chat

__all__ = ["read_ahead"]


def read_ahead(chat: Chat, names: Sequence[str], *, quiet: bool) -> None:
    """Read a conversation's documents, or go on from where they were read before, and say so."""
    what, started = printable(", ".join(names), longest=200), monotonic()
    try:
        tokens, cached = chat.prepare(named=what)
    except KeyboardInterrupt:
        if not quiet:
            say(f"{what}: what was read is kept; the same command goes on from there")
        raise
    if not quiet:
        new = f"{tokens - cached:,} read in {monotonic() - started:.1f} s" if tokens > cached else "none to be read"
        say(f"{what}: {tokens:,} tokens, {cached:,} were read before, {new}", faint=True)
