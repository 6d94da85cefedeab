"""Files written in large pieces, so that they can be mapped with large pages.

What is written stays in the system's memory in blocks as large as the pieces it came in. Where a piece is 2 MB at a
multiple of 2 MB, one entry of the page table can map it; a file written by the row takes one for every 4 KB, and
reading weights in their order then spends up to a fifth of the time on those.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

__all__ = ["PieceWriter"]

PIECE = 2 << 20  # of a large page, on x86-64 and on ARM with small pages of 4 KB


class PieceWriter:
    """Writes a file, new ("wb") or at its end ("ab"), in pieces that begin at multiples of PIECE."""

    def __init__(self, path: Path, mode: Literal["wb", "ab"] = "wb") -> None:
        self._file = path.open(mode, buffering=0)
        self._held = bytearray()
        self._written = os.fstat(self._file.fileno()).st_size

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        view = memoryview(data)
        rest = view.cast("B") if view.nbytes else view[:0]
        while len(rest):
            room = PIECE - (self._written + len(self._held)) % PIECE
            if not self._held and len(rest) >= room + PIECE:  # whole pieces go as they are
                room += (len(rest) - room) // PIECE * PIECE
                self._write(rest[:room])
            else:
                self._held += rest[:room]
                if len(rest) >= room:
                    self.flush()
            rest = rest[room:]

    def tell(self) -> int:
        """Bytes of the file so far."""
        return self._written + len(self._held)

    def flush(self) -> None:
        """Write what is held back."""
        self._write(memoryview(self._held))
        self._held = bytearray()

    def sync(self) -> None:
        """Write what is held back, and make the file durable."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, without what is held back."""
        self._file.close()

    def _write(self, data: memoryview) -> None:
        while len(data):
            done = self._file.write(data)
            self._written += done
            data = data[done:]
