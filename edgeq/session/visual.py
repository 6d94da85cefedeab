"""A picture that is ready for the vision tower: an image, or a video as a row of temporal patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeq.errors import UsageError
from edgeq.formats.bf16 import Float32
from edgeq.model.vision import Pixels
from edgeq.numbers import Range
from edgeq.printable import brief
from edgeq.text.visuals import Kind, Outline

if TYPE_CHECKING:
    from edgeq import vision

__all__ = ["CHAT_VISUALS", "Visual", "VisualSettings"]

_RANGES = {
    "image_tokens": Range(1, 1 << 20, whole=True), "video_tokens": Range(1, 1 << 20, whole=True),
    "min_pixels": Range(1, 1 << 40, whole=True), "max_pixels": Range(1, 1 << 40, whole=True),
    "fps": Range(1e-6, 1000), "max_frames": Range(1, 1 << 20, whole=True),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class VisualSettings:
    """How large pictures become, and how many frames of a video are taken; None is what the checkpoint says."""

    image_tokens: int | None = None
    """Most tokens of an image; the checkpoint's own limit holds where it is lower."""
    video_tokens: int | None = None
    """Most tokens of all frames of a video, likewise."""
    min_pixels: int | None = None
    """Smaller images, or videos with fewer pixels in all frames, are enlarged; in the place of the checkpoint's."""
    max_pixels: int | None = None
    """Larger ones are reduced; in the place of the checkpoint's limit and of the two above."""
    fps: float | None = None
    """Frames that are taken of each second of a video; of a list or a folder of frames, how many make a second."""
    max_frames: int | None = None
    """Most frames that are taken of a video; the checkpoint's own limit holds where it is lower."""
    outer_vision_tokens: bool = True
    """Whether `<|vision_start|>` and `<|vision_end|>` stay around a video's frames, as in transformers 5.23."""

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if not (value is None or allowed.holds(value)):
                raise UsageError(f"{name} must be {allowed.wanted(value)}, got {brief(value)}")

    def replace(self, **given: Any) -> VisualSettings:
        """These settings with those of `given` that are not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


CHAT_VISUALS = VisualSettings(image_tokens=1024, video_tokens=2048, max_frames=64)
"""What conversations begin with. The checkpoints' own limits are 16,384 tokens for an image and 12,288 for a video:
minutes of work on a small machine, and hundreds of megabytes of keys and values."""


@dataclass(frozen=True, eq=False, slots=True)
class Visual:
    """An image or a video, resized. It unpacks as `kind, pixel_values, grid = visual`.

    grid: temporal patches, rows and columns of patches. square: rows (and columns) of patches that make a token.
    pixels: [temporal patches * rows * columns, values], in block order: an array, or what makes some rows when they are
    wanted.
    timestamps: seconds, one for each temporal patch of a video. digest: equal for equal patches.
    name, size: of what it was made from, the latter (width, height) in pixels; taken: frames of a video.
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
    def read(cls, visual: vision.Visual, square: int) -> Visual:
        """One that `edgeq.vision` has read."""
        height, width = visual.size
        return cls(
            visual.kind, visual.grid, square, visual.pixels, visual.digest, visual.timestamps, visual.name,
            (width, height), visual.taken,
        )  # fmt: skip

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

    @property
    def outline(self) -> Outline:
        """What it takes in a prompt's text."""
        each = self.height * self.width
        return Outline(self.kind, each if self.kind == "video" else self.tokens, self.timestamps)


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
