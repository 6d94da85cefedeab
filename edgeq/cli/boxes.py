"""Boxes and points of an answer, drawn on its picture.

Two ways of writing them are known: the JSON of the model cards, objects with `bbox_2d` [x1, y1, x2, y2] or `point_2d`
[x, y] and perhaps a `label`, wherever they stand in the answer; and the older special tokens, `<|box_start|>(x1,y1),
(x2,y2)<|box_end|>` with the name before them in `<|object_ref_start|>...<|object_ref_end|>`. Coordinates are
thousandths of the picture's width and height.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeq.errors import UsageError
from edgeq.files import new_file
from edgeq.inputs import exists, is_file
from edgeq.printable import brief

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Mark", "check_drawing", "draw_marks", "find_marks"]

SCALE = 1000  # what the coordinates' 1 is divided into
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000000")
_PAIR = r"\(\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\)"
_TOKENS = re.compile(
    r"(?:<\|object_ref_start\|>(?P<label>.*?)<\|object_ref_end\|>\s*)?"
    rf"<\|box_start\|>\s*{_PAIR}(?:\s*,?\s*{_PAIR})?\s*<\|box_end\|>",
    re.DOTALL,
)
_KEYS = {"bbox_2d": 4, "point_2d": 2}


class Mark(NamedTuple):
    """A point (x, y) or a box (x1, y1, x2, y2), in thousandths of the picture, and what it is called."""

    place: tuple[float, ...]
    label: str = ""


def find_marks(text: str) -> tuple[list[Mark], list[str]]:
    """The marks in an answer, and what looks like one but is none: coordinates missing, or outside of the picture."""
    marks, wrong = list[Mark](), list[str]()
    for place, label in _written(text):
        numbers = place if isinstance(place, list) and all(map(_is_thousandth, place)) else []
        if len(numbers) == 2:
            marks.append(Mark(tuple(numbers), label))
        elif len(numbers) == 4:
            (left, right), (top, bottom) = sorted(numbers[::2]), sorted(numbers[1::2])
            marks.append(Mark((left, top, right, bottom), label))
        else:
            wrong.append(brief(place))
    return marks, wrong


def _written(text: str) -> Iterator[tuple[Any, str]]:
    """Coordinates and label of everything that is written like a mark."""
    for found in _TOKENS.finditer(text):
        numbers = [float(n) if re.fullmatch(r"-?\d+(\.\d*)?|-?\.\d+", n) else math.nan for n in found.groups()[1:] if n]
        yield numbers, (found["label"] or "").strip()
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            entry, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            entry, end = {}, start + 1
        key = next((key for key in _KEYS if key in entry), None)
        if key is not None:
            label = entry.get("label", "")
            fits = isinstance(entry[key], list) and len(entry[key]) == _KEYS[key]
            yield entry[key] if fits else [entry[key]], label if isinstance(label, str) else ""
        start = text.find("{", end if key is not None else start + 1)


def _is_thousandth(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= SCALE


def check_drawing(out: Path) -> None:
    """UsageError unless a picture can be written at `out`, before any work."""
    if out.suffix.lower() not in _FORMATS:
        raise UsageError(f"{out} does not end in {', '.join(_FORMATS)}", hint="name the picture that is to be drawn")
    if out.is_symlink() or exists(out):
        _check_file(out)


def draw_marks(picture: Image, marks: list[Mark], out: Path) -> None:
    """Write `picture` with `marks` on it to `out`."""
    from PIL import ImageDraw, ImageFont

    drawn = picture.convert("RGB")
    width, height = drawn.size
    canvas, line = ImageDraw.Draw(drawn), max(2, min(width, height) // 200)
    font = ImageFont.load_default(max(10, min(width, height) // 30))
    for i, mark in enumerate(marks):
        colour = _COLOURS[i % len(_COLOURS)]
        x, y, *corner = (n / SCALE * size for n, size in zip(mark.place, (width, height) * 2, strict=False))
        if corner:
            canvas.rectangle((x, y, *corner), outline=colour, width=line)
        else:
            canvas.ellipse((x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line), fill=colour, outline="white")
        if mark.label:
            label = mark.label[:60].encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
            left, top, right, bottom = canvas.textbbox((x + line, y + line), label, font=font)
            canvas.rectangle((left - line, top - line, right + line, bottom + line), fill=colour)
            canvas.text((x + line, y + line), label, fill="white", font=font)
    file = BytesIO()
    drawn.save(file, _FORMATS[out.suffix.lower()])
    with new_file(out, may_replace=_check_file) as place:
        place.write_bytes(file.getvalue())


def _check_file(place: Path) -> None:
    if place.is_symlink() or not is_file(place):
        raise UsageError(f"{place} is not a file, so it is not overwritten", hint="choose another name")
