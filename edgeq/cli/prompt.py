"""Where a prompt comes from."""

from __future__ import annotations

import sys
from pathlib import Path

from edgeq.errors import UsageError
from edgeq.inputs import read_text
from edgeq.text.pieces import MAX_TEXT, check_length

__all__ = ["file_text", "joined_prompt", "piped_text"]


def piped_text() -> str | None:
    """What was piped into stdin; None if it is a terminal or closed."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read(MAX_TEXT + 1)
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text: {error}") from None
    check_length(text)
    return text


def joined_prompt(prompt: str | None, file: Path | None = None, *, stdin: bool = True) -> str:
    """--prompt, then --file, then what was piped in (`cat log | edgeq chat -p "why?"`); `-` stands for stdin alone.

    Without `stdin`, it is left to what else reads it, such as `--image -`.
    """
    texts = [file_text(file) if file else "", (piped_text() or "") if stdin else ""]
    parts = ["" if prompt == "-" else prompt, *(text.strip("\n") for text in texts)]
    if not any(parts):
        raise UsageError("no prompt given", hint='give one with -p "...", with -f FILE, or pipe it into stdin')
    return "\n\n".join(part for part in parts if part)


def file_text(file: Path) -> str:
    """The text of a file, or of a pipe that the shell hands over as one."""
    try:
        return read_text(file, 4 * MAX_TEXT, streams=True)
    except FileNotFoundError:
        raise UsageError(f"text file not found: {file}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
