"""Opening what a user or a model folder names: files, and nothing but files.

A name can lead to a pipe, on which opening waits for ever, to a device without an end, to a socket or a folder; it can
be too long for the system, or hold a byte that no name can. Everything that edgeq reads is opened here.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from edgeq.errors import UsageError

__all__ = [
    "TEXT_LIMIT",
    "TOKENIZER_LIMIT",
    "cache_home",
    "check_output",
    "exists",
    "expand_user",
    "is_file",
    "is_folder",
    "is_link",
    "open_file",
    "read_bytes",
    "read_text",
]

TEXT_LIMIT = 1 << 26  # bytes of a file that is read as a whole, unless its reader says otherwise
TOKENIZER_LIMIT = 1 << 27  # of a tokenizer.json; the family's has 13 million
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_file(path: Path, *, streams: bool = False) -> BufferedReader:
    """Open a regular file for reading; OSError for everything else, at once and without waiting.

    With `streams`, pipes and character devices too, as a shell hands them over (`<(command)`); a pipe that nobody
    writes to is empty.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a null byte, or text that the file system cannot spell
        raise OSError(errno.EINVAL, f"no file can have this name ({error})") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG and not (streams and kind in (stat.S_IFIFO, stat.S_IFCHR)):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'not a file')}, expected a regular file")
    if streams and os.name == "posix":
        os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, limit: int = TEXT_LIMIT, *, streams: bool = False) -> str:
    """The text of a UTF-8 file; OSError if it cannot be read or has more than `limit` bytes, UnicodeDecodeError."""
    return read_bytes(path, limit, streams=streams).decode("utf-8")


def read_bytes(path: Path, limit: int, *, streams: bool = False) -> bytes:
    """All of a file; OSError if it cannot be read or has more than `limit` bytes."""
    with open_file(path, streams=streams) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes")
    return data


def exists(path: Path) -> bool:
    """Whether there is anything at `path`; also for names that the system refuses."""
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    """Whether `path` leads to a regular file."""
    return stat.S_ISREG(_mode(path) or 0)


def is_folder(path: Path) -> bool:
    """Whether `path` leads to a folder."""
    return stat.S_ISDIR(_mode(path) or 0)


def is_link(path: Path) -> bool:
    """Whether `path` is a symbolic link, to something or to nothing."""
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def expand_user(path: Path) -> Path:
    """`path` with a leading ~ or ~user replaced; as it is if there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def cache_home() -> Path:
    """The user's folder for what can be made again: XDG_CACHE_HOME, or ~/.cache."""
    return expand_user(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))


def check_output(path: Path) -> None:
    """UsageError unless `path` ends in a name that can be given to a new file or folder, and leads somewhere."""
    if path.name in ("", "..") or "\0" in str(path):
        raise UsageError(f"{str(path)!r} is no name for a new file or folder", hint="give another name")
    try:
        path.absolute()
    except FileNotFoundError:
        raise UsageError("the current folder is gone", hint="go to another, or give a path from /") from None


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return None
