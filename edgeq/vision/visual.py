"""A picture that is ready for the vision tower: an image, or a video as a row of temporal patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from operator import index
from typing import Any, Literal, Protocol

import numpy as np

from edgeq.errors import UsageError
from edgeq.formats.bf16 import Float32
from edgeq.printable import brief

__all__ = ["Grid", "Kind", "Pixels", "Visual"]

Kind = Literal["image", "video"]
Grid = tuple[int, int, int]
"""Temporal patches, rows and columns of patches."""


class Pixels(Protocol):
    """The values of patches [patches, values]: a float32 array, or what makes some rows of one when they are asked for
    (of a long video the whole would be large)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, rows: slice, /) -> Float32: ...


@dataclass(frozen=True, eq=False, slots=True)
class Visual:
    """An image or a video, resized. It unpacks as `kind, pixel_values, grid = visual`.

    grid: temporal patches, rows and columns of patches. square: rows (and columns) of patches that make a token.
    pixels: [temporal patches * rows * columns, values], in block order: an array, or what makes some rows when they are
    wanted.
    timestamps: seconds, one for each temporal patch of a video. digest: equal for equal patches.
    name, size: of what it was made from, the latter (height, width) in pixels; taken: frames of a video.
    """

    kind: Kind
    grid: tuple[int, int, int]
    square: int
    pixels: Pixels
    digest: bytes
    timestamps: tuple[float, ...] = ()
    name: str = ""
    size: tuple[int, int] | None = None
    taken: int = 1

    @classmethod
    def given(cls, visual: Any, square: int) -> Visual:
        """One that was given as (kind, pixel_values, grid); UsageError for what is none.

        Its pixels are float32 [patches, values of a patch]; whether they fit the tower, the tower says.
        """
        if isinstance(visual, Visual):
            return visual
        try:
            kind, pixels, grid = visual
            pixels, (frames, rows, columns) = np.asarray(pixels), map(index, grid)
        except (TypeError, ValueError, OverflowError):
            raise _no_visual(visual) from None
        whole = min(frames, rows, columns) > 0 and rows % square == columns % square == 0
        if kind not in ("image", "video") or pixels.ndim != 2 or pixels.dtype != np.float32 or not whole:
            raise _no_visual(visual)
        if len(pixels) != frames * rows * columns:
            raise UsageError(
                f"the {kind} has {len(pixels)} patches, expected {frames} x {rows} x {columns} as its grid says",
                hint="make both with edgeq.vision.preprocess",
            )
        if pixels.size and not np.isfinite([pixels.min(), pixels.max()]).all():
            raise UsageError(
                f"the {kind} has patches that are NaN or infinite", hint="make them with edgeq.vision.preprocess"
            )
        digest = blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
        return cls(kind, (frames, rows, columns), square, pixels, digest, name=kind)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.kind, self.pixel_values, self.grid))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return (self.kind, self.pixel_values, self.grid)[index]

    @property
    def pixel_values(self) -> Float32:
        """All patches: float32 [temporal patches * rows * columns, values]."""
        return self.pixels[0 : self.pixels.shape[0]]

    def temporal_patches(self, first: int, count: int) -> Pixels:
        """The patches of some of them."""
        _, rows, columns = self.grid
        return _Rows(self.pixels, first * rows * columns, count * rows * columns)

    @property
    def frames(self) -> int:
        """Temporal patches: pictures of their own for the tower and for positions."""
        return self.grid[0]

    @property
    def height(self) -> int:
        """Rows of tokens."""
        return self.grid[1] // self.square

    @property
    def width(self) -> int:
        """Columns of tokens."""
        return self.grid[2] // self.square

    @property
    def tokens(self) -> int:
        """Tokens that it takes, timestamps not counted."""
        return self.frames * self.height * self.width


class _Rows:
    """`count` rows of `pixels` from `first` on, made when they are wanted."""

    def __init__(self, pixels: Pixels, first: int, count: int) -> None:
        self._pixels, self._first = pixels, first
        self.shape = (count, *pixels.shape[1:])
        self.dtype = pixels.dtype

    def __getitem__(self, rows: slice) -> Float32:
        start, stop, _ = rows.indices(self.shape[0])
        return self._pixels[self._first + start : self._first + stop]


def _no_visual(visual: object) -> UsageError:
    return UsageError(
        f"a picture must be (kind, pixel_values, grid), got {brief(visual)}",
        hint='kind is "image" or "video"; edgeq.vision.preprocess makes the other two',
    )
