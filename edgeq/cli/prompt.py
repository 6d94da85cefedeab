"""Where a prompt comes from."""

from __future__ import annotations

import sys

from edgeq.errors import UsageError

__all__ = ["joined_prompt", "piped_text"]


def piped_text() -> str | None:
    """What was piped into stdin; None if it is a terminal or closed."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text: {error}") from None


def joined_prompt(prompt: str | None) -> str:
    """--prompt, then what was piped in (`cat log | edgeq chat -p "why?"`); `-` stands for stdin alone."""
    piped = (piped_text() or "").strip("\n")
    parts = [part for part in ("" if prompt == "-" else prompt, piped) if part]
    if not parts:
        raise UsageError("there is no prompt", hint='give one with -p "...", or pipe it into stdin')
    return "\n\n".join(parts)
