"""Where a prompt comes from: an option, a file, what was piped in."""

from __future__ import annotations

import codecs
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

from edgeq.cli.console import say, warn
from edgeq.errors import UsageError
from edgeq.inputs import read_bytes
from edgeq.text.pieces import MAX_TEXT, check_length

__all__ = ["file_text", "joined_prompt", "piped_text", "without_last_newline"]

PATIENCE = 2  # seconds until a pipe that says nothing is announced
_LIMIT = 4 * MAX_TEXT  # bytes: no text of MAX_TEXT characters has more


def piped_text(*, lenient: bool = False) -> str | None:
    """What was piped into stdin; None if it is a terminal, closed or cannot be read from.

    With `lenient`, bytes that are no text are read as U+FFFD, with a warning, instead of refused.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    source: Any = getattr(sys.stdin, "buffer", None)
    if source is None:
        text = sys.stdin.read(MAX_TEXT + 1)
    else:
        try:
            with _announced():
                first = source.read(1)
            data = first + source.read(_LIMIT)
        except OSError as error:
            if error.errno == errno.EBADF:  # nohup opens it for writing alone
                return None
            raise UsageError(f"stdin cannot be read: {error.strerror}") from None
        text = _decoded(data, "stdin", sys.stdin.encoding, lenient=lenient)
    check_length(text)
    return text


def joined_prompt(
    prompt: str | None, file: Path | None = None, *, stdin: bool = True, needed: bool = True
) -> str:  # fmt: skip
    """--prompt, then --file, then what was piped in (`cat log | edgeq chat -p "why?"`); `-` stands for stdin alone.

    A file and a pipe are taken as they are but for the newline that ends their last line. Without `stdin`, it is left
    to what else reads it, such as `--image -`. UsageError if a prompt is `needed` and none given.
    """
    texts = [file_text(file, lenient=True) if file else "", (piped_text(lenient=True) or "") if stdin else ""]
    parts = ["" if prompt == "-" else prompt, *map(without_last_newline, texts)]
    if needed and not any(parts):
        raise UsageError("no prompt given", hint='give one with -p "...", with -f FILE, or pipe it into stdin')
    return "\n\n".join(part for part in parts if part)


def file_text(file: Path, *, lenient: bool = False, streams: bool = True) -> str:
    """The text of a file or, with `streams`, a pipe that the shell hands over as one; `lenient` as for `piped_text`."""
    try:
        data = read_bytes(file, _LIMIT, streams=streams)
    except FileNotFoundError:
        raise UsageError(f"text file not found: {file}") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    return _decoded(data, str(file), "utf-8", lenient=lenient)


def without_last_newline(text: str) -> str:
    """`text` without the newline that ends its last line; further ones are empty lines, and stay."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def _decoded(data: bytes, name: str, encoding: str, *, lenient: bool) -> str:
    """The text in `data`: UTF-8, UTF-16 if it begins with that mark, or else in the terminal's `encoding`."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, text = "utf-16", data.decode("utf-16", "replace")
    else:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
        encoding = "utf-8" if "\0" in text or "\ufffd" not in text else encoding
        if not _is_utf8(encoding):
            text = data.decode(encoding, "replace")
    lost = text.count("\ufffd") - (data.count("\ufffd".encode()) if _is_utf8(encoding) else 0)
    if lost and not lenient:
        raise UsageError(f"{name} is not UTF-8 text", hint="save it as UTF-8")
    if "\0" in text or lost > len(text) // 8:
        raise UsageError(f"{name} is not text but binary data", hint="show pictures with --image or --video")
    if lost:
        warn(f"{name} is not all UTF-8: {lost} bad byte{'s' if lost > 1 else ''} read as U+FFFD")
    return text


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "utf-8"


@contextmanager
def _announced() -> Iterator[None]:
    """Say that stdin is waited for, once it has taken a while: nobody may know that it is open."""
    timer = Timer(PATIENCE, say, ("waiting for text on stdin; --no-stdin does not wait (Ctrl-C ends)",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
