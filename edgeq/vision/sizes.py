"""What size a picture is resized to, how many tokens that is, and which frames of a video are taken.

The rules are those of the family's processors in transformers, digit by digit: Python's round, half to even, and square
roots and divisions in the same order.
"""

from __future__ import annotations

import math

import numpy as np

from edgeq.errors import MediaError, UsageError
from edgeq.processor import ProcessorConfig
from edgeq.vision.settings import Config, processor_of

__all__ = ["ASSUMED_FPS", "grid_of", "image_size", "limited", "sample_frames", "timestamps", "tokens_of", "video_size"]

ASSUMED_FPS = 24.0  # of frames that nothing is known of
_RATIO = 200  # of the longer side to the shorter


def image_size(
    h: int, w: int, config: Config = None, *, min_pixels: int | None = None, max_pixels: int | None = None,
    image_tokens: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """The height and width that an image of h x w pixels is resized to.

    Both are multiples of 32, and their product is from the checkpoint's least number of pixels to its greatest, or
    what is given in their place. image_tokens: most tokens, of 32 x 32 pixels each; the greatest number of pixels
    still holds. A limit of N tokens is kept to by every picture that is at most N times longer than it is wide.

    Raises MediaError where one side is more than 200 times longer than the other.
    """
    c = processor_of(config)
    own = (c.image.min_pixels, c.image.max_pixels)
    least, most, capped = limited(own, c, min_pixels, max_pixels, image_tokens)
    return _resized(1, 1, h, w, c.factor, least, most, capped)


def video_size(
    n: int, h: int, w: int, config: Config = None, *, min_pixels: int | None = None, max_pixels: int | None = None,
    video_tokens: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """The height and width that each of n frames of h x w pixels is resized to.

    Limits are for the pixels of all frames together; a token is 32 x 32 pixels of two frames, video_tokens the most of
    them. One frame counts twice. Raises MediaError as `image_size` does.
    """
    c = processor_of(config)
    n = max(n, c.temporal_patch_size)
    least, most, capped = limited(
        (c.video.min_pixels, c.video.max_pixels), c, min_pixels, max_pixels,
        None if video_tokens is None else video_tokens * c.temporal_patch_size,
    )  # fmt: skip
    if c.cap_pixels_per_frame:
        most = max(min(c.max_video_tokens * c.factor**2, most // n), int(least * 1.05)) * n
    _check(h, w)
    if h < c.factor or w < c.factor:
        scale = max(c.factor / h, c.factor / w)
        h, w = int(h * scale), int(w * scale)
    counted = round(n / c.temporal_patch_size) * c.temporal_patch_size
    return _resized(n, counted, h, w, c.factor, least, most, capped)


def grid_of(frames: int, size: tuple[int, int], c: ProcessorConfig) -> tuple[int, int, int]:
    """Temporal patches, rows and columns of patches, of frames of a size that `video_size` or `image_size` gave."""
    height, width = size
    return -(-frames // c.temporal_patch_size), height // c.patch_size, width // c.patch_size


def tokens_of(grid: tuple[int, int, int], config: Config = None) -> int:
    """Tokens of a grid of patches."""
    return math.prod(grid) // processor_of(config).merge_size ** 2


def sample_frames(
    total: int, fps: float | None, config: Config = None, *, rate: float | None = None, max_frames: int | None = None,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """Which of a video's frames are taken, and when each pair of them (each temporal patch) is, in seconds.

    total, fps: frames of the video, and frames of it in a second; None is taken for 24. rate: frames that are taken of
    a second in the place of the checkpoint's 2. max_frames: most frames that are taken, in the place of the
    checkpoint's 768. An odd last frame makes a pair with itself.
    """
    c = processor_of(config)
    if total < 1:
        raise MediaError("a video without frames", hint="give a video that plays, or frames of one")
    fps = ASSUMED_FPS if fps is None else fps
    rate = c.fps if rate is None else rate
    if not (0 < fps < math.inf and 0 < rate < math.inf):
        raise UsageError(f"{fps:g} frames a second, of which {rate:g} are taken", hint="give rates above 0")
    most = c.max_frames if max_frames is None else max_frames
    if most < 1:
        raise UsageError(f"at most {most} frames of a video", hint="take one frame or more")
    count = min(max(int(min(total / fps * rate, total)), c.min_frames), most, total)
    indices = [int(i) for i in np.linspace(0, total - 1, count).round()]
    return indices, timestamps(indices, fps, c)


def timestamps(indices: list[int], fps: float, c: ProcessorConfig) -> list[float]:
    """When each temporal patch of some frames is, in seconds: in the middle of its first and its last frame."""
    t = c.temporal_patch_size
    seconds = [i / fps for i in indices + indices[-1:] * (-len(indices) % t)]
    return [(seconds[i] + seconds[i + t - 1]) / 2 for i in range(0, len(seconds), t)]


def limited(
    own: tuple[int, int], c: ProcessorConfig, min_pixels: int | None, max_pixels: int | None, tokens: int | None
) -> tuple[int, int, bool]:
    """The least and the greatest number of pixels, and whether a caller asked for the latter, who then gets it."""
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels), ("the number of tokens", tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}", hint="give a number of at least 1")
    most = own[1] if max_pixels is None else max_pixels
    if tokens is not None:
        most = min(most, tokens * c.factor**2)
    least = own[0] if min_pixels is None else min_pixels
    if min_pixels is not None and min_pixels > most:
        raise UsageError(
            f"min_pixels is {min_pixels}, expected at most the maximum of {most} pixels",
            hint="give fewer, or raise the maximum with max_pixels",
        )
    return min(least, most), most, (max_pixels, tokens) != (None, None)


def _resized(
    n: int, counted: int, h: int, w: int, factor: int, least: int, most: int, capped: bool
) -> tuple[int, int]:  # fmt: skip
    """The size of each of n frames that count as `counted`."""
    _check(h, w)
    height, width = (round(side / factor) * factor for side in (h, w))
    if counted * height * width < least:
        shrink = math.sqrt(least / (n * h * w))
        height, width = (math.ceil(side * shrink / factor) * factor for side in (h, w))
        if not (capped and counted * height * width > most):
            return height, width
    if counted * height * width > most:
        shrink = math.sqrt((n * h * w) / most)
        height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (h, w))
    return height, width


def _check(h: int, w: int) -> None:
    if min(h, w) < 1:
        raise MediaError(f"a picture of {w} x {h} pixels", hint="give one with pixels")
    if max(h, w) / min(h, w) > _RATIO:
        raise MediaError(
            f"a picture of {w} x {h} pixels, expected no side more than {_RATIO} times longer than the other",
            hint="cut it into pieces",
        )
