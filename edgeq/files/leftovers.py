"""Workspaces: where results are made, beside the name they are for; and those whose makers were killed.

A workspace is a folder `.NAME.partial-XXXXXXXX`. In it are `lock`, held as long as its maker lives, `result`, which is
being made, and for a moment `old`, what NAME was before, where a file system cannot exchange two names. One whose lock
is free belongs to nobody: `old` goes back if NAME is gone, the rest is removed (as `.NAME.dead-XXXXXXXX`, so that
nobody takes the remover for a maker).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from edgeq.files.lock import Lock
from edgeq.files.rename import rename_new

__all__ = ["Leftover", "Workspace", "find_leftovers"]

_PARTS = {"lock", "result", "old"}
_WORKSPACE = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|dead)-(?P<mark>[a-z0-9_]{8})", re.DOTALL)

State = Literal["dead", "alive", "unknown"]


class Workspace:
    """A folder of one's own beside `out`, locked as long as it is open."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder, self._lock = _make(out)
        self.result, self.old = self.folder / "result", self.folder / "old"

    def close(self) -> None:
        """Remove it and let go. Whatever cannot be removed is the next run's to find."""
        try:
            _remove(self.folder, self.out)
        finally:
            self._lock.close()


class Leftover(NamedTuple):
    """A workspace that somebody made: `dead` if its maker lives no more, `unknown` where locks do not work."""

    path: Path
    state: State
    nbytes: int

    @property
    def target(self) -> Path:
        """The name that it was for."""
        return self.path.with_name(_parts(self.path)["name"])

    def remove(self) -> bool:
        """Remove it, if it is dead still; put back what its maker had set aside. False if something remains."""
        try:
            lock = Lock(self.path / "lock")
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            if lock.state == "mine":
                _remove(self._set_apart(), self.target)
                return not os.path.lexists(self.path)
            return False
        finally:
            lock.close()

    def _set_apart(self) -> Path:
        parts = _parts(self.path)
        apart = self.path.with_name(f".{parts['name']}.dead-{parts['mark']}")
        with suppress(OSError):
            rename_new(self.path, apart)
            return apart
        return self.path


def find_leftovers(folder: Path, name: str | None = None) -> list[Leftover]:
    """The workspaces in a folder, those for `name` if one is given; a folder that cannot be read has none."""
    with suppress(OSError):
        return [_look_at(path) for path in sorted(_workspaces(folder, name))]
    return []


def _parts(path: Path) -> re.Match[str]:
    match = _WORKSPACE.fullmatch(path.name)
    assert match is not None, path
    return match


def _workspaces(folder: Path, name: str | None) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _WORKSPACE.fullmatch(entry.name)
            if match and name in (None, match["name"]) and entry.is_dir(follow_symlinks=False) and _is_ours(entry):
                yield Path(entry.path)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Whether a folder of such a name belongs to this user and holds nothing that a workspace does not."""
    try:
        return entry.stat(follow_symlinks=False).st_uid == os.geteuid() and _names(Path(entry.path)) <= _PARTS
    except OSError:
        return False


def _look_at(path: Path) -> Leftover:
    try:
        lock = Lock(path / "lock", shared=True)
    except FileNotFoundError:  # killed before there was one
        return Leftover(path, "dead", _size(path))
    except OSError:
        return Leftover(path, "unknown", _size(path))
    states: dict[str, State] = {"mine": "dead", "taken": "alive", "unknown": "unknown"}
    lock.close()
    if lock.state == "taken" and _parts(path)["kind"] == "dead":  # somebody is just removing it
        return Leftover(path, "unknown", 0)
    return Leftover(path, states[lock.state], _size(path))


def _make(out: Path) -> tuple[Path, Lock]:
    """A new workspace and its lock. A folder without lock looks dead to others: who finds it removes it."""
    for _ in range(100):
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        with suppress(FileNotFoundError):
            while (lock := _own_lock(folder)).state == "taken":  # by one who only looks, or is about to remove it
                lock.close()
                time.sleep(0.001)
            return folder, lock
    raise OSError(errno.EBUSY, "the folder for an unfinished result is removed again and again", str(out.parent))


def _own_lock(folder: Path) -> Lock:
    try:
        return Lock(folder / "lock")
    except FileNotFoundError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove(folder: Path, target: Path) -> None:
    """Remove a workspace, its lock last: until then nobody takes it for dead. `old` stays if it is all there is."""
    _put_back(folder / "old", target)
    if os.path.lexists(folder / "old") and not os.path.lexists(target):
        return
    for part in (folder / "result", folder / "old"):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            with suppress(OSError):
                part.unlink()
    with suppress(OSError):
        if _names(folder) <= {"lock"}:
            shutil.rmtree(folder, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    with suppress(OSError):
        rename_new(old, target)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _size(folder: Path) -> int:
    """Bytes on disk of everything in a folder."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(where, name).lstat().st_blocks * 512
    return total
