"""Where a prompt comes from."""

from __future__ import annotations

import sys
from pathlib import Path

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


def joined_prompt(prompt: str | None, file: Path | None = None) -> str:
    """--prompt, then --file, then what was piped in (`cat log | edgeq chat -p "why?"`); `-` stands for stdin alone."""
    texts = [_text_of(file) if file else "", piped_text() or ""]
    parts = ["" if prompt == "-" else prompt, *(text.strip("\n") for text in texts)]
    if not any(parts):
        raise UsageError("no prompt given", hint='give one with -p "...", with -f FILE, or pipe it into stdin')
    return "\n\n".join(part for part in parts if part)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"prompt file not found: {file}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: {error}") from None
