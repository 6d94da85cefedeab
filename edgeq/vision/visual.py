"""Images that are ready for the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from edgeq.formats.bf16 import Float32
from edgeq.vision.images import Source, open_image
from edgeq.vision.patches import Patches
from edgeq.vision.resize import resize
from edgeq.vision.settings import Config, Kind, processor_of
from edgeq.vision.sizes import image_size

__all__ = ["Visual", "digest_of", "preprocess", "read_image"]


@dataclass(frozen=True, eq=False, slots=True)
class Visual:
    """An image or a video, resized.

    pixels: its patches, float32 [patches, values] where rows are asked for; what is kept is an eighth of that.
    timestamps: seconds, one for each temporal patch of a video. digest: equal where pixels and settings are.
    name, size: of what it was made from, the latter (height, width). taken: frames of a video.
    """

    kind: Kind
    pixels: Patches
    digest: bytes
    name: str
    size: tuple[int, int]
    timestamps: tuple[float, ...] = ()
    taken: int = 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """Temporal patches, rows and columns of patches."""
        return self.pixels.grid

    @property
    def pixel_values(self) -> Float32:
        """All patches at once."""
        return self.pixels[:]


def preprocess(
    image: Source, config: Config = None, *, min_pixels: int | None = None, max_pixels: int | None = None,
    image_tokens: int | None = None, memory: int | None = None,
) -> tuple[Float32, tuple[int, int, int]]:  # fmt: skip
    """An image as the vision tower takes it: pixel_values, float32 [patches, 1536], and their grid (1, rows, columns).

    image: bytes, a path, a data: URL, a binary file, a Pillow image, or an array uint8 [h, w], [h, w, 3] or [h, w, 4].
    config: a model's `config`, whose checkpoint's settings hold; for others see `edgeq.vision.settings`.
    min_pixels, max_pixels, image_tokens: limits in the place of the checkpoint's, see `image_size`. memory: bytes that
    decoding may take (512 MiB); a larger JPEG is decoded at a half, a quarter or an eighth of its size where that is
    still as large as the result, which then differs by a few levels.

    The values are those of transformers, to the bit, but where it disagrees with itself: EXIF's orientation is applied,
    what is transparent is put on white, 16-bit grey is scaled to 8 bits, and of an animation the first frame is taken.
    Raises MediaError (exit code 4) for what is damaged, too large or too narrow.
    """
    visual = read_image(
        image, config, min_pixels=min_pixels, max_pixels=max_pixels, image_tokens=image_tokens, memory=memory
    )
    return visual.pixel_values, visual.grid


def read_image(
    image: Source, config: Config = None, *, min_pixels: int | None = None, max_pixels: int | None = None,
    image_tokens: int | None = None, memory: int | None = None, name: str | None = None,
) -> Visual:  # fmt: skip
    """The same as a `Visual`, which makes its patches when they are wanted. `image` may be an `OpenImage`, too."""
    c = processor_of(config)
    with open_image(image, name=name, memory=memory) as opened:
        size = image_size(*opened.size, c, min_pixels=min_pixels, max_pixels=max_pixels, image_tokens=image_tokens)
        frames = resize(opened.decoded(size), size)[None]
        patches = Patches(frames, c, c.image)
        return Visual("image", patches, digest_of(patches), opened.name, opened.size)


def digest_of(patches: Patches) -> bytes:
    """What tells these patches from others: 16 bytes of the frames' pixels, their shape, and the settings."""
    c = patches.config
    settings = (patches.frames.shape, patches.pixels, c.patch_size, c.merge_size, c.temporal_patch_size)
    digest = blake2b(repr(settings).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(patches.frames).data)
    return digest.digest()
