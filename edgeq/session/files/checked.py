"""A session file as named arrays and one document, held to their checksums."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from edgeq.backends.ops import Ops
from edgeq.errors import ModelError, UsageError
from edgeq.formats.bf16 import Array
from edgeq.formats.growing import GrownFile
from edgeq.formats.mapped import Pages
from edgeq.identify import is_session
from edgeq.inputs import exists, is_file
from edgeq.printable import brief, one_line
from edgeq.session.files.known import SMALL, VERSION

__all__ = ["CheckedFile", "file_stamp", "number"]

PIECE = 1 << 20  # bytes that are checked at a time
_DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError)


class CheckedFile:
    """A session file. Raises UsageError where there is none, ModelError for one that is damaged, or of another version.

    values: the document. checksums: CRC-32 by the array's name, one of each row where rows are added. stamp: what
    changes when somebody else writes to the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not exists(path):
            raise UsageError(
                f"{path} does not exist",
                hint="write one: chat.save(path) in Python, or `edgeq chat MODEL --session FILE`",
            )
        if not is_file(path) or not is_session(path):
            raise ModelError(
                f"{path} is not a session file",
                hint="name one that chat.save (Python) or `edgeq chat --session` has written",
            )
        self.stamp = file_stamp(path)
        self._file = GrownFile(path)
        version = self._file.metadata.get("version")
        if version != str(VERSION):
            raise ModelError(
                f"{path} is a session of version {brief(version)}, expected {VERSION}",
                hint="use the edgeq that wrote it, or a newer one",
            )
        if "session" not in self._file.tensors:
            raise self.damaged("session is missing")
        text = self._file.array("session").tobytes()
        if f"{crc32(text):08x}" != self._file.metadata.get("checksum"):
            raise self.damaged("its document does not match its checksum")
        with self.believed():
            self.values: dict[str, Any] = json.loads(text)
            self.checksums: dict[str, Any] = dict(self.values["checksums"])

    def damaged(self, problem: str) -> ModelError:
        """The error for a file that is not as it was written."""
        return ModelError(f"{self.path} is damaged: {problem}", hint="copy the file again, or use an earlier one")

    @contextmanager
    def believed(self, *, usage: bool = True) -> Iterator[None]:
        """Whatever goes wrong while the document is believed is a ModelError, which says that the file is damaged; with
        `usage` also a UsageError, which is about what the document says.
        """
        wrong = (*_DAMAGED, UsageError) if usage else _DAMAGED
        try:
            yield
        except wrong as error:
            problem = f"its document lacks {error}" if isinstance(error, KeyError) else one_line(error)
            raise self.damaged(problem) from None

    @property
    def nbytes(self) -> int:
        return len(self._file.mapped)

    @property
    def unused_nbytes(self) -> int:
        """Bytes of what the conversation no longer needs."""
        return sum(info.end - info.start for name, info in self._file.tensors.items() if name.startswith("unused."))

    def is_of(self, ops: Ops[Any, Any]) -> bool:
        """Whether its keys and values are as this backend keeps them."""
        return bool((self.values["backend"], self.values["kv"]) == (ops.name, ops.kv_dtype))

    def array(self, name: str, shape: tuple[int, ...] | None) -> Array:
        """An array in the mapped file, float32 where its `shape` is expected; ValueError where it is otherwise."""
        if name not in self._file.tensors:
            raise ValueError(f"{name} is missing")
        if not isinstance(self.checksums.get(name), int | list):
            raise ValueError(f"{name} has no checksum")
        array = self._file.array(name)
        if not array.flags.aligned:  # as nobody writes it; what computes with it where it is may not
            raise ValueError(f"{name} does not begin where numbers of its type do")
        if shape is not None and (array.shape != shape or array.dtype != np.float32):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected float32 {list(shape)}")
        return array

    def small(self, name: str) -> Array:
        """One of the conversation's own arrays (`SMALL`), checked at once: int32 [N], flags uint8 [N]."""
        assert name in SMALL, name
        array = self.array(name, None)
        if self._checksum_of(name) != self.checksums.get(name):
            raise ValueError(f"{name} does not match its checksum")
        if array.ndim != 1 or array.dtype != (np.uint8 if name == "flags" else np.int32):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        return array

    def check(self) -> None:
        """ModelError unless everything in the file is as it was written; reads all of it."""
        for name, expected in self.checksums.items():
            with self.believed():
                found = self._checksum_of(name, rows=isinstance(expected, list))
            if found != expected:
                raise self.damaged(f"{brief(name)} does not match its checksum")
        self._file.check_whole()

    def _checksum_of(self, name: str, *, rows: bool = False) -> int | list[int]:
        array = self.array(name, None)
        if rows:
            return [_checksum(row) for row in array]
        return _checksum(array) if array.size else 0


def _checksum(array: Array) -> int:
    """Of an array in the mapped file, whose pages need not stay: those of a long session would be all of it."""
    data, found = array.reshape(-1).view(np.uint8), 0
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        found = crc32(piece.data, found)
        Pages([piece]).let_go()
    return found


def file_stamp(path: Path) -> tuple[int, ...]:
    """What changes when somebody else writes to a file."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def number(value: Any) -> int:
    """A count or a place that a document names; TypeError for anything else."""
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise TypeError(f"{brief(value)} is no number of anything")
    return value
