"""What a model is given: ids, where each of them stands, and the pictures among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.session.language import Language
from edgeq.session.parts import Source
from edgeq.session.places import Place, positions, rope_delta
from edgeq.session.sight import Sight
from edgeq.session.visual_settings import VisualSettings
from edgeq.text.visuals import Outline, expanded
from edgeq.vision.visual import Visual

__all__ = ["Prompt", "completion_prompt"]


class Prompt(NamedTuple):
    """A prompt.

    positions: int32 [3, tokens] (time, height, width). rope_delta: what is added to the number of a token after the
    prompt to get its position. visuals: its pictures in order, each of which unpacks as (kind, pixel_values, grid).
    """

    ids: list[int]
    positions: NDArray[np.int32]
    rope_delta: int
    visuals: tuple[Visual, ...]

    @classmethod
    def of(cls, ids: Sequence[int], places: Sequence[Place]) -> Prompt:
        """The prompt of `ids` with pictures in some places."""
        visuals = tuple(place.visual for place in places if place.frame == 0)
        return cls(list(ids), positions(places, 0, len(ids), 0), rope_delta(places), visuals)


def completion_prompt(
    language: Language, sight: Sight, text: str, images: Sequence[Any], videos: Sequence[Any], settings: VisualSettings
) -> Prompt:
    """A text to be continued as it is, after some pictures."""
    sources = [*(Source("image", what) for what in images), *(Source("video", what) for what in videos)]
    visuals = [sight.open(source, settings) for source in sources]
    tokenizer, spelling, outlines = language.need_tokenizer(), language.spelling, [Outline.of(v) for v in visuals]
    places = "".join(spelling.place(visual.kind) for visual in visuals) if spelling else ""
    before = expanded(places, outlines, spelling, outer=settings.outer_vision_tokens)
    ids = tokenizer.encode(before, control=True) + tokenizer.encode(text)
    return Prompt.of(ids, sight.places(ids, visuals))
