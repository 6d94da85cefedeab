"""Safetensors files that grow: what is new goes behind the rest, and costs no more than itself.

At rest such a file is a valid safetensors file. Its header has room to grow; what is not wanted any more stays where it
is, as tensors `unused.N`, until the file is written anew. Nothing that the header names is ever written over, so a file
can be mapped by others while it grows.

A change is a change of the header, which must not be seen half done. New tensors are written behind the data, then a
copy of the new header with its checksum and a mark, the trailer; when these are durable, the change is made. What
follows only tidies up: the header is written in its place, and the trailer cut off. So whoever opens the file takes the
header from the trailer if there is one, and bytes behind the data without one belong to a change that was not made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, Self
from zlib import crc32

from edgeq.errors import ModelError
from edgeq.formats.safetensors import DTYPES, SafetensorsFile, TensorInfo

__all__ = ["GrowingFile", "GrownFile"]

_MARK = b"edgeqEQS"
_TRAILER = 8 + 4 + len(_MARK)  # the header's length and checksum, both little-endian, and the mark
_ROOM = 1 << 16  # bytes of a header, at least
_UNUSED = "unused."


class GrownFile(SafetensorsFile):
    """One to be read, whatever its writer was doing when it was stopped."""

    header: bytes

    def _header_bytes(self, length: int) -> bytes:
        self.header = self._committed(length)
        return self.header

    def _error(self, problem: str) -> ModelError:
        return ModelError(f"{self.path} is damaged: {problem}", hint="copy the file again, or use an earlier one")

    def _committed(self, length: int) -> bytes:
        size, end = len(self.mapped), len(self.mapped) - _TRAILER
        trailer = self.mapped[max(0, end) :]
        if (
            trailer.endswith(_MARK)
            and trailer[:8] == length.to_bytes(8, "little")
            and size >= 8 + 2 * length + _TRAILER
        ):
            header = self.mapped[end - length : end]
            if crc32(header) == int.from_bytes(trailer[8:12], "little"):
                return header
        return super()._header_bytes(length)

    def _check_end(self, end: int, have: int) -> None:
        if end > have:
            super()._check_end(end, have)


class GrowingFile:
    """One to be written to: `add` tensors and `drop` others, then `commit`.

    nbytes: of the data so far; unused: those of them that nothing is in.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], data_start: int, end: int) -> None:
        self._file = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        self._tensors = {name: info for name, info in tensors.items() if not name.startswith(_UNUSED)}
        self._data_start, self.nbytes = data_start, end
        self._committed = dict(self._tensors), end

    @classmethod
    def create(cls, path: Path, tensors: int) -> Self:
        """A new file; tensors: how many it is going to have."""
        length = max(_ROOM, 512 * tensors) + 56
        path.touch(exist_ok=False)
        file = cls(path, {}, 8 + length, 0)
        file._write(0, length.to_bytes(8, "little"))
        return file

    @classmethod
    def open(cls, path: Path) -> Self:
        """A file that is there; ModelError if it is none of these."""
        found = GrownFile(path)
        end = max((info.end for info in found.tensors.values()), default=0)
        file = cls(path, found.tensors, found.data_start, end)
        if len(found.mapped) > found.data_start + end:  # a change that was not tidied up, or not made
            file._write(8, found.header)
            os.fsync(file._file)
            os.ftruncate(file._file, found.data_start + end)
        return file

    @property
    def unused(self) -> int:
        return self.nbytes - sum(info.end - info.start for info in self._tensors.values())

    def nbytes_of(self, name: str) -> int:
        """Bytes of a tensor."""
        info = self._tensors[name]
        return info.end - info.start

    def add(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[memoryview | bytes]) -> None:
        """Write a tensor behind the others; it counts from the next `commit` on."""
        start = self.nbytes
        for piece in pieces:
            self._write(self._data_start + self.nbytes, piece)
            self.nbytes += memoryview(piece).nbytes
        info = TensorInfo(dtype, shape, start, self.nbytes)
        assert info.end - info.start == prod(shape) * DTYPES[dtype].itemsize, f"{name}: not the bytes that it has"
        assert name not in self._tensors, f"{name} is there already"
        self._tensors[name] = info

    def drop(self, names: Iterable[str]) -> None:
        """Let go of some tensors; those that are not there are not missed."""
        for name in names:
            self._tensors.pop(name, None)

    def has_room(self, tensors: int) -> bool:
        """Whether the header has room for so many more."""
        return len(self._header({})) + 256 * (tensors + 8) < self._data_start - 8

    def commit(self, metadata: Mapping[str, str]) -> None:
        """Make what was added and dropped count, all at once, even if the process or the machine stops at any time."""
        header = self._header(metadata).ljust(self._data_start - 8)
        assert len(header) == self._data_start - 8, "has_room was not asked"
        end = self._data_start + self.nbytes
        if self._committed[0]:
            trailer = len(header).to_bytes(8, "little") + crc32(header).to_bytes(4, "little") + _MARK
            self._write(end, header + trailer)
            os.fsync(self._file)
        self._write(8, header)
        os.fsync(self._file)
        os.ftruncate(self._file, end)
        self._committed = dict(self._tensors), self.nbytes

    def roll_back(self) -> None:
        """Forget what was added and dropped since the last commit."""
        self._tensors, self.nbytes = dict(self._committed[0]), self._committed[1]
        with suppress(OSError):
            os.ftruncate(self._file, self._data_start + self.nbytes)

    def close(self) -> None:
        """Close the file as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        """With names for the holes."""
        entries, end, holes = dict[str, TensorInfo](), 0, 0
        for name, info in sorted(self._tensors.items(), key=lambda item: item[1].start):
            if info.start > end:
                entries[f"{_UNUSED}{holes}"] = TensorInfo("U8", (info.start - end,), end, info.start)
                holes += 1
            entries[name], end = info, info.end
        if self.nbytes > end:
            entries[f"{_UNUSED}{holes}"] = TensorInfo("U8", (self.nbytes - end,), end, self.nbytes)
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, info in entries.items():
            header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.start, info.end]}
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

    def _write(self, at: int, data: memoryview | bytes) -> None:
        view = memoryview(data)
        rest = view.cast("B") if view.nbytes else view[:0]
        while len(rest):
            done = os.pwrite(self._file, rest, at)
            at, rest = at + done, rest[done:]
