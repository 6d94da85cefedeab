"""Video as frames that come one at a time: files, animated images, folders and lists of images.

A file is decoded by the program `ffmpeg` if it is on PATH, else by PyAV (the extra `edgeq[video]`). Either goes through
the file twice: once over its packets, to count frames and time, and once to decode, of which only the frames that were
chosen arrive. No more than one of them is there in full size.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from io import BytesIO
from itertools import count, repeat
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from edgeq.errors import MediaError
from edgeq.foreign import translated
from edgeq.inputs import expand_user, is_folder
from edgeq.printable import one_line, printable
from edgeq.vision.images import (
    MEMORY,
    Array,
    ArrayRows,
    Memory,
    OpenImage,
    Source,
    make_room,
    open_image,
    opened,
    opened_file,
    pillow,
)
from edgeq.vision.resize import Rows

__all__ = ["OpenVideo", "open_video"]

_ANIMATED = (b"GIF8", b"\x89PNG")  # how files begin that Pillow reads, all frames of them
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".avif")
_PACKET = re.compile(
    rb"\d+, *-?\d+, *(-?\d+), *(-?\d+), *\d+, *0x\w+(?:, F=0x(\w+))?"
)  # of framecrc: pts, duration, flags
_NO_START, _DISCARDED = -(1 << 63), 4  # a pts that is none; a flag of packets that an edit list leaves out
_HINT = "give a video that plays elsewhere, or a folder of its frames"
_DELAY = 100  # milliseconds of a frame whose animation gives none, as browsers have it
_CANVASES, _PIPED = 12, 6  # bytes for each pixel: of an animated PNG; of a frame that comes through a pipe in pieces
_DECODER = 15  # of the frame that PyAV gives, and of eight that its decoder refers to
_MOST_CHOSEN = 2048  # frames that are named to ffmpeg, whose arguments are limited; of more, all come here


class OpenVideo(ABC):
    """A video whose frames have been counted; close it, or use it in a `with` statement.

    `total`: frames. `fps`: frames in a second, None if nothing says so. `size`: (height, width) of a frame.
    """

    name: str
    total: int
    fps: float | None
    size: tuple[int, int]

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[Rows]:
        """Some frames, whose numbers ascend, in the order of time; each is good until the next is asked for."""

    def close(self) -> None:  # noqa: B027  lists of images have nothing to close
        """Let files and processes go."""

    def _repeated(self, last: Rows | None, times: int, why: str = "") -> Iterator[Rows]:
        """The last frame again for those that were counted and do not come: files are cut short."""
        if last is None:
            raise MediaError(f"{self.name} has no frames that can be decoded{why}", hint=_HINT)
        return repeat(last, times)

    def __enter__(self) -> OpenVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_video(
    source: Source, *, fps: float | None = None, name: str | None = None, memory: Memory | None = None
) -> OpenVideo:
    """Open a video: its frames are counted then, and none decoded.

    source: a path, bytes, a data: URL or a binary file of a video or an animated image (GIF, WebP, PNG); a folder of
    images, in the order of the numbers in their names; a sequence of images of one size, or an array uint8
    [frames, h, w, 3]. fps: its frames in a second, where it does not say so itself. memory: bytes that a frame may
    take, 512 MiB unless given.

    Raises MediaError (exit code 4) for what is damaged, too large or no video.
    """
    memory = MEMORY if memory is None else memory
    if isinstance(source, OpenVideo):
        return source
    if isinstance(source, str | Path) and is_folder(expand_user(Path(source))):
        return _Images(_in_order(expand_user(Path(source))), fps, name or str(source), memory)
    if (isinstance(source, np.ndarray) and source.ndim == 4) or (
        isinstance(source, Sequence) and not isinstance(source, str | bytes | bytearray | memoryview)
    ):
        return _Images(list(source), fps, name or "video", memory)
    if isinstance(source, (np.ndarray, OpenImage, pillow().Image)):
        return _Images([source], fps, name or "video", memory)
    file, called = opened_file(source, "video")
    try:
        head = file.read(12)
        file.seek(0)
        if head.startswith(_ANIMATED) or (head[:4], head[8:]) == (b"RIFF", b"WEBP"):
            return _Animation(file, fps, name or called, memory)
        if not head:
            raise MediaError(f"{name or called} is empty", hint=_HINT)
        path = None if isinstance(file, BytesIO) else Path(called)
        return _file_reader()(file, path, fps, name or called, memory)
    except BaseException:
        file.close()
        raise


class _Images(OpenVideo):
    """Images that are frames."""

    def __init__(self, images: Sequence[Source], fps: float | None, name: str, memory: Memory) -> None:
        self.name, self.total, self.fps = name, len(images), fps
        self._images, self._memory = images, memory
        if not self.total:
            raise MediaError(f"{name} has no frames", hint="give images of one size as frames")
        with open_image(images[0], memory=memory) as first:
            self.size = first.size

    def frames(self, indices: Sequence[int]) -> Iterator[Rows]:
        for i in indices:
            with open_image(self._images[i], memory=self._memory) as image:
                if image.size != self.size:
                    (h, w), (height, width) = image.size, self.size
                    raise MediaError(
                        f"frame {i + 1} of {self.name} is {w} x {h}, expected {width} x {height} as the first",
                        hint="give frames of one size",
                    )
                yield image.decoded()


class _Animation(OpenVideo):
    """An animated image."""

    def __init__(self, file: BinaryIO, fps: float | None, name: str, memory: Memory) -> None:
        self.name = name
        self._image = opened(file, name, memory)
        self.size = self._image.size
        make_room(memory, _CANVASES, self.size, name, frames=True)
        durations = list(self._image.animation()) or [0]
        self.total = len(durations)
        self.fps = fps or 1000 * self.total / sum(given or _DELAY for given in durations)

    def frames(self, indices: Sequence[int]) -> Iterator[Rows]:
        for i in indices:
            self._image.seek(i)
            yield self._image.decoded()

    def close(self) -> None:
        self._image.close()


class _Packets:
    """Counts the packets that become frames, and the time that they take."""

    def __init__(self) -> None:
        self.total, self.first, self.end, self.sum = 0, math.inf, -math.inf, 0

    def add(self, start: int | None, duration: int) -> None:
        """Another packet; times are in ticks. Raw streams give no start."""
        self.total, self.sum = self.total + 1, self.sum + duration
        if start is not None:
            self.first, self.end = min(self.first, start), max(self.end, start + duration)

    def fps(self, time_base: Fraction) -> float | None:
        """Frames in a second."""
        ticks = int(self.end - self.first) if self.first < self.end else self.sum
        return float(self.total / (ticks * time_base)) if ticks > 0 else None


class _FFmpeg(OpenVideo):
    """A file that the program `ffmpeg` reads.

    Packets are listed by its framecrc format, which says times, and frames come as PPM images, which say their size:
    both formats are the same in every version.
    """

    def __init__(self, file: BinaryIO, path: Path | None, fps: float | None, name: str, memory: Memory) -> None:
        self.name, self._memory, self._file = name, memory, file
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._complaint = ""
        try:
            if path is None:
                self._folder = tempfile.TemporaryDirectory()
                path = Path(self._folder.name, "video")
                with path.open("wb") as copy:
                    shutil.copyfileobj(file, copy)
            self._path = path.absolute()
            packets, time_base = self._count()
            self.total, self.fps = packets.total, fps or packets.fps(time_base)
            with closing(self.frames([0])) as frames:
                self.size = next(frames).size
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()
        if self._folder is not None:
            self._folder.cleanup()

    def frames(self, indices: Sequence[int]) -> Generator[Rows]:
        named = len(indices) <= _MOST_CHOSEN
        chosen = f"select='{_one_of(indices)}'," if named else ""
        # Two frames a second is a rate without meaning, at which each frame has a place of its own.
        options = [
            "-vf",
            f"{chosen}settb=1/2,setpts=N",
            "-r",
            "2",
            "-frames:v",
            str(len(indices) if named else indices[-1] + 1),
        ]
        wanted = set(range(len(indices)) if named else indices)
        found, last = 0, None
        with self._running(*options, "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-") as output:
            for i in count():
                if (frame := self._frame(output)) is None:
                    break
                if i in wanted:
                    found, last = found + 1, ArrayRows(frame)
                    yield last
        yield from self._repeated(last, len(indices) - found, self._complaint)

    def _count(self) -> tuple[_Packets, Fraction]:
        packets, time_base = _Packets(), Fraction(1)
        with self._running("-c", "copy", "-f", "framecrc", "-") as output:
            for line in output:
                if line.startswith(b"#tb"):
                    time_base = Fraction(line.split()[-1].decode())
                elif found := _PACKET.match(line):
                    start, duration = int(found[1]), int(found[2])
                    flags = int(found[3] or b"0", 16)
                    if not flags & _DISCARDED:
                        packets.add(None if start == _NO_START else start, max(duration, 0))
        if not packets.total:
            raise MediaError(f"{self.name} has no video in it{self._complaint}", hint=_HINT)
        return packets, time_base

    def _frame(self, output: IO[bytes]) -> Array | None:
        """The next image of a pipe: uint8 [h, w, 3]; None at the end."""
        header = b"".join(output.readline(32) for _ in range(3))
        if not (found := re.fullmatch(rb"P6\n(\d+) (\d+)\n255\n", header)):
            return None
        width, height = map(int, found.groups())
        make_room(self._memory, _PIPED, (height, width), self.name, frames=True)
        data = output.read(3 * width * height)
        if len(data) < 3 * width * height:
            return None
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)

    @contextmanager
    def _running(self, *options: str) -> Iterator[IO[bytes]]:
        """The output of ffmpeg, which may read this one file; what it complained of is known afterwards."""
        command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file", "-i", f"file:{self._path}"]
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                [*command, "-map", "0:V:0", *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=complaints,
            )  # fmt: skip
            assert process.stdout is not None
            try:
                yield process.stdout
            finally:
                process.stdout.close()
                process.kill()  # where it has not ended by itself
                process.wait()
            complaints.seek(0)
            told = complaints.read(1 << 10).decode(errors="replace").strip().split("\n")[0]
            self._complaint = f" (ffmpeg: {printable(told, longest=200)})" if told else ""


class _PyAV(OpenVideo):
    """A file that PyAV reads."""

    def __init__(self, file: BinaryIO, path: Path | None, fps: float | None, name: str, memory: Memory) -> None:
        self.name, self._file, self._path = name, file, path
        packets, time_base = _Packets(), Fraction(1)
        with self._stream() as (container, stream):
            time_base = stream.time_base or time_base
            make_room(memory, _DECODER, (stream.height, stream.width), name, frames=True)
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    packets.add(packet.pts, max(packet.duration or 0, 0))
        self.total, self.fps = packets.total, fps or packets.fps(time_base)
        with closing(self.frames([0])) as frames:
            self.size = next(frames).size

    def close(self) -> None:
        self._file.close()

    def frames(self, indices: Sequence[int]) -> Generator[Rows]:
        wanted, found, last = set(indices), 0, None
        with self._stream() as (container, stream):
            stream.thread_type = "AUTO"
            for i, frame in enumerate(container.decode(stream)):
                if i in wanted:
                    turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    found, last = found + 1, ArrayRows(turned)
                    yield last
                if found == len(indices):
                    return
        yield from self._repeated(last, len(indices) - found)

    @contextmanager
    def _stream(self) -> Iterator[tuple[Any, Any]]:
        import av

        self._file.seek(0)
        source = self._file if self._path is None else f"file:{self._path.absolute()}"
        with (
            translated(lambda error: MediaError(f"{self.name} cannot be read: {one_line(error)}", hint=_HINT)),
            av.open(source, options={"protocol_whitelist": "file"}) as container,
        ):
            if not container.streams.video:
                raise MediaError(f"{self.name} has no video in it", hint=_HINT)
            yield container, container.streams.video[0]


def _file_reader() -> type[_FFmpeg] | type[_PyAV]:
    if shutil.which("ffmpeg"):
        return _FFmpeg
    with suppress(ImportError):
        import av  # noqa: F401

        return _PyAV
    raise MediaError(
        "a video file needs ffmpeg or PyAV, and neither is here",
        hint="install ffmpeg, or `pip install 'edgeq[video]'`, or give a folder of the video's frames",
    )


def _in_order(folder: Path) -> list[Path]:
    """The images of a folder, in the order of the numbers in their names."""

    def place(path: Path) -> list[tuple[int, str]]:
        return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"([0-9]+)", path.name)]

    return sorted((path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES), key=place)


def _one_of(indices: Sequence[int]) -> str:
    """ffmpeg's expression for: the frame's number n is one of these. A tree, for it takes no sum of a hundred."""
    if len(indices) == 1:
        return f"eq(n,{indices[0]})"
    half = len(indices) // 2
    return f"if(lt(n,{indices[half]}),{_one_of(indices[:half])},{_one_of(indices[half:])})"
