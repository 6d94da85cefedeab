"""Reading pictures: files, arrays and frames become visuals."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from edgeq.formats.bf16 import Float32
from edgeq.vision.images import Memory, Source, open_image
from edgeq.vision.patches import Patches
from edgeq.vision.resize import resize
from edgeq.vision.settings import Config, processor_of
from edgeq.vision.sizes import ASSUMED_FPS, image_size, sample_frames, timestamps, video_size
from edgeq.vision.video import OpenVideo, open_video
from edgeq.vision.visual import Visual

__all__ = ["digest_of", "frames_of", "preprocess", "preprocess_video", "read_image", "read_video"]


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
    image_tokens: int | None = None, memory: Memory | None = None, name: str | None = None,
) -> Visual:  # fmt: skip
    """The same as a `Visual`, which makes its patches when they are wanted. `image` may be an `OpenImage`, too."""
    c = processor_of(config)
    with open_image(image, name=name, memory=memory) as opened:
        size = image_size(*opened.size, c, min_pixels=min_pixels, max_pixels=max_pixels, image_tokens=image_tokens)
        frames = resize(opened.decoded(size), size)[None]
        patches = Patches(frames, c, c.image)
        return Visual(
            "image", patches.grid, c.merge_size, patches, digest_of(patches), name=opened.name, size=opened.size
        )


def preprocess_video(
    frames: Source, config: Config = None, fps: float | None = None, sample: bool = True, *,
    rate: float | None = None, max_frames: int | None = None, min_pixels: int | None = None,
    max_pixels: int | None = None, video_tokens: int | None = None, memory: int | None = None,
) -> tuple[Float32, tuple[int, int, int]]:  # fmt: skip
    """A video as the vision tower takes it: pixel_values, float32 [patches, 1536], and their grid.

    frames: a sequence of images of one size, an array uint8 [frames, h, w, 3], or anything that `open_video` opens.
    fps: frames in a second, as they are given; 24 where nothing is known. sample: take some of them, as `sample_frames`
    says with `rate` and `max_frames`; otherwise all. One frame, or an odd last one, counts twice. Limits are for all
    frames together, see `video_size`.
    """
    visual = read_video(
        frames, config, fps=fps, sample=sample, rate=rate, max_frames=max_frames, min_pixels=min_pixels,
        max_pixels=max_pixels, video_tokens=video_tokens, memory=memory,
    )  # fmt: skip
    return visual.pixel_values, visual.grid


def read_video(
    video: Source, config: Config = None, *, fps: float | None = None, sample: bool = True, rate: float | None = None,
    max_frames: int | None = None, min_pixels: int | None = None, max_pixels: int | None = None,
    video_tokens: int | None = None, memory: Memory | None = None, name: str | None = None,
) -> Visual:  # fmt: skip
    """The same as a `Visual`. Frames are resized as they come; all of them together are there only in the new size."""
    c = processor_of(config)
    with open_video(video, fps=fps, name=name, memory=memory) as opened:
        indices, seconds = frames_of(opened, c, sample=sample, rate=rate, max_frames=max_frames)
        size = video_size(
            len(indices), *opened.size, c, min_pixels=min_pixels, max_pixels=max_pixels, video_tokens=video_tokens
        )
        frames = np.empty((len(indices), 3, *size), np.uint8)
        for frame, picture in zip(frames, opened.frames(indices), strict=True):
            resize(picture, size, out=frame)
        patches = Patches(frames, c, c.video)
        return Visual(
            "video", patches.grid, c.merge_size, patches, digest_of(patches), tuple(seconds), opened.name, opened.size,
            len(indices),
        )  # fmt: skip


def frames_of(
    opened: OpenVideo, config: Config = None, *, sample: bool = True, rate: float | None = None,
    max_frames: int | None = None,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """Which frames of an open video are taken, and the times of its temporal patches; see `sample_frames`."""
    c = processor_of(config)
    if sample and c.do_sample_frames:
        return sample_frames(opened.total, opened.fps, c, rate=rate, max_frames=max_frames)
    indices = list(range(opened.total))
    return indices, timestamps(indices, opened.fps or ASSUMED_FPS, c)


def digest_of(patches: Patches) -> bytes:
    """What tells these patches from others: 16 bytes of the frames' pixels, their shape, and the settings."""
    c = patches.config
    settings = (patches.frames.shape, patches.pixels, c.patch_size, c.merge_size, c.temporal_patch_size)
    digest = blake2b(repr(settings).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(patches.frames).data)
    return digest.digest()
