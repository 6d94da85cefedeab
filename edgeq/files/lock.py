"""A lock that says whether the one who took it still lives: the system lets go of it when a process ends, however."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["Lock"]

_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Lock:
    """A lock on the file `path`, which is never followed if it is a link. It holds between threads too.

    An exclusive one makes the file if need be. With `shared` one only looks: several can at a time, and
    FileNotFoundError means that there is no file. `state` is "mine" while it is held, "taken" if another one is in the
    way, and "unknown" on file systems without locks. OSError if there can be no such file.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        flags = os.O_RDWR | _SAFELY | (0 if shared else os.O_CREAT)
        self._descriptor = os.open(path, flags, 0o600)
        try:
            self.state = self._take(path, shared)
        except BaseException:
            self.close()
            raise

    def _take(self, path: Path, shared: bool) -> str:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        try:
            import fcntl
        except ImportError:  # Windows has no such module
            return "unknown"
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            return "taken" if error.errno in _TAKEN else "unknown"
        # Whoever held it before may have removed the file, and the folder around it.
        return "mine" if _same(self._descriptor, path) else "taken"

    def close(self) -> None:
        """Let go. Closing the file does it; the file stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
