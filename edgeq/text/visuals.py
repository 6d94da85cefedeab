"""Pictures in a prompt's text: the one token that a template writes for a picture becomes as many as it takes.

An image takes a token for every 2 x 2 patches. A video is a row of such pictures, one for every two frames, each after
the time it shows: `<1.2 seconds><|vision_start|>` tokens `<|vision_end|>`. What the template wrote around a video, a
`<|vision_start|>` and a `<|vision_end|>`, stays around the whole, as in transformers 5.23; the family's first processor
and vLLM replace it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from edgeq.errors import ModelError
from edgeq.text.tokenizer import Tokenizer
from edgeq.vision.visual import Kind, Visual

__all__ = ["Outline", "Spelling", "expanded"]


class Outline(NamedTuple):
    """What a picture takes in a prompt."""

    kind: Kind
    tokens: int
    """Of an image, or of each temporal patch of a video."""
    timestamps: tuple[float, ...] = ()
    """Seconds, one for each temporal patch of a video."""

    @classmethod
    def of(cls, visual: Visual) -> Outline:
        """That of a picture."""
        return cls(visual.kind, visual.height * visual.width, visual.timestamps)


class Spelling(NamedTuple):
    """The special tokens around and in the place of pictures, as the vocabulary spells them."""

    image: str
    video: str
    start: str
    end: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Sequence[int | None]) -> Spelling | None:
        """That of the ids for image, video, start and end that a config.json names; None if a token is missing."""
        found = [None if i is None else tokenizer.token(i) for i in ids]
        return cls(*map(str, found)) if all(found) else None

    def place(self, kind: Kind) -> str:
        """What a template writes for a picture."""
        return f"{self.start}{self.image if kind == 'image' else self.video}{self.end}"

    def spelled(self, outline: Outline) -> str:
        """What stands in the place of the template's one token."""
        if outline.kind == "image":
            return self.image * outline.tokens
        picture = f"{self.start}{self.video * outline.tokens}{self.end}"
        return "".join(f"<{seconds:.1f} seconds>{picture}" for seconds in outline.timestamps)


def expanded(text: str, outlines: Sequence[Outline], spelling: Spelling | None, *, outer: bool = True) -> str:
    """A rendered prompt with every place grown to its picture's tokens; pictures come in the order of the places.

    outer: keep the tokens that the template wrote around a video. Raises ModelError where the template has not written
    one place for each picture.
    """
    if spelling is None:
        if outlines:
            raise ModelError(
                "the tokenizer has no tokens that stand for pictures", hint="use the files of the original checkpoint"
            )
        return text
    video = re.escape(spelling.video)
    wrapped = video if outer else f"{re.escape(spelling.start)}{video}{re.escape(spelling.end)}|{video}"
    places = list(re.finditer(f"(?P<image>{re.escape(spelling.image)})|(?P<video>{wrapped})", text))
    kinds, written = [outline.kind for outline in outlines], [place.lastgroup for place in places]
    if kinds != written:
        raise ModelError(
            f"the chat template wrote places for {_counted(written)}, expected {_counted(kinds)} in the order given",
            hint="use the chat template of the original checkpoint",
        )
    parts, done = list[str](), 0
    for place, outline in zip(places, outlines, strict=True):
        parts += [text[done : place.start()], spelling.spelled(outline)]
        done = place.end()
    return "".join([*parts, text[done:]])


def _counted(kinds: Sequence[str | None]) -> str:
    return f"{kinds.count('image')} images and {kinds.count('video')} videos"
