"""Where pictures stand in a sequence: which tokens they fill, and the three coordinates of every token.

A token's position has three axes, time, height and width (mRoPE, Qwen2-VL, arXiv:2409.12191). Text counts up all three
together. The tokens of a picture share one time; height and width are the rows and columns of its grid. Text goes on
one after the largest coordinate of the picture, so it stands earlier than its number of tokens says: the difference is
the rope delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import UsageError
from edgeq.vision.visual import Visual

__all__ = ["Pads", "Place", "find_places", "positions", "rope_delta"]


class Pads(NamedTuple):
    """The ids in whose place vectors of pictures come."""

    image: int
    video: int


class Place(NamedTuple):
    """Where an image, or a temporal patch of a video, stands.

    start: its first token in the sequence; position: that one's place on all axes; height, width: its grid in tokens;
    frame: the temporal patch of `visual`.
    """

    start: int
    position: int
    height: int
    width: int
    visual: Visual
    frame: int

    @property
    def stop(self) -> int:
        """The token after its last."""
        return self.start + self.height * self.width

    @property
    def next_position(self) -> int:
        """Where the text after it goes on."""
        return self.position + max(self.height, self.width)

    def positions(self) -> NDArray[np.int32]:
        """The positions of its tokens: int32 [3, height * width]."""
        rows, columns = np.divmod(np.arange(self.height * self.width, dtype=np.int32), self.width)
        return self.position + np.stack([np.zeros_like(rows), rows, columns])


def find_places(
    ids: Sequence[int] | NDArray[np.int32], visuals: Sequence[Visual], pads: Pads, *, start: int = 0, position: int = 0
) -> list[Place]:
    """The places of `visuals`, in order, in `ids`, the first of which is token `start` of its sequence at `position`.

    Raises UsageError where the tokens that stand for pictures are not just those of the pictures.
    """
    tokens = np.asarray(ids)
    at = np.flatnonzero(np.isin(tokens, pads)).tolist()
    needed = sum(visual.tokens for visual in visuals)
    if len(at) != needed:
        raise UsageError(
            f"the prompt has {len(at)} tokens for pictures, expected {needed} for the {len(visuals)} pictures given",
            hint="let model.prompt make the ids, or give every picture once, in order",
        )
    places, used, skew = list[Place](), 0, 0  # positions saved so far
    for visual, frame in _frames(visuals):
        first, size = at[used], visual.height * visual.width
        if at[used + size - 1] != first + size - 1 or not np.all(tokens[first : first + size] == tokens[first]):
            raise UsageError(
                f"the {size} tokens of a picture, from token {first} of the prompt on, are not all together",
                hint="let model.prompt make the ids",
            )
        if tokens[first] != getattr(pads, visual.kind):
            raise UsageError(
                f"at token {first} of the prompt is the place of another kind of picture than the {visual.kind} given",
                hint="give images and videos in the order of the prompt",
            )
        places.append(Place(start + first, position + first - skew, visual.height, visual.width, visual, frame))
        used, skew = used + size, skew + size - max(visual.height, visual.width)
    return places


def positions(places: Sequence[Place], start: int, tokens: int, next_position: int) -> NDArray[np.int32]:
    """Positions of `tokens` tokens from token `start` of the sequence on: int32 [3, tokens].

    places: those that overlap them, in order. next_position: where the first one stands if it is text.
    """
    found = np.empty((3, tokens), np.int32)
    found[:] = np.arange(next_position, next_position + tokens)
    for place in places:
        first, last = max(place.start, start), min(place.stop, start + tokens)
        found[:, first - start : last - start] = place.positions()[:, first - place.start : last - place.start]
        rest = start + tokens - last
        found[:, last - start :] = np.arange(place.next_position, place.next_position + rest)
    return found


def rope_delta(places: Sequence[Place]) -> int:
    """What is added to the number of a token of text to get its position: 0 or less."""
    return sum(max(place.height, place.width) - place.height * place.width for place in places)


def _frames(visuals: Sequence[Visual]) -> Iterator[tuple[Visual, int]]:
    for visual in visuals:
        for frame in range(visual.frames):
            yield visual, frame
