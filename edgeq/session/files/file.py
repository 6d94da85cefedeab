"""A session file that a conversation is saved to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self

from edgeq.errors import UsageError
from edgeq.files.lock import Lock
from edgeq.files.publish import new_file, told
from edgeq.formats.growing import GrowingFile
from edgeq.identify import is_session
from edgeq.inputs import exists, is_file
from edgeq.session.files.checked import file_stamp
from edgeq.session.files.known import Known
from edgeq.session.files.saved import SavedSession
from edgeq.session.files.writing import about, dead_nbytes, needed_nbytes, update
from edgeq.session.snapshot import Snapshot
from edgeq.session.speaker import Speaker

__all__ = ["SessionFile"]

WASTE = 1 << 26  # bytes of a file that may be of no use any more, or half of what is


class Savable(Protocol):
    """A conversation: `edgeq.Chat`."""

    @property
    def model(self) -> Speaker: ...
    def snapshot(self) -> Snapshot: ...


class SessionFile:
    """A session file that a conversation is saved to, again and again; each time costs what is new.

    hold: keep other processes from writing to it as long as this is open. Raises UsageError if another one does.
    """

    def __init__(self, path: Path, *, hold: bool = False) -> None:
        self.path, self._hold = path, hold
        self._lock: Lock | None = None
        self._known: Known | None = None  # of what is in the file
        self._left: tuple[int, ...] = ()  # how the file was left
        self._serial = 0
        if hold:
            self._take_lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write to it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read(self) -> SavedSession:
        """What is in the file."""
        return SavedSession(self.path)

    def restored(self, saved: SavedSession, model: Speaker) -> Snapshot:
        """The conversation in the file, which is then saved to it at the cost of what is new."""
        snapshot, self._known = saved.restored(model)
        self._left, self._serial = saved.stamp, saved.serial
        return snapshot

    def save(self, chat: Savable) -> None:
        """Write a conversation, whole: whatever happens, the file is as it was before or as it is after."""
        snapshot, model = chat.snapshot(), chat.model
        values = about(model)
        with told(self.path):
            self._take_lock()
            try:
                if not self._appended(snapshot, model, values):
                    self._write_anew(snapshot, model, values)
                self._left = file_stamp(self.path)
            finally:
                if not self._hold:
                    self.close()

    def _take_lock(self) -> None:
        if self._lock is not None or not exists(self.path):
            return
        _check_session(self.path)
        self._lock = _locked(self.path)

    def _appended(self, snapshot: Snapshot, model: Speaker, values: dict[str, Any]) -> bool:
        """Add to the file what is new; False where it has to be written anew."""
        if self._known is None or self._lock is None or file_stamp(self.path) != self._left:
            return False
        file, known = GrowingFile.open(self.path), self._known.copy()
        try:
            if not file.has_room(64 + 8 * len(snapshot.prefixes) + len(snapshot.places)):
                return False
            waste = file.unused + dead_nbytes(file, known)
            if waste > max(WASTE, (file.nbytes - waste) // 2):
                return False
            self._serial += 1
            try:
                update(file, snapshot, model, values, known, self._serial)
            except BaseException:
                file.roll_back()
                raise
        finally:
            file.close()
        self._known = known
        return True

    def _write_anew(self, snapshot: Snapshot, model: Speaker, values: dict[str, Any]) -> None:
        known, mine = Known({}, [], {}), self._lock

        def may_replace(path: Path) -> None:
            _check_session(path)
            if mine is None:  # it was not there a moment ago
                _locked(path).close()

        with new_file(self.path, room=needed_nbytes(snapshot, model), may_replace=may_replace) as out:
            file = GrowingFile.create(out, 64 + 8 * len(snapshot.prefixes) + len(snapshot.places))
            try:
                update(file, snapshot, model, values, known, self._serial + 1)
            finally:
                file.close()
            lock = Lock(out)
        self._known, self._serial, self._lock = known, self._serial + 1, lock
        if mine is not None:
            mine.close()


def _locked(path: Path) -> Lock:
    lock = Lock(path)
    if lock.state == "taken":
        lock.close()
        raise UsageError(
            f"{path} is in use by another process, which saves its conversation to it",
            hint="end that one first, or choose another file",
        )
    return lock


def _check_session(path: Path) -> None:
    if not is_file(path) or not is_session(path):
        raise UsageError(f"{path} is there and is no session, so it is not replaced", hint="choose another name")
