"""Two renames that Python does not have: one that cannot replace, and one that exchanges.

Linux has both in renameat2, macOS in renameatx_np. Where the file system has neither, `rename_new` does with what every
system has, and `exchange` says that it cannot.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["exchange", "rename_new"]

_HERE = -2 if sys.platform == "darwin" else -100  # AT_FDCWD
# Linux: RENAME_NOREPLACE, RENAME_EXCHANGE; macOS: RENAME_EXCL, RENAME_SWAP
_NEW, _EXCHANGE = (4, 2) if sys.platform == "darwin" else (1, 2)
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def rename_new(old: Path, new: Path) -> None:
    """Rename `old` to `new`; FileExistsError if there is anything at `new`, which is left alone."""
    if not _call(old, new, _NEW):
        _rename_new_portably(old, new)


def exchange(one: Path, other: Path) -> bool:
    """Give both the other's name in one step. False where the file system cannot."""
    return _call(one, other, _EXCHANGE)


def _call(one: Path, other: Path, flags: int) -> bool:
    """The system's rename with flags; False where it does not exist, OSError for anything else."""
    function = _rename_with_flags()
    if function is None:
        return False
    while function(_HERE, os.fsencode(one), _HERE, os.fsencode(other), flags):
        number = ctypes.get_errno()
        if number in _NOT_HERE:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), str(one), None, str(other))
    return True


@cache
def _rename_with_flags() -> Callable[[int, bytes, int, bytes, int], int] | None:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        function = library.renameatx_np if sys.platform == "darwin" else library.renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int
    called: Callable[[int, bytes, int, bytes, int], int] = function
    return called


def _rename_new_portably(old: Path, new: Path) -> None:
    """The same with what every system has: a folder can replace but an empty one, a second link nothing at all."""
    if os.path.lexists(new):
        raise _exists(new)
    if old.is_dir():
        try:
            old.rename(new)
        except OSError as error:
            raise (_exists(new) if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR) else error) from None
        return
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EMLINK, *_NOT_HERE):
            raise
        _claim(old, new)
    else:
        with suppress(OSError):  # it has its new name; the old one goes with the workspace
            old.unlink()


def _claim(old: Path, new: Path) -> None:
    """Where there are no links either (FAT): make `new`, which only one can do, and replace it."""
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        old.replace(new)
    except BaseException:
        new.unlink()
        raise


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
