"""What a model has seen: pictures go through the vision tower once, however often they are asked about."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeq import vision
from edgeq.engine import Engine, Ids
from edgeq.errors import UsageError
from edgeq.formats.bf16 import Float32
from edgeq.inputs import expand_user, is_folder
from edgeq.model.vision import BAND
from edgeq.printable import brief
from edgeq.session.parts import Source
from edgeq.session.places import Pads, Place, find_places
from edgeq.session.visual_settings import VisualSettings
from edgeq.vision.visual import Visual

__all__ = ["Looking", "Sight"]

KEPT = 1 << 26  # bytes of features that stay after their prompt was read: 16,384 tokens of the 0.8B, 6,553 of the 4B

Looking = Callable[[int, int], None]
"""Called with the tokens seen and all tokens, before each step of the tower, and at the end."""


class Sight:
    """A model's eyes. Features are kept by what the patches are, so that another question about a picture, and undoing
    or repeating one, costs nothing; of more than `KEPT` bytes those longest unused are let go.

    encoded: temporal patches that went through the tower so far.
    """

    def __init__(self, engine: Engine[Any, Any]) -> None:
        self._engine = engine
        self._kept: OrderedDict[tuple[bytes, int], Any] = OrderedDict()
        self._stored: dict[tuple[bytes, int], Float32] = {}
        self.encoded = 0
        if engine.sees:
            engine.ledger.open("features of pictures", lambda: self.nbytes, give_way=self._give_way)

    @property
    def nbytes(self) -> int:
        """Bytes of the features that are kept."""
        return sum(features.nbytes for features in self._kept.values())

    @property
    def square(self) -> int:
        """Rows (and columns) of patches that make a token; UsageError for a model that does not see."""
        vision = self._engine.checkpoint.config.vision
        if vision is None or not self._engine.sees:
            raise UsageError(
                f"{self._engine.checkpoint.path} does not see: {self._engine.checkpoint.lacks_tower()}",
                hint="give text only, or use a checkpoint that has its vision tower",
            )
        return vision.spatial_merge_size

    def places(
        self, ids: Sequence[int] | Ids, visuals: Sequence[Any], *, start: int = 0, position: int = 0
    ) -> list[Place]:
        """Where `visuals`, each a Visual or (kind, pixel_values, grid), stand in `ids`: see `find_places`.

        Without visuals all ids are tokens like any other, as those are that a model has said; but what a template wrote
        for a picture is refused, which is then missing.
        """
        if not isinstance(visuals, Sequence):
            raise UsageError(
                f"visuals must be a list of pictures, got {brief(visuals)}", hint="put one into a list, too"
            )
        config = self._engine.checkpoint.config
        image, video = config.image_token_id, config.video_token_id
        if not visuals:
            tokens = np.asarray(ids)
            pads = (tokens[1:] == image) | (tokens[1:] == video)
            if np.any(pads & (tokens[:-1] == config.vision_start_token_id)):
                raise UsageError("the prompt has a place for a picture, but no picture", hint="give it in visuals")
            return []
        known = [Visual.given(visual, self.square) for visual in visuals]
        if image is None or video is None:
            raise UsageError(
                f"{self._engine.checkpoint.path}: config.json does not say which tokens stand for pictures",
                hint="use the config.json of the original checkpoint",
            )
        return find_places(ids, known, Pads(image, video), start=start, position=position)

    def open(self, source: Source, settings: VisualSettings) -> Visual:
        """A picture of a message, opened and resized; a Visual passes as it is.

        Raises UsageError for a model that does not see and for what is no picture, MemoryBudgetError where the ceiling
        leaves no room to decode it.
        """
        square, what = self.square, source.what
        if isinstance(what, Visual):
            if (what.kind, what.square) != (source.kind, square) or source.settings:
                raise UsageError(f"the {what.kind} given was made for another use", hint=f"give the {source.kind} file")
            return what
        own, config = settings.replace(**source.settings), self._engine.checkpoint.config
        limits: dict[str, Any] = {"min_pixels": own.min_pixels, "max_pixels": own.max_pixels}
        tokens = (own.image_tokens if source.kind == "image" else own.video_tokens) if own.max_pixels is None else None
        limits["memory"] = self._engine.decoding_memory
        with self._engine.budget.alone:
            if source.kind == "image":
                return vision.read_image(what, config, image_tokens=tokens, **limits)
            most = vision.processor_of(config).max_frames
            limits |= {"video_tokens": tokens, "max_frames": min(own.max_frames or most, most)}
            limits["fps" if _is_frames(what) else "rate"] = own.fps
            return vision.read_video(what, config, **limits)

    def known(self, visual: Visual) -> int:
        """How many of its temporal patches were seen already, and are kept."""
        keys = ((visual.digest, frame) for frame in range(visual.frames))
        return sum(key in self._kept or key in self._stored for key in keys)

    def remember(self, visual: Visual, features: Float32) -> None:
        """Take what the model saw of a visual, [tokens, hidden], from a file in which it is mapped."""
        size = visual.height * visual.width
        for frame in range(visual.frames):
            self._stored[visual.digest, frame] = features[frame * size : (frame + 1) * size]

    def look(self, places: Sequence[Place], on_look: Looking | None = None) -> list[Any]:
        """The features of each place, [height * width, hidden].

        An interruption loses one image, or one band of a video, at most.
        """
        found = {_key(place): self._kept[_key(place)] for place in places if _key(place) in self._kept}
        for key in {_key(place) for place in places} & self._stored.keys() - found.keys():
            found[key] = self._kept[key] = self._engine.ops.activations(self._stored[key])
        missing = list({_key(place): place for place in places if _key(place) not in found}.values())
        total, done = sum(place.stop - place.start for place in missing), 0
        for band in _bands(missing):
            if on_look:
                on_look(done, total)
            features, size = self._see(band), band[0].height * band[0].width
            for i, place in enumerate(band):
                found[_key(place)] = self._kept[_key(place)] = features[i * size : (i + 1) * size]
            done += len(band) * size
        if missing and on_look:
            on_look(total, total)
        for key in found:
            self._kept.move_to_end(key)
        self._forget()
        return [found[_key(place)] for place in places]

    def _see(self, band: Sequence[Place]) -> Any:
        """The features of some temporal patches of a visual, one after another."""
        visual, first = band[0].visual, band[0].frame
        _, rows, columns = visual.grid
        features = self._engine.see(visual.temporal_patches(first, len(band)), (len(band), rows, columns))
        self.encoded += len(band)
        return features

    def _forget(self) -> None:
        """Let go of what is too much, the longest unused first."""
        while len(self._kept) > 1 and self.nbytes > KEPT:
            self._kept.popitem(last=False)

    def _give_way(self, nbytes: int) -> int:
        """Let go of so many bytes of features, if there are, the longest unused first; how many."""
        before = self.nbytes
        while self._kept and before - self.nbytes < nbytes:
            self._kept.popitem(last=False)
        return before - self.nbytes


def _is_frames(video: object) -> bool:
    """Whether a video is a number of frames, which do not say how fast they were taken."""
    if isinstance(video, str | Path):
        return is_folder(expand_user(Path(video)))
    return isinstance(video, Sequence | np.ndarray) and not isinstance(video, bytes | bytearray | memoryview)


def _key(place: Place) -> tuple[bytes, int]:
    return place.visual.digest, place.frame


def _bands(places: Sequence[Place]) -> Iterator[list[Place]]:
    """`places` in runs that go through the tower together: of one visual, one after another, at most `BAND` patches."""
    band = list[Place]()
    for place in places:
        _, rows, columns = place.visual.grid
        follows = band and place.visual is band[0].visual and place.frame == band[-1].frame + 1
        if band and not (follows and (len(band) + 1) * rows * columns <= BAND):
            yield band
            band = []
        band.append(place)
    if band:
        yield band
