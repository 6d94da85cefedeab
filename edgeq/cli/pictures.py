"""Pictures at the terminal: where they come from, what they will cost, and boxes drawn on them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from edgeq.cli.boxes import draw_marks, find_marks
from edgeq.cli.console import say, warn
from edgeq.errors import EdgeqError, UsageError
from edgeq.hub import DEMO
from edgeq.inputs import exists, expand_user, is_file
from edgeq.printable import printable
from edgeq.session.cost import seconds_to_see
from edgeq.vision.visual import Visual

if TYPE_CHECKING:
    from edgeq.session.speaker import Speaker

__all__ = ["announce", "by_kind", "check_one", "draw_boxes_of", "dropped", "named"]

STDIN_LIMIT = 1 << 28  # bytes
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

_WORD = re.compile(r"""'[^']*'(?!\S)|"[^"]*"(?!\S)|(?:\\.|\S)+""")


def named(names: Sequence[str] | None) -> list[Any]:
    """What --image and --video name: files, data URLs, `demo`, and `-`, whose bytes are read here."""
    return [_named(name) for name in names or ()]


def _named(name: str) -> Any:
    if name == "-":
        return _from_stdin()
    if name == "demo" and not exists(Path(name)):
        return DEMO / "picture.png"
    return name if name.startswith("data:") or "://" in name else expand_user(Path(name))


def _from_stdin() -> bytes:
    if sys.stdin.isatty() or not hasattr(sys.stdin, "buffer"):
        raise UsageError(
            "nothing was piped in for the picture -", hint="try `cat photo.jpg | edgeq chat ... --image -`"
        )
    data: bytes = sys.stdin.buffer.read(STDIN_LIMIT + 1)
    if not data:
        raise UsageError("the picture from stdin is empty", hint="pipe one file in, and read - once")
    if len(data) > STDIN_LIMIT:
        raise UsageError(f"the picture from stdin has more than {STDIN_LIMIT:,} bytes", hint="give it as a file")
    return data


def announce(model: Speaker, visuals: Sequence[Visual]) -> None:
    """Say what pictures will cost, each on a line of stderr: `photo.jpg 4000 x 3000 -> 1,024 tokens, about 9 s`."""
    for visual in visuals:
        seconds = seconds_to_see(model.engine, [visual], known=model.sight.known(visual))
        say(f"{_described(visual)} -> {visual.tokens:,} tokens, {_about(seconds)}", faint=True)


def _described(visual: Visual) -> str:
    size = "" if visual.size is None else " {1} x {0}".format(*visual.size)
    taken = f", {visual.taken} frames" if visual.kind == "video" else ""
    return f"{printable(Path(visual.name).name)}{size}{taken}"


def _about(seconds: float) -> str:
    if seconds < 1:
        return "less than 1 s"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min"


def by_kind(visuals: Sequence[Visual]) -> dict[str, Any]:
    """Pictures as `Chat.send` takes them beside a text."""
    return {f"{kind}s": [visual for visual in visuals if visual.kind == kind] for kind in ("image", "video")}


def check_one(images: Sequence[Any]) -> None:
    """UsageError unless there is one image that boxes can be drawn on."""
    if len(images) != 1:
        raise UsageError(f"--draw-boxes draws on one image, got {len(images)}", hint="ask about one image at a time")


def draw_boxes_of(text: str, image: Any, out: Path) -> None:
    """Draw the boxes and points of an answer on an image, and say how many; EdgeqError where there are none."""
    from PIL import Image

    from edgeq.vision import open_image

    marks, wrong = find_marks(text)
    for place in wrong:
        warn(f"{place} is neither a box nor a point in thousandths: not drawn")
    if not marks:
        raise EdgeqError(
            f"the reply has no boxes or points that can be drawn: {out} was not written",
            hint='ask for them, as in "Where is the square? Answer with bbox_2d in JSON."',
        )
    with open_image(image) as opened:
        draw_marks(Image.fromarray(opened.decoded(opened.size).rows(0, opened.size[0])), marks, out)
    boxes = sum(len(mark.place) == 4 for mark in marks)
    say(f"{boxes} boxes and {len(marks) - boxes} points drawn: {out}", faint=True)


def dropped(line: str) -> tuple[list[Path], list[Path], str]:
    """Images and videos whose paths a line begins or ends with, as terminals paste what is dropped on them, and the
    rest of the line."""
    words = list(_WORD.finditer(line))
    paths = [_path(word[0]) for word in words]
    first = next((i for i, path in enumerate(paths) if path is None), len(words))
    last = next((i for i in range(len(words), first, -1) if paths[i - 1] is None), first)
    found = [path for path in (*paths[:first], *paths[last:]) if path is not None]
    images = [path for path in found if path.suffix.lower() in IMAGES]
    videos = [path for path in found if path.suffix.lower() in VIDEOS]
    rest = line[words[first].start() : words[last - 1].end()] if first < last else ""
    return images, videos, rest if found else line


def _path(word: str) -> Path | None:
    """The picture that a word names, if there is one; quoted or with backslashes as a shell has it."""
    word = word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"" else re.sub(r"\\(.)", r"\1", word)
    if word.startswith("file://"):
        word = unquote(urlparse(word).path)
    path = expand_user(Path(word))
    return path if path.suffix.lower() in IMAGES + VIDEOS and is_file(path) else None
