"""Opening images: whatever it is, as rows of 8-bit red, green and blue.

A header says how large an image is; only what the budget allows is decoded. A decoded image stays in the form that its
file has, and rows are converted when they are asked for: orientation by EXIF, transparency on white, 16 bits to 8.
Decoding is Pillow's, which is imported when the first image comes.
"""

from __future__ import annotations

import binascii
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import EdgeqError, MediaError, UsageError
from edgeq.foreign import translated
from edgeq.inputs import exists, expand_user, open_file
from edgeq.printable import brief, one_line
from edgeq.vision.headers import gif_frames, webp_canvas
from edgeq.vision.resize import Rows, UInt8

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "FORMATS",
    "MEMORY",
    "Array",
    "ArrayRows",
    "Memory",
    "OpenImage",
    "Source",
    "open_image",
    "opened",
    "opened_file",
    "pillow",
]

Array = NDArray[Any]
Source = Any
"""bytes, a path, a data: URL, a binary file, a Pillow image, or an array uint8 [h, w], [h, w, 3] or [h, w, 4]."""

MEMORY = 512 << 20  # bytes that decoding an image may take, unless a caller says otherwise

Memory = int | Callable[[int, str], None]
"""Bytes that decoding may take; or who makes room for so many, and for what, and raises an EdgeqError where there is
none."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

_HINT = "give an image that opens elsewhere, saved again as PNG or JPEG"
_ORIENTATION = 0x0112  # of EXIF
_TRANSPOSE = (None, None, 0, 3, 1, 5, 4, 6, 2)  # Pillow's operation for each orientation
_REVERSED = (3, 4, 7, 8)  # orientations whose first row is stored last, be it a row or a column
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # of a pixel; of every other mode 4
_CANVAS = {
    "WEBP": 16,
    "GIF": 12,
    "AVIF": 12,
}  # bytes for each pixel that decoders of animations keep, some from opening
_READ_WHOLE = ("WEBP", "AVIF", "TIFF")  # formats whose decoders read the file as a whole
_WORK = 6 << 20  # bytes, and an eighth of the pixels': strips of rows on their way to another size, buffers of decoders
_LONGEST_STREAM = 1 << 30  # bytes of what cannot be read twice and is kept as a whole


class OpenImage:
    """An image whose header has been read: `size` is (height, width) as it is shown. Close it, or use it in a `with`
    statement."""

    def __init__(
        self, image: Image.Image | Array, name: str, file: BinaryIO | None = None, memory: Memory = MEMORY
    ) -> None:
        """`file` is None for an image that somebody else has opened."""
        self.name, self._image, self._file, self._memory = name, image, file, memory
        if isinstance(image, np.ndarray):
            self._orientation, shape = 1, image.shape[:2]
        else:
            self._orientation, shape = _orientation(image), image.size[::-1]
        self.size = (shape[1], shape[0]) if self._orientation >= 5 else (shape[0], shape[1])
        if file is not None:
            self._make_room(self._most_reduced)

    def __enter__(self) -> OpenImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file and its pixels go; an image that a caller gave stays open."""
        if self._file is not None and not isinstance(self._image, np.ndarray):
            self._image.close()
            self._file.close()

    def decoded(self, size: tuple[int, int] = (1, 1)) -> Rows:
        """The image's rows, to be resized to `size` (height, width).

        A JPEG that is too large for the budget is decoded at a half, a quarter or an eighth of its size, if that still
        is at least `size`; everything else at its own. Raises MediaError for what is damaged or too large.
        """
        image = self._image
        if isinstance(image, np.ndarray):
            return ArrayRows(image)
        if self._file is not None:
            by = self._reduced(size)
            if by > 1:
                image.draft(None, (image.width // by, image.height // by))
        with _decoding(self.name):
            image.load()
        return _ImageRows(image, self._orientation, self.name)

    def animation(self) -> Iterator[float]:
        """Milliseconds of each frame; 0 where it does not say. MediaError where the frames together are too large."""
        image, file = self._image, self._file
        assert not isinstance(image, np.ndarray)
        assert file is not None
        if image.format == "GIF":
            file.seek(0)
            for frame in gif_frames(file):
                make_room(self._memory, _CANVAS["GIF"], (frame.height, frame.width), self.name)
                yield frame.duration
            return
        with _decoding(self.name):
            for i in range(getattr(image, "n_frames", 1)):
                image.seek(i)
                if image.format == "WEBP":
                    image.load()  # which alone tells
                yield max(float(image.info.get("duration") or 0), 0)

    def seek(self, frame: int) -> None:
        """Make `decoded` give another frame of an animation."""
        assert not isinstance(self._image, np.ndarray)
        with _decoding(self.name):
            self._image.seek(frame)

    def _reduced(self, size: tuple[int, int]) -> int:
        """How many times smaller than its own the size is that there is room to decode it at, `size` at least."""
        by = 1
        while True:
            try:
                self._make_room(by)
            except EdgeqError:
                by *= 2
                if by > self._most_reduced or any(
                    have // by < want for have, want in zip(self.size, size, strict=True)
                ):
                    raise
            else:
                return by

    @property
    def _most_reduced(self) -> int:
        """How many times smaller than its own the smallest size is that it can be decoded at."""
        assert not isinstance(self._image, np.ndarray)
        return 8 if self._image.format in ("JPEG", "MPO") else 1

    def _make_room(self, by: int) -> None:
        """Make room for what decoding takes, at most, at a size that is so many times smaller."""
        image = self._image
        assert not isinstance(image, np.ndarray)
        pixels: int = -(-image.width // by) * -(-image.height // by)
        limit, more = pillow().MAX_IMAGE_PIXELS, 0
        if limit is not None and pixels > limit:
            raise _too_large(self.size, self.name, MEMORY)
        if image.info.get("progressive"):
            more = 6 * image.width * image.height  # 16-bit coefficients of three channels, in full size
        if image.format in _READ_WHOLE and self._file is not None:
            more += self._file.seek(0, SEEK_END)
        each = _CANVAS.get(image.format or "", _BYTES.get(image.mode, 4))
        make_room(self._memory, each / by**2, self.size, self.name, more)


class ArrayRows:
    """Rows of an array uint8 [h, w], or [h, w, 1, 3 or 4]."""

    def __init__(self, array: Array) -> None:
        self.size = (array.shape[0], array.shape[1])
        self._array = array

    def rows(self, first: int, last: int) -> UInt8:
        part = self._array[first:last]
        if part.ndim == 3 and part.shape[2] == 3:
            return part
        return _rgb(pillow().fromarray(part if part.ndim == 2 or part.shape[2] > 1 else part[:, :, 0]), "image")


class _ImageRows:
    """Rows of a decoded image, turned as `orientation` says."""

    def __init__(self, image: Image.Image, orientation: int, name: str) -> None:
        self._image, self._orientation, self._name = image, orientation, name
        self.size = (image.width, image.height) if orientation >= 5 else (image.height, image.width)

    def rows(self, first: int, last: int) -> UInt8:
        height, width = self.size
        if self._orientation in _REVERSED:
            first, last = height - last, height - first
        box = (first, 0, last, width) if self._orientation >= 5 else (0, first, width, last)
        with _decoding(self._name):
            part = self._image.crop(box)
            operation = _TRANSPOSE[self._orientation]
            return _rgb(part if operation is None else part.transpose(operation), self._name)


def open_image(source: Source, *, name: str | None = None, memory: Memory | None = None) -> OpenImage:
    """Open an image; its size is known then, and nothing decoded.

    source: see `Source`. name: what errors call it; None for the path, or "image". memory: bytes that decoding may
    take, 512 MiB unless given. Only the first frame of an animation is seen. Raises MediaError (exit code 4) for what
    is no image or too large, UsageError for what could be none.
    """
    if isinstance(source, OpenImage):
        return source
    if isinstance(source, np.ndarray):
        return OpenImage(_checked_array(source), name or "image")
    if isinstance(source, pillow().Image):
        return OpenImage(source, name or "image")
    file, called = opened_file(source, "image")
    called = name or called
    try:
        return opened(file, called, MEMORY if memory is None else memory)
    except BaseException:
        file.close()
        raise


def opened_file(source: Source, kind: str) -> tuple[BinaryIO, str]:
    """A file that can be read from any place, and its name; `kind` names what is wanted, and what has no name."""
    if isinstance(source, str) and source.startswith("data:"):
        return BytesIO(_data_url(source)), kind
    if isinstance(source, str) and "://" in source and not exists(Path(source)):
        where = "is a URL" if source.startswith("file:") else "is not on this machine"
        raise UsageError(f"{brief(source)} {where}, expected a path", hint=f"give the {kind} as a file, by its path")
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesIO(source), kind
    if isinstance(source, str | Path):
        path = expand_user(Path(source))
        try:
            file = open_file(path, streams=True)
        except OSError as error:
            raise MediaError(
                f"{path} cannot be opened: {error.strerror or one_line(error)}", hint=f"give the path of the {kind}"
            ) from None
        if file.seekable():
            return file, str(path)
        with file:
            return _whole(file, str(path)), str(path)
    if callable(getattr(source, "read", None)):
        named = getattr(source, "name", None)
        return _whole(source, kind), named if isinstance(named, str) else kind
    raise UsageError(
        f"{brief(source)} is no {kind}", hint=f"give a path, bytes, a data: URL, an open file or an array as the {kind}"
    )


def pillow() -> Any:
    """The module PIL.Image, imported when it is needed: text does not wait for it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise EdgeqError(
            f"images need Pillow, which cannot be imported ({one_line(error)})", hint="install it: `pip install pillow`"
        ) from None
    return Image


def opened(file: BinaryIO, name: str, memory: Memory) -> OpenImage:
    """An image in a file, which is closed with it."""
    head = file.read(30)
    file.seek(0)
    if canvas := webp_canvas(head):
        make_room(memory, _CANVAS["WEBP"], canvas[::-1], name)
    elif frame := next(gif_frames(file), None):
        make_room(memory, _CANVAS["GIF"], (frame.height, frame.width), name)
    file.seek(0)
    with _decoding(name):
        try:
            image = pillow().open(file, formats=FORMATS)
        except pillow().UnidentifiedImageError:
            raise MediaError(
                f"{name} is no image that edgeq reads ({', '.join(FORMATS)})" if head else f"{name} is empty",
                hint=_HINT,
            ) from None
        except pillow().DecompressionBombError as error:
            raise MediaError(
                f"{name} is refused by Pillow: {one_line(error)}", hint="make the image smaller first"
            ) from None
        return OpenImage(image, name, file, memory)


def make_room(
    memory: Memory, each: float, size: tuple[int, int], name: str, more: int = 0, *, frames: bool = False
) -> None:
    """Make room for decoding an image, or the frames of a video, of a size (height, width), which takes `each` bytes
    for a pixel and some more; an EdgeqError where there is none."""
    nbytes = int(each * size[0] * size[1]) + more
    if callable(memory):
        memory(nbytes + nbytes // 8 + _WORK, f"{'frames of ' if frames else ''}{size[1]} x {size[0]} pixels of {name}")
    elif nbytes > memory:
        raise _too_large(size, name, memory, frames=frames)


def _too_large(size: tuple[int, int], name: str, memory: int, *, frames: bool = False) -> MediaError:
    limit = None if frames else pillow().MAX_IMAGE_PIXELS
    safe = f", and of {limit / 1e6:,.0f} million pixels, Pillow's limit" if limit is not None else ""
    return MediaError(
        f"{name} has {'frames of ' if frames else ''}{size[1]} x {size[0]} pixels, too many to decode within "
        f"{memory / 1e6:,.0f} MB{safe}",
        hint="make it smaller first",
    )


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """MediaError for whatever Pillow raises, which for damaged files can be anything."""
    with (
        warnings.catch_warnings(),
        translated(lambda error: MediaError(f"{name} is damaged: {one_line(error)}", hint=_HINT)),
    ):
        warnings.simplefilter("ignore")  # of bombs, which are refused here, and of odd metadata
        yield


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8; 1 where nothing legible says otherwise, and for TIFF, which Pillow turns by itself."""
    from PIL import Image

    if image.format == "TIFF":
        return 1
    try:
        found = Image.Image.getexif(image).get(_ORIENTATION)  # not PNG's own, which would decode all of it
    except Exception:  # damaged metadata of an image that may be whole
        return 1
    return found if type(found) is int and 1 <= found <= 8 else 1


def _rgb(image: Image.Image, name: str) -> UInt8:
    """8-bit red, green and blue [h, w, 3] of an image of any mode; what is transparent lies on white."""
    if image.mode.startswith("I;16"):
        return _grey16(np.asarray(image), image.info.get("transparency"))
    if image.mode == "I":  # 16 bits, where Pillow has no smaller mode for them
        x = np.asarray(image)
        if x.size and (x.min() < 0 or x.max() > 0xFFFF):
            raise MediaError(f"{name} has 32-bit pixels", hint="save it with 8 or 16 bits")
        return _grey16(x, image.info.get("transparency"))
    if image.mode == "F":
        raise MediaError(f"{name} has floating-point pixels", hint="save it with 8 or 16 bits")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = pillow().new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow().alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _grey16(x: Array, key: object) -> UInt8:
    """16-bit grey to 8 bits; transformers does not scale it, which leaves next to nothing but white."""
    grey = (x >> 8).astype(np.uint8)
    if isinstance(key, int):
        grey[x == key] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def _checked_array(array: Array) -> Array:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UsageError(
            f"an image as an array of {array.dtype} {list(array.shape)}, expected uint8 [h, w], [h, w, 3] or [h, w, 4]",
            hint="scale it to 0..255 and put the channels last",
        )
    return array


def _whole(file: Any, name: str) -> BinaryIO:
    """What is left in a file, for those that cannot be read twice or are somebody else's to close."""
    with _decoding(name):
        data = file.read(_LONGEST_STREAM + 1)
    if not isinstance(data, bytes):
        raise UsageError(f"{name} is open as text", hint='open the file with mode "rb"')
    if len(data) > _LONGEST_STREAM:
        raise MediaError(f"{name} has more than {_LONGEST_STREAM:,} bytes", hint="store it in a file first")
    return BytesIO(data)


def _data_url(url: str) -> bytes:
    """The content of a data: URL (RFC 2397)."""
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError(f"{brief(url)} is no data: URL", hint="write data:image/png;base64, and the data")
    content = unquote_to_bytes(body)
    if not head.lower().rstrip().endswith(";base64"):
        return content
    content = b"".join(content.split()).rstrip(b"=")
    try:
        return binascii.a2b_base64(content + b"=" * (-len(content) % 4), strict_mode=True)
    except binascii.Error as error:
        raise MediaError(f"a data: URL that is no base64: {one_line(error)}", hint="encode the image again") from None
