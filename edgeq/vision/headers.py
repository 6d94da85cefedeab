"""What GIF and WebP files say of their size before anything is decoded: Pillow takes memory for them while it opens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

__all__ = ["GifFrame", "gif_frames", "webp_canvas"]

_EXTENSION, _IMAGE, _END, _CONTROL = b"!", b",", b";", 0xF9


class GifFrame(NamedTuple):
    """A frame of a GIF: the canvas that reaches over it and the screen, and the milliseconds that it stays."""

    width: int
    height: int
    duration: int


def gif_frames(file: BinaryIO) -> Iterator[GifFrame]:
    """The frames of a GIF (GIF89a specification), up to where the file ends or is damaged; what is none has none.

    A frame may reach beyond the screen that the header names, and Pillow then makes the picture larger.
    """
    head = file.read(13)
    if head[:4] != b"GIF8" or len(head) < 13:
        return
    width, height = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    file.seek(_colours(head[10]), 1)
    duration = 0
    while (kind := file.read(1)) not in (b"", _END):
        if kind == _EXTENSION:
            label = file.read(1)
            first = _skip_blocks(file)
            if label == bytes([_CONTROL]):
                duration = 10 * int.from_bytes(first[1:3], "little")
        elif kind == _IMAGE:
            place = file.read(9)
            x, y, w, h = (int.from_bytes(place[i : i + 2], "little") for i in (0, 2, 4, 6))
            width, height = max(width, x + w), max(height, y + h)
            yield GifFrame(width, height, duration)
            file.seek(_colours(place[8] if len(place) > 8 else 0) + 1, 1)
            _skip_blocks(file)
            duration = 0


def webp_canvas(head: bytes) -> tuple[int, int] | None:
    """Width and height by the first 30 bytes of a WebP file (RFC 9649); None for anything else."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    match head[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        case b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return None


def _colours(flags: int) -> int:
    """Bytes of a table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_blocks(file: BinaryIO) -> bytes:
    """Go past a chain of blocks, each with its length before it; what the first of them holds."""
    first = b""
    while length := file.read(1):
        if not length[0]:
            break
        block = file.read(length[0])
        first = first or block
    return first
